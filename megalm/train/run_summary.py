"""The facts printed at the start of a run and recorded in environment.json, and the summary and page at its end."""

from __future__ import annotations

import math
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.cost_model.memory import checkpoint_bytes
from megalm.cost_model.pipeline_balance import LARGE_BUBBLE, SMALL_BUBBLE, StageCosts, micro_batches_for
from megalm.data.indexed.metadata import AWAITS_MERGE, read_sidecar
from megalm.data.indexed.trained_tokens import trained_share
from megalm.data.sampling.sample_order import stride_warning
from megalm.data.tokenizers.tokenizer import describe_ends
from megalm.errors import ConfigError, DataError
from megalm.model.model_config import ModelConfig, model_settings
from megalm.model.parameter_groups import frozen_parameters
from megalm.planning.batch_size import TrainingStage
from megalm.planning.lr_schedule import ENDLESS
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_plan import mean_flops_per_token
from megalm.rank_environment import RankPlace
from megalm.runs.run_folder import ResumeCommand, RunFolder
from megalm.tracking.mlflow_mirror.run_facts import where_to_look
from megalm.tracking.report.page import write_report
from megalm.train.console import RunConsole
from megalm.train.datasets import RunData, find_data, open_data, validation_fingerprint, validation_on_training
from megalm.train.resume.compatibility import DataIdentity
from megalm.utils.formatting import format_bytes

# Up to about four passes, repeated text trains nearly as well as new text (arXiv 2305.16264, read in November 2026).
MANY_REPETITIONS = 4.0


def data_rows(run: ResolvedRun, data: RunData) -> list[tuple[str, str]]:
    """Return a row for each dataset of the run, and for each change of the mixture."""
    parts, rows = data.train.parts, []
    for part, planned in zip(parts, data.train.planned(data.samples), strict=True):
        share = f"{planned.samples / data.samples:.1%} of the samples, " if len(parts) > 1 else ""
        seen = f", each token {planned.repetition:.2f} times" if part.stride < part.sequence_length else ""
        text = f"{share}{planned.epochs:.2f} epochs of {part.tokens_per_epoch:,} tokens{seen}"
        if part.packing == "best_fit":
            text += f", packed into {part.samples_per_epoch:,.0f} samples with {part.padding_share:.2%} padding"
        if part.dataset.trained is not None:
            text += f", trained {trained_share(part.trained_per_epoch, part.tokens_per_epoch)}"
        rows.append(("data", f"{planned.prefix}: {text}"))
    blends = run.config.data.blends
    for stage in blends if len(blends) > 1 else ():
        all_of_it = sum(part.weight for part in stage.blend)
        shares = ", ".join(f"{part.prefix} {part.weight / all_of_it:.1%}" for part in stage.blend)
        unread = "" if stage.from_step <= run.config.train.steps else " (after the last step)"
        rows.append(("data", f"from step {stage.from_step:,}: {shares}{unread}"))
    return rows


def planned_data(run: ResolvedRun) -> tuple[list[tuple[str, str]], list[str]]:
    """Return data rows and warnings for `--dry-run`, without preparing or building any data.

    Raises:
        ConfigError, DataError: as at a real start.
    """
    data = run.config.data
    if data.train is None:
        return [], []
    try:
        opened = open_data(run, find_data(data, lambda line: None))
    except DataError as error:
        if data.rebuild == "never":
            raise
        return [("data", f"is built when the run starts: {error}")], []
    return data_rows(run, opened), data_warnings(run, opened)


def data_warnings(run: ResolvedRun, data: RunData) -> list[str]:
    """Return warnings about datasets that the run repeats many times, validates on, or that are not ready.

    Raises:
        ConfigError: a dataset is read more often than `data.max_epochs`.
    """
    steps, most = run.config.train.steps, run.config.data.max_epochs
    warnings = [
        f"validation set {name} holds the same documents as {prefix}, which the run trains on; its loss does not show "
        "how the model does on new text"
        for name, prefix in validation_on_training(data)
    ]
    for prefix in sorted({planned.prefix for planned in data.train.planned(data.samples)}):
        if ((read_sidecar(prefix) or {}).get("minhash") or {}).get(AWAITS_MERGE):
            warnings.append(
                f"{prefix} is one shard of a build with --dedup minhash and still holds near copies; "
                "data_tools/merge_datasets.py --dedup minhash removes them"
            )
    for part, planned in zip(data.train.parts, data.train.planned(data.samples), strict=True):
        if part.dataset.trained is not None and part.packing == "stream":
            warnings.append(
                f"{planned.prefix} holds conversations, and data.packing=stream cuts them where a sample ends; "
                "data.packing=best_fit keeps each whole that fits"
            )
        overlap = stride_warning(part.tokens_per_epoch, part.sequence_length, part.stride, planned.samples)
        if overlap is not None:
            warnings.append(f"{planned.prefix}: {overlap}")
        if most is not None and planned.repetition > most:
            raise ConfigError(
                f"{steps} steps read {planned.prefix} {planned.repetition:.1f} times, above data.max_epochs={most:g}; "
                "train fewer steps, or add data"
            )
        if overlap is None and planned.repetition > MANY_REPETITIONS:
            warnings.append(
                f"{planned.prefix}: {steps} steps read each of its {part.tokens_per_epoch:,} tokens "
                f"{planned.repetition:.1f} times; repeated text teaches less beyond {MANY_REPETITIONS:g} times "
                "(data.max_epochs refuses such runs)"
            )
    return warnings


