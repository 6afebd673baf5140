"""Runs that meet a spike: a stretch of nonsense in the data, or a NaN on one rank, under each policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.checkpoint.manifest import read_manifest
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.samples import TrainingSamples, split_documents
from megalm.runs.metrics_log import live_rows
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, own_lines, pretrain, rows, run_folder, train_rows

pytestmark = pytest.mark.e2e

POISONED, STEPS = 14, 18
RUN = (
    f"train.steps={STEPS}",
    "checkpoint.interval_steps=5",
    "schedule.kind=constant",
    "run.name=mine",
    "train.ema_decay=0.8",
    # A run of eighteen steps has no hundred to learn from what is usual.
    "guard.window=8",
    "guard.warmup_steps=8",
    "guard.loss_sigmas=3",
)
SAME = ("step", "loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def poisoned(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words of a run whose batch of step 14 is random tokens."""
    good = IndexedDataset(small_data.prefix)
    tokens = good.tokens.astype(np.int64)
    training = split_documents(len(good), [95, 5])[0]
    samples = TrainingSamples(good, training, 64, seed=1234)
    random = np.random.default_rng(5)
    for sample in range(16 * (POISONED - 1), 16 * POISONED):
        positions = samples.place(sample).positions
        tokens[positions] = random.integers(300, small_data.vocabulary, len(positions))
    prefix = tmp_path_factory.mktemp("poisoned") / "data"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.append_documents(tokens, list(good.sequence_lengths))
    words = [word for word in small_data.words if not word.startswith(("data.train", "checkpoint.interval"))]
    return (*words, f"data.train={prefix}", *RUN)


def train(folder: Path, *words: str, ranks: int = 1) -> Finished:
    return finish(folder, pretrain(*words, ranks=ranks))


def numbers(folder: Path, first: int = 1) -> list[dict[str, Any]]:
    found = [row for row in live_rows(rows(folder)) if row["kind"] == "train" and row["step"] >= first]
    return [{name: row[name] for name in SAME} for row in found]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if row.get("event") == name]


def statuses(folder: Path) -> dict[int, str]:
    found = sorted((run_folder(folder) / "checkpoints").glob("step-*"))
    return {int(path.name[5:]): read_manifest(path).status for path in found}


def state_files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the last checkpoint's files of fragments."""
    manifest = read_manifest(run_folder(folder) / "checkpoints" / f"step-{STEPS:08d}")
    fragments = [fragment for entry in manifest.tensors.values() for fragment in entry.fragments]
    assert "ema" in {fragment.kind for fragment in fragments}
    return {name: manifest.files[name].sha256 for name in {fragment.file for fragment in fragments}}


