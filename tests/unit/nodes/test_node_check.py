"""When a job leaves its bad nodes: on one rank that stands for all, with stated findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.nodes.node_check import EXCLUDE_FILE, _why_stay
from megalm.runs.run_folder import RunFolder
from megalm.utils.atomic_files import write_json
from tests.messages import assert_names


def left(*jobs: str, excluded: bool = True) -> dict[str, object]:
    return {"nodes": [{"time": f"{number}", "job": job, "excluded": excluded} for number, job in enumerate(jobs)]}


def test_a_job_leaves_nodes_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv(EXCLUDE_FILE, raising=False)
    assert_names(_why_stay(folder, {"n2"}, {"n1", "n2"}), "slurm.exclude_bad", "slurm/train.sh")
    monkeypatch.setenv(EXCLUDE_FILE, "there")
    assert _why_stay(folder, {"n2"}, {"n1", "n2"}) == ""
    for known in (left("7", "7"), left("6", "7", "7"), left("7", "7", "7", excluded=False)):
        write_json(folder.bad_nodes, known)
        assert _why_stay(folder, {"n2"}, {"n1", "n2"}) == ""
    write_json(folder.bad_nodes, left("7", "6", "7", "7"))
    assert_names(_why_stay(folder, {"n2"}, {"n1", "n2"}), "slurm.exclude_bad", 3)


def test_a_job_does_not_leave_all_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXCLUDE_FILE, "there")
    assert_names(_why_stay(RunFolder(tmp_path), {"n1", "n2"}, {"n1", "n2"}), "slurm.exclude_bad")


def test_a_run_that_only_left_nodes_has_not_started(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.never_started
    write_json(folder.bad_nodes, left("7"))
    assert folder.never_started
    folder.metrics.touch()
    assert not folder.never_started
