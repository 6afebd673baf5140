"""What people do to the folder of a run that trains: it is moved, its lock, its metrics and its log are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.checkpoint.discovery import complete_checkpoints
from megalm.errors import EXIT_START_AGAIN
from megalm.runs.metrics_log import read_metrics
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, job, own_lines, pretrain
from tests.messages import assert_names

pytestmark = pytest.mark.e2e


def test_a_run_whose_folder_is_moved_is_saved_there_and_resumes(small_data: SmallData, tmp_path: Path) -> None:
    words = small_data.changed("run.name=mine", "schedule.kind=constant", "checkpoint.interval_steps=50")
    mine, moved = tmp_path / "runs" / "mine", tmp_path / "runs" / "moved"
    with job(tmp_path, pretrain(*words, "checkpoint.async=true", "train.steps=1000000", ranks=2)) as started:
        started.wait_for_step(3)
        mine.rename(moved)
        finished = started.wait()
    assert finished.code == EXIT_START_AGAIN, finished.explain()
    assert own_lines(finished.stderr) == []
    assert_names(finished.stdout, mine.relative_to(tmp_path), moved)
    assert not mine.exists()
    step = [row for row in read_metrics(moved / "metrics.jsonl") if row["kind"] == "train"][-1]["step"]
    assert complete_checkpoints(moved / "checkpoints")[-1].name == f"step-{step:08d}"
    command = pretrain("run.name=moved", "--resume", "auto", f"train.steps={step + 2}", ranks=2)
    finished = finish(tmp_path, command)
    assert finished.code == 0, finished.explain()
    steps = [row["step"] for row in read_metrics(moved / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, step + 3))