@pytest.fixture(scope="module")
def skipped(poisoned: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skip")
    finished = train(folder, *poisoned, "guard.policy=skip", ranks=2)
    assert finished.code == 0, finished.explain()
    return folder


def test_skip_trains_on(skipped: Path) -> None:
    (spike,) = events(skipped, "spike")
    assert (spike["at_step"], spike["quantity"], spike["decided"]) == (POISONED, "loss", "skip")
    assert [row["at_step"] for row in events(skipped, "skip")] == [POISONED]
    assert [row["step"] for row in numbers(skipped)] == list(range(1, STEPS + 1))
    assert statuses(skipped) == {5: "good", 10: "good", 15: "good", 18: "good"}
    manifest = read_manifest(run_folder(skipped) / "checkpoints" / f"step-{STEPS:08d}")
    assert manifest.counters["optimizer_step"] == STEPS - 1


def test_the_report_says_what_was_read_and_where_in_the_model(skipped: Path, small_data: SmallData) -> None:
    folder = run_folder(skipped) / "incidents"
    report = json.loads((folder / f"step-{POISONED:08d}.json").read_text())
    assert (report["samples"]["first"], report["samples"]["end"]) == (16 * (POISONED - 1), 16 * POISONED)
    assert report["loss"] > report["finding"]["limit"] > report["window"]["loss_median"]
    assert {piece["sample"] for piece in report["documents"]} == set(range(16 * (POISONED - 1), 16 * POISONED))
    assert all(piece["text"] for piece in report["documents"])
    norms = report["gradient_norms"]
    assert "layers.1.mlp.down.weight" in norms
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(report["grad_norm"] ** 2, rel=1e-4)
    readable = (folder / f"step-{POISONED:08d}.md").read_text()
    assert readable.startswith(f"# Step {POISONED}: loss ")
    assert "Decided: **skip**" in readable
    assert f"### Sample {16 * (POISONED - 1)}: document " in readable


@pytest.fixture(scope="module")
def attempt_after_rollback(poisoned: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollback")
    finished = train(folder, *poisoned, "guard.policy=rollback", ranks=2)
    assert finished.code == 0, finished.explain()
    return folder


def test_rollback_is_the_run_that_never_saw_that_data(
    poisoned: tuple[str, ...], skipped: Path, attempt_after_rollback: Path, tmp_path: Path
) -> None:
    """The other run is set past the data of steps 11 to 14 by hand, and judges nothing."""
    (back,) = events(attempt_after_rollback, "rollback")
    assert (back["step"], back["at_step"], back["samples_skipped"], back["attempt"]) == (10, POISONED, 4 * 16, 2)
    assert [row["attempt"] for row in train_rows(attempt_after_rollback)] == [1] * (POISONED - 1) + [2] * 8
    start = run_folder(skipped) / "checkpoints" / "step-00000010"
    by_hand = ("guard.policy=off", "--resume", str(start), "--skip-steps", "4")
    finished = train(tmp_path, *poisoned, *by_hand, ranks=2)
    assert finished.code == 0, finished.explain()
    assert not events(tmp_path, "spike")
    assert len(numbers(tmp_path)) == 8
    assert numbers(attempt_after_rollback, first=11) == numbers(tmp_path)
    assert state_files(attempt_after_rollback) == state_files(tmp_path)  # moments and averages of the weights as well


def test_a_resume_passes_over_the_same_data(poisoned: tuple[str, ...], attempt_after_rollback: Path) -> None:
    """Also one from the very checkpoint that the run was set back to."""
    before = numbers(attempt_after_rollback)
    manifest = read_manifest(run_folder(attempt_after_rollback) / "checkpoints" / "step-00000010")
    (segment,) = manifest.data_position.segments
    assert (segment.samples_consumed, segment.samples_skipped) == (160, 64)
    finished = train(attempt_after_rollback, *poisoned, "guard.policy=off", "--resume", "10", ranks=2)
    assert finished.code == 0, finished.explain()
    assert numbers(attempt_after_rollback) == before
    last = read_manifest(run_folder(attempt_after_rollback) / "checkpoints" / f"step-{STEPS:08d}")
    assert last.attempt == 3
    assert [part.samples_consumed for part in last.data_position.segments] == [160, 128]


def test_rollback_stays_in_the_attempt_that_met_the_spike(
    poisoned: tuple[str, ...], skipped: Path, tmp_path: Path
) -> None:
    """The folder has good checkpoints of an attempt that was left, and that came further."""
    shutil.copytree(skipped, tmp_path, dirs_exist_ok=True)
    finished = train(tmp_path, *poisoned, "guard.policy=rollback", "--resume", "10")
    assert finished.code == 0, finished.explain()
    (back,) = events(tmp_path, "rollback")
    assert (back["step"], back["at_step"], back["samples_skipped"]) == (10, POISONED, 4 * 16)
    assert [row["step"] for row in numbers(tmp_path, first=11)] == list(range(11, STEPS + 1))


def test_off_lets_it_pass_and_trusts_nothing_after_it(poisoned: tuple[str, ...], tmp_path: Path) -> None:
    finished = train(tmp_path, *poisoned, "guard.policy=off")
    assert finished.code == 0, finished.explain()
    assert [row["decided"] for row in events(tmp_path, "spike")] == ["let pass"]
    assert statuses(tmp_path) == {5: "good", 10: "good", 15: "suspect", 18: "suspect"}
    finished = train(tmp_path, *poisoned, "guard.policy=skip", "--resume", "auto")
    assert finished.code == 0, finished.explain()
    assert events(tmp_path, "resume")[-1]["step"] == 10, "the newest good one"
    assert statuses(tmp_path)[18] == "good"


def test_stop_says_why_and_what_to_do(poisoned: tuple[str, ...], tmp_path: Path) -> None:
    finished = train(tmp_path, *poisoned, "guard.policy=stop")
    assert finished.code == 1, finished.explain()
    assert f"step {POISONED}: loss " in finished.stderr
    report = run_folder(tmp_path) / "incidents" / f"step-{POISONED:08d}.md"
    assert str(report.relative_to(tmp_path)) in finished.stderr
    assert f"run.name=mine --resume 10 --skip-steps {POISONED - 10}`" in report.read_text()
    assert statuses(tmp_path) == {5: "good", 10: "good", 13: "suspect"}
    finished = train(tmp_path, *poisoned, "guard.policy=stop", "--resume", "10", "--skip-steps", str(POISONED - 10))
    assert finished.code == 0, finished.explain()


# Rank 1's loss of its fourth step is NaN: what a broken device gives.
NAN_ON_RANK_1 = """
import os, runpy, sys
import megalm.model.transformer as transformer

forward, calls = transformer.LanguageModel.forward, 0

def broken(self, *args, **options):
    global calls
    output = forward(self, *args, **options)
    calls += self.training
    if self.training and calls == 4 and os.environ["RANK"] == "1":
        return (output[0] * float("nan"), *output[1:])
    return output

transformer.LanguageModel.forward = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("policy", ["skip", "off"])
def test_a_nan_on_one_rank_is_everybodys(small_data: SmallData, tmp_path: Path, policy: str) -> None:
    script = tmp_path / "broken.py"
    script.write_text(NAN_ON_RANK_1)
    words = (*small_data.words, "train.steps=7", f"guard.policy={policy}")
    launch, *command = pretrain(*words, ranks=2)
    finished = finish(tmp_path, [launch, script, *command])
    (spike,) = events(tmp_path, "spike")
    assert spike["at_step"] == 4
    assert np.isnan(spike["loss"])
    if policy == "off":
        assert finished.code == 1, finished.explain()
        (line,) = own_lines(finished.stderr)
        assert "step 4: loss nan" in line
        return
    assert finished.code == 0, finished.explain()
    after = [row["loss"] for row in train_rows(tmp_path) if row["step"] > 4]
    assert len(after) == 3
    assert np.isfinite(after).all(), "nothing of it is in the weights of any rank"
