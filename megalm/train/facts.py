"""The opening facts of a run, and where everything is at its end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.config.resolve import ResolvedRun
from megalm.estimate.memory import checkpoint_bytes
from megalm.model.shape import ModelShape
from megalm.tracking.run_folder import without_passwords
from megalm.train.checkpointing import DataIdentity
from megalm.train.data_facts import data_rows
from megalm.train.datasets import RunData
from megalm.train.invocation import Invocation
from megalm.train.report import size
from megalm.train.run_folder import RunFolder


def opening_facts(
    run: ResolvedRun, shape: ModelShape, data: RunData, device: str, threads: int, peak_source: str, peak: float
) -> Sequence[tuple[str, str]]:
    """Name and value of each fact, in the order of reading."""
    config, batch, count = run.config, run.batch, shape.parameter_count()
    steps = config.train.steps
    tokens = steps * run.tokens_per_step
    rows = [
        ("device", f"{device}; {run.topology.world_size} rank(s), {threads} thread(s) each"),
        ("precision", f"{run.precision}, ZeRO stage {run.zero_stage}"),
        ("peak", f"{peak / 1e12:.2f} TFLOP/s of all ranks ({peak_source})"),
        (
            "model",
            f"{config.model.style}, {shape.num_hidden_layers} layers x {shape.hidden_size}: {count:,} parameters",
        ),
        (
            "batch",
            f"{batch.global_batch} sequences = {batch.micro_batch} x {batch.accumulation} accumulated x "
            f"{batch.data_parallel} data rank(s), {config.data.sequence_length} tokens each: "
            f"{run.tokens_per_step:,} a step",
        ),
        ("training", f"{steps:,} steps, {tokens:,} tokens = {tokens / count:.2f} a parameter"),
        *data_rows(run, data),
        ("tokenizer", f"{data.tokenizer.name}, {data.tokenizer.vocab_size:,} entries"),
        ("checkpoint", f"{size(checkpoint_bytes(shape))} each"),
    ]
    if data.unigram_entropy is not None:
        rows.append(("unigram entropy", f"{data.unigram_entropy:.2f} nats a token: what counting alone reaches"))
    return rows


def environment_facts(
    run: ResolvedRun, data: DataIdentity, device: str, device_kind: str, threads: int, attempt: int
) -> dict[str, Any]:
    """What environment.json says of this attempt, beside versions and machine."""
    stages = zip(run.config.data.stages, data.samples.stages[1:], strict=False)
    before = data.samples.lengths_before
    return {
        "attempt": attempt,
        **{f"first_sample_of_step_{stage.from_step}": cut.first for stage, cut in stages},
        **({"sequence_lengths_before": before} if before else {}),
        "device": device,
        "device_kind": device_kind,
        "world_size": run.topology.world_size,
        "threads_per_rank": threads,
        "precision": run.precision,
        "zero_stage": run.zero_stage,
        "dataset_fingerprint": data.at(run.config.train.steps * run.batch.global_batch)["dataset"],
        "tokenizer_fingerprint": data.tokenizer,
    }


def scale_facts(run: ResolvedRun, shape: ModelShape, data: RunData) -> dict[str, Any]:
    """What environment.json says of sizes, by which losses and token counts are read."""
    planned = zip(data.train.parts, data.train.planned(data.samples), strict=True)
    return {
        "parameters": shape.parameter_count(),
        "planned_steps": run.config.train.steps,
        "unigram_entropy": data.unigram_entropy,
        "datasets": [
            {"prefix": part.prefix, "tokens_per_epoch": read.tokens_per_epoch, "epochs": part.epochs}
            for read, part in planned
        ],
    }


def farewell(folder: RunFolder, run: ResolvedRun, invocation: Invocation, page: Path | None = None) -> str:
    """Where everything is, and the next commands to try."""
    prompt, path = _quoted(_first_line(run.config.sample.prompts)), shlex.quote(str(folder.path))
    steps = 2 * run.config.train.steps
    rows = [
        *([("one page", str(page))] if page is not None else []),
        ("see it", _where_mlflow_is(folder.path.parent) if run.config.tracking.mlflow else f"{folder.metrics}"),
        ("list it", f"megalm checkpoint list {path}"),
        ("generate", f"megalm generate {path} --prompt {prompt}"),
        ("train longer", invocation.again("--resume", "auto", f"train.steps={steps}")),
        ("your own", 'README.md, "Train on your own text"'),
    ]
    lines = [f"everything is in {folder.path}: metrics.jsonl, log.txt, checkpoints/, samples/"]
    return "\n".join(["", *lines, *(f"  {name:<13} {command}" for name, command in rows)])


def _where_mlflow_is(root: Path) -> str:
    uri = without_passwords(os.environ.get("MLFLOW_TRACKING_URI", "")) or f"sqlite:///{root}/mlflow.db"
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _quoted(text: str) -> str:
    """For a shell; in double quotes where nothing in it means something there."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def _first_line(prompts: tuple[str, ...]) -> str:
    """Of the first prompt: a shell would take a newline in it for two letters."""
    return next((line for prompt in prompts for line in prompt.splitlines() if line.strip()), "The ")