# A page of half a million steps takes a few seconds. Do not wait longer, for a hanging file system for instance.
_PATIENCE_SECONDS = 60.0


def write_report_page(
    folder: RunFolder, reporter: RunConsole, patience_seconds: float = _PATIENCE_SECONDS
) -> Path | None:
    """Write report.html, on rank 0; print a warning and return None if that fails or takes too long.

    Runs in a thread that the end of the process does not wait for. The file is written atomically.
    """
    done: list[Path] = []
    why = [f"it takes more than {patience_seconds:.0f} s"]

    def write() -> None:
        try:
            done.append(write_report(folder.path))
        except Exception as error:  # of any kind: the run is complete and must not fail because of its page
            why.insert(0, " ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=write, name="page", daemon=True)
    thread.start()
    thread.join(patience_seconds)
    if done:
        return done[0]
    reporter.info(f"WARNING: cannot write report.html ({why[0]}); write it with megalm report {folder.path}")
    return None


def pipeline_facts(run: ResolvedRun, blocks: tuple[int, ...], costs: StageCosts) -> str:
    """Return a line on the pipeline's stages, one on its bubble, and a warning if the bubble is large."""
    schedule, at = run.pipeline, " of the largest batch" if run.stages.grow else ""
    bubble, micro_batches = schedule.bubble_share, schedule.micro_batches
    by_stage = costs.of_stages(blocks)
    shares = " + ".join(f"{cost / sum(by_stage):.0%}" for cost in by_stage)
    what = "the parameters" if run.config.parallel.balance == "parameters" else "the measured time"
    lines = [
        f"  pipeline: {schedule.name}, {schedule.stages} stages of {' + '.join(map(str, blocks))} blocks, "
        f"with embedding and head {shares} of {what}",
        f"  bubble: each rank waits {bubble:.0%} of a step{at}: the first of {micro_batches} micro-batches fills the "
        "pipeline, the last one empties it",
    ]
    if bubble > LARGE_BUBBLE:
        lines.append(
            f"  WARNING: {micro_batches} micro-batch(es) per step keep {schedule.ranks} ranks busy {1 - bubble:.0%} of "
            f"the time; {micro_batches_for(schedule, SMALL_BUBBLE)} keep them busy {1 - SMALL_BUBBLE:.0%}: lower "
            "train_micro_batch_size_per_gpu, raise train_batch_size, or use fewer stages"
        )
    return "\n".join(lines)


def opening_facts(
    run: ResolvedRun,
    shape: ModelConfig,
    data: RunData,
    device: str,
    threads: int,
    peak_source: str,
    peak: float,
    nodes: str | None = None,
) -> Sequence[tuple[str, str]]:
    """Return name and value of each fact, in display order."""
    config, count, tokenizer = run.config, shape.parameter_count(), data.tokenizer
    steps, rules = config.train.steps, config.train.parameter_groups
    frozen = frozen_parameters(shape, rules)
    stored = checkpoint_bytes(shape, rules, run.optimizer.muon is not None, config.train.ema_decay is not None)
    still = sum(math.prod(size) for name, size in shape.parameters().items() if name in frozen)
    tokens = run.stages.tokens(steps) - data.train.planned_padding(data.samples)
    overlap = f", tensor groups communicate in {run.tensor_chunks} chunks" if run.tensor_chunks > 1 else ""
    rows = [
        ("device", f"{device}; {run.topology.world_size} rank(s), {threads} thread(s) each"),
        *([("nodes", nodes)] if nodes is not None else []),
        (
            "precision",
            f"{run.precision}, ZeRO stage {run.zero_stage}, {'compiled' if run.compiled else 'not compiled'}{overlap}",
        ),
        ("peak", f"{peak / 1e12:.2f} TFLOP/s of all ranks ({peak_source})"),
        (
            "model",
            f"{config.model.style}, {shape.num_hidden_layers} layers x {shape.hidden_size}: {count:,} parameters"
            f"{f', of which {count - still:,} train' if still else ''}",
        ),
        *[("batch", _batch_words(run, stage)) for stage, _ in run.stages.spans(steps)],
        ("training", f"{steps:,} steps, {tokens:,} tokens = {tokens / count:.2f} per parameter"),
        *data_rows(run, data),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} entries, {describe_ends(tokenizer)}"),
        ("checkpoint", f"{format_bytes(stored)} each"),
    ]
    if data.unigram_entropy is not None:
        rows.append(
            (
                "unigram entropy",
                f"{data.unigram_entropy:.2f} nats per token, the loss of a model that only knows token frequencies",
            )
        )
    return rows


