"""A job that went on from an earlier step, or from another run, and was killed before it saved anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megalm.checkpoint.manifest import read_manifest
from tests.e2e.conftest import SIX_STEPS, SmallData
from tests.e2e.jobs import PRETRAIN, finish, job, launcher, pretrain, rows, run_folder, until

pytestmark = pytest.mark.e2e

MORE = 100  # steps: enough to be killed among them
AUTO = [*launcher("forked"), PRETRAIN, "run.name=mine", "--resume", "auto"]


def train_and_kill(folder: Path, *command: str | Path, attempt: int) -> dict[int, float]:
    """Losses by step of what was trained and lost."""
    with job(folder, [*launcher("forked"), PRETRAIN, *command]) as started:
        until(lambda: len(losses(folder, attempt)) > 2, 300)
        started.kill()
        started.wait()
    lost = losses(folder, attempt)
    assert len(lost) < MORE
    return lost


def losses(folder: Path, attempt: int) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if row["kind"] == "train" and row["attempt"] == attempt}


def test_an_extension_past_a_piece_of_data(six_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(six_steps, tmp_path, dirs_exist_ok=True)
    flags = ("--resume", "3", "--skip-steps", "1", "--extend-steps", str(MORE), "checkpoint.interval_steps=1000")
    lost = train_and_kill(tmp_path, "run.name=mine", *flags, attempt=2)
    again = finish(tmp_path, AUTO)
    assert again.code == 0, again.explain()
    found = losses(tmp_path, 3)
    assert list(found) == list(range(4, 4 + MORE)), "not from step 6, which is another attempt's"
    assert {step: found[step] for step in lost} == lost
    last = read_manifest(run_folder(tmp_path) / "checkpoints" / f"step-{3 + MORE:08d}")
    assert [part.samples_skipped for part in last.data_position.segments] == [16, 0]
    assert [part.steps for part in last.schedule.segments] == [6, MORE]


def test_a_new_run_from_another_one_s_weights(small_data: SmallData, six_steps: Path, tmp_path: Path) -> None:
    start = run_folder(six_steps) / "checkpoints" / "step-00000006"
    flags = ("--resume", start, "--extend-steps", str(MORE), "--extend-strategy", "weights")
    command = pretrain(*small_data.changed(*SIX_STEPS, "checkpoint.interval_steps=1000"))[2:]
    lost = train_and_kill(tmp_path, *command, *flags, attempt=1)
    again = finish(tmp_path, AUTO)
    assert again.code == 0, again.explain()
    assert str(start) in again.stdout, again.explain()
    found = losses(tmp_path, 2)
    assert list(found) == list(range(1, 1 + MORE))
    assert {step: found[step] for step in lost} == lost
