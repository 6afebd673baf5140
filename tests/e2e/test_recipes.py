"""Every recipe trains from its own JSON, on as many ranks as it was documented for; spoilt and short runs go on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from megalm.checkpoint.manifest import read_manifest, set_status
from megalm.config.loading import preset_paths
from megalm.runs.metrics_log import live_rows
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import PRETRAIN, finish, launcher, megalm, rows, run_folder

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

# Ranks, and what they make of the batch: sequences a step, of a micro-batch, accumulated.
RECIPES = {
    "rtx5090-896x12": (1, 64, 4, 16),
    "rtx5090-1280x16": (1, 64, 4, 16),
    "gpt2-diagnostic": (1, 8, 8, 1),
    "gpt2-diagnostic-resume": (1, 32, 32, 1),
    "h100-1k": (1, 1, 1, 1),
    "h100-10k": (1, 1, 1, 1),
    "a100x4-300m": (4, 512, 32, 4),
    "slm-117m": (2, 36, 18, 1),
    "medium-354m": (2, 16, 2, 4),
}
LENGTH = 16
# The recipe's model, smaller; a CPU needs seconds for what a larger one takes in fp16.
SMALLER = (
    *("model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=1"),
    *("model.intermediate_size=null", "model.vocab_size=null", "model.max_position_embeddings=16"),
    *(f"data.sequence_length={LENGTH}", "data.split=99,1"),
    *("sample.max_new_tokens=2", "tracking.mlflow=false", "train.rehearse=false", "train.log_interval_steps=1"),
)


def train(folder: Path, data: SmallData, preset: str, *words: str) -> None:
    """Train a recipe, with no DeepSpeed JSON named."""
    own = (f"data.train={data.prefix}", f"data.tokenizer={data.tokenizer}", "run.name=mine", *SMALLER, *words)
    settings = dict(word.split("=", 1) for word in own if not word.startswith("--"))
    flags = [part for word in own if word.startswith("--") for part in word.split("=", 1)]
    command = [*launcher("forked", RECIPES[preset][0]), PRETRAIN, "--config", preset, *flags]
    command += [f"{key}={value}" for key, value in settings.items()]
    finished = finish(folder, command, environment={"MEGALM_ALLOW_CPU_FP16": "1"})
    assert finished.code == 0, finished.explain()


def rates(folder: Path) -> dict[int, float]:
    return {row["step"]: row["lr"] for row in live_rows(rows(folder)) if row["kind"] == "train"}


def checkpoint(folder: Path, step: int) -> Path:
    return run_folder(folder) / "checkpoints" / f"step-{step:08d}"


def test_all_are_here() -> None:
    assert set(RECIPES) == {name for name, path in preset_paths().items() if path.parent.name == "recipes"}


@pytest.mark.parametrize("preset", RECIPES)
def test_trains_from_its_own_json(small_data: SmallData, tmp_path: Path, preset: str) -> None:
    train(tmp_path, small_data, preset, "train.steps=2", "data.stride=null")
    found = [row for row in rows(tmp_path) if row["kind"] == "train"]
    ranks, batch, micro_batch, accumulation = RECIPES[preset]
    assert ranks * micro_batch * accumulation == batch
    assert [(row["step"], row["tokens"]) for row in found] == [(1, batch * LENGTH), (2, 2 * batch * LENGTH)]
    # A model that knows nothing: the logarithm of the number of tokens.
    assert found[0]["loss"] == pytest.approx(math.log(small_data.vocabulary), rel=0.05)
    resolved = json.loads((run_folder(tmp_path) / "deepspeed.resolved.json").read_text())
    triple = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(resolved[name] for name in triple) == (batch, micro_batch, accumulation)
    topology = read_manifest(checkpoint(tmp_path, 2)).topology
    assert topology is not None
    assert topology.world_size == ranks


def test_a_spoilt_run_is_mended_from_its_last_good_step(small_data: SmallData, tmp_path: Path) -> None:
    """gpt2-diagnostic at a 250th of its steps: good at step 6, spoilt from step 8 on; half the block, four batches."""
    block = ("data.sequence_length=32", "model.max_position_embeddings=32")
    often = ("checkpoint.interval_steps=2", "evaluate.interval_steps=2")
    train(tmp_path, small_data, "gpt2-diagnostic", "train.steps=12", *block, *often)
    for step in (8, 10, 12):
        set_status(checkpoint(tmp_path, step), "bad", "the loss was 9.58")
    spoilt = read_manifest(checkpoint(tmp_path, 8))
    again = ("train.steps=14", "model.max_position_embeddings=32", *often)  # 6 + 8
    train(tmp_path, small_data, "gpt2-diagnostic-resume", *again, "--resume=6")
    found = rates(tmp_path)
    assert len(set(found.values())) > 2, "the first schedule rises and falls"
    assert [found[step] for step in range(7, 15)] == [pytest.approx(1e-5)] * 8
    (first, *_), (*_, last) = (read_manifest(checkpoint(tmp_path, step)).data_position.segments for step in (6, 14))
    assert (first.sequence_length, first.global_batch, first.samples_consumed) == (32, 8, 48)
    assert (last.sequence_length, last.global_batch, last.samples_consumed) == (16, 32, 256)
    mended = read_manifest(checkpoint(tmp_path, 8))
    assert (mended.status, mended.tokens) == ("good", 6 * 8 * 32 + 2 * 32 * 16)
    assert mended.tokens != spoilt.tokens
    losses = [row for row in live_rows(rows(tmp_path)) if row["kind"] == "eval" and row["step"] > 6]
    assert sorted({row["step"] for row in losses}) == [8, 10, 12, 14]


def test_what_was_spoilt_is_never_resumed_from(small_data: SmallData, tmp_path: Path) -> None:
    """The mended run stops before the spoilt steps; what goes on by itself goes on from it."""
    often = ("checkpoint.interval_steps=2", "evaluate.interval_steps=null")
    train(tmp_path, small_data, "gpt2-diagnostic", "train.steps=8", *often)
    train(tmp_path, small_data, "gpt2-diagnostic-resume", "train.steps=6", *often, "--resume=4")
    train(tmp_path, small_data, "gpt2-diagnostic-resume", "train.steps=8", *often, "--resume=auto")
    resumed = [row for row in rows(tmp_path) if row.get("event") == "resume"]
    assert [Path(row["path"]).name for row in resumed] == ["step-00000004", "step-00000006"]
    assert read_manifest(checkpoint(tmp_path, 8)).tokens == (4 * 8 + 4 * 32) * LENGTH


def test_a_short_run_is_extended_on_a_new_schedule(small_data: SmallData, tmp_path: Path) -> None:
    """h100-1k and h100-10k, strategies A and B, in fewer steps."""
    phase_1 = ("data.stride=16", "checkpoint.interval_steps=5", "evaluate.interval_steps=null")
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    train(first, small_data, "h100-1k", "train.steps=10", "schedule.warmup_steps=1", *phase_1)
    assert list(rates(first).values()) == [pytest.approx(1e-3)] * 10
    extended = re.compile(r"step 1: constant .*0\.001.*\n.*step 11: cosine .*0\.001 .*0\.0001 .*28\n")
    words = ("--after", str(checkpoint(first, 10)), "--extend-steps", "18", "--plot", str(tmp_path / "rate.png"))
    planned = finish(first, megalm("plan", "--config", "h100-10k", *words))
    assert extended.search(planned.stdout), planned.explain()
    assert (tmp_path / "rate.png").stat().st_size > 10_000
    again = ("run.name=mine", "--resume", "10", "--extend-steps", "18", "--dry-run")
    dry = finish(first, [*launcher("forked"), PRETRAIN, *again])
    assert extended.search(dry.stdout), dry.explain()
    assert sorted(rates(first)) == list(range(1, 11)), "nothing was trained"
    extended_words = ("data.stride=16", "evaluate.interval_steps=null", "--resume=10", "--extend-steps=18")
    train(first, small_data, "h100-10k", *extended_words)
    found = rates(first)
    assert sorted(found) == list(range(1, 29))
    for step in (11, 19, 28):
        progress = (step - 10) / 18
        assert found[step] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * progress)) / 2)
    start = (f"--resume={checkpoint(first, 10)}", "--extend-steps=20", "--extend-strategy=weights")
    more = ("data.stride=16", "evaluate.interval_steps=null", "schedule.warmup_steps=2")
    train(second, small_data, "h100-10k", *more, *start)
    found = rates(second)
    assert sorted(found) == list(range(1, 21))
    assert (found[1], found[2], found[20]) == pytest.approx((5e-4, 1e-3, 1e-4))
    assert read_manifest(checkpoint(second, 20)).counters["optimizer_step"] == 20