def _batch_words(run: ResolvedRun, stage: TrainingStage) -> str:
    batch = run.batch.of(stage.sequences)
    since = f"from step {stage.first_step:,}: " if run.stages.grow else ""
    return (
        f"{since}{batch.global_batch} sequences = {batch.micro_batch} x {batch.accumulation} accumulated x "
        f"{batch.data_parallel} data rank(s), {stage.sequence_length} tokens each: {stage.tokens:,} per step"
    )


def environment_facts(
    run: ResolvedRun,
    data: DataIdentity,
    device: str,
    device_kind: str,
    threads: int,
    attempt: int,
    places: Sequence[RankPlace] = (),
) -> dict[str, Any]:
    """Return what environment.json records about this attempt besides versions and machine."""
    stages = zip(run.config.data.blends[1:], data.samples.stages[1:], strict=False)
    before = data.samples.lengths_before
    return {
        "attempt": attempt,
        **{f"first_sample_of_step_{stage.from_step}": cut.first for stage, cut in stages},
        **({"sequence_lengths_before": before} if before else {}),
        "device": device,
        "device_kind": device_kind,
        "world_size": run.topology.world_size,
        "threads_per_rank": threads,
        "nodes": _nodes(places),
        "precision": run.precision,
        "compiled": run.compiled,
        "tensor_chunks": run.tensor_chunks,
        "zero_stage": run.zero_stage,
        "dataset_fingerprint": data.at(run.stages.samples(run.config.train.steps))["dataset"],
        "tokenizer_fingerprint": data.tokenizer,
    }


def _nodes(places: Sequence[RankPlace]) -> list[dict[str, Any]]:
    """Return each node of the job with its ranks, their devices and its driver."""
    nodes: dict[str, dict[str, Any]] = {}
    for place in places:
        node = nodes.setdefault(place.host, {"host": place.host, "driver": place.driver, "ranks": [], "devices": []})
        node["ranks"].append(place.rank)
        node["devices"].append(place.device)
    return list(nodes.values())


def scale_facts(run: ResolvedRun, shape: ModelConfig, data: RunData) -> dict[str, Any]:
    """Return the sizes in environment.json that help to interpret losses and token counts."""
    planned = zip(data.train.parts, data.train.planned(data.samples), strict=True)
    return {
        "parameters": shape.parameter_count(),
        "planned_steps": run.config.train.steps,
        "training_stages": run.stages.as_json(),
        "flops_per_token": round(mean_flops_per_token(run, shape)),
        "unigram_entropy": data.unigram_entropy,
        "validation_fingerprint": validation_fingerprint(data.validation) or None,
        "datasets": [
            {"prefix": part.prefix, "tokens_per_epoch": read.tokens_per_epoch, "epochs": part.epochs}
            for read, part in planned
        ],
        "resolved": _resolved_settings(run, shape),
    }


def _resolved_settings(run: ResolvedRun, shape: ModelConfig) -> dict[str, Any]:
    """Return the values of settings of config.yaml that are null there, or that the DeepSpeed JSON decides."""
    model, schedule = run.config.model, run.schedule
    rates = ("peak_learning_rate", "initial_learning_rate", "final_learning_rate")
    return {
        "model": {name: value for name, value in model_settings(shape).items() if getattr(model, name) is None},
        "schedule": {
            **{name: getattr(schedule, name) for name in rates},
            **({"decay_steps": schedule.decay_steps} if schedule.kind == "wsd" else {}),
            **({"decay_end_step": schedule.decay_end} if schedule.kind not in ENDLESS else {}),
        },
        "batch": {"global_sequences": run.stages.at(1).sequences},
    }


def final_summary(folder: RunFolder, run: ResolvedRun, invocation: ResumeCommand, page: Path | None = None) -> str:
    """Return the text on where everything is, and the next commands to try."""
    lines = "\n".join(run.config.sample.prompts).splitlines()
    # The first line alone: an escaped newline would reach the command as two characters.
    prompt, path = _quoted(next(filter(str.strip, lines), "The ")), shlex.quote(str(folder.path))
    steps = 2 * run.config.train.steps
    tracking = run.config.tracking
    metrics = where_to_look(folder.path) if tracking.mlflow else [str(folder.metrics)]
    metrics += [f"tensorboard --logdir {path}"] if tracking.tensorboard else []
    metrics += [f"wandb sync {path}/wandb/offline-run-*"] if any(folder.path.glob("wandb/offline-run-*")) else []
    rows = [
        *([("report", str(page))] if page is not None else []),
        *zip(("metrics", *[""] * len(metrics)), metrics, strict=False),
        ("checkpoints", f"megalm checkpoint list {path}"),
        ("generate", f"megalm generate {path} --prompt {prompt}"),
        ("train longer", invocation.shell("--resume", "auto", f"train.steps={steps}")),
        ("your own data", 'README.md, "Train on your own text"'),
    ]
    where = f"everything is in {folder.path}: metrics.jsonl, log.txt, checkpoints/, samples/"
    return "\n".join(["", where, *(f"  {name:<13} {command}" for name, command in rows)])


def _quoted(text: str) -> str:
    """Return `text` quoted for a shell, in double quotes if nothing in it is special there."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
