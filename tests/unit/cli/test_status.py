"""`megalm status`: the state of a run from the ends of its files, with and without its job in the queue."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.cli.jobs import status
from megalm.cli.main import main
from megalm.cluster.slurm_client import QueuedJob
from megalm.runs.metrics_log import MetricsWriter
from megalm.runs.run_lock import is_held
from megalm.runs.run_status import read_status
from tests.messages import assert_names

JOB = QueuedJob("12", "12", "RUNNING", "None", "", "n[1-2]", "", "mine")


def write_run(folder: Path, *events: dict[str, Any], steps: int = 10, attempt: int = 1, first: int = 1) -> Path:
    """A run of 100 steps planned that has trained some, two seconds a step by the clock; `events` follow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{}\n")
    (folder / "environment.json").write_text(json.dumps({"planned_steps": 100, "job": "12", "host": "n1"}))
    with MetricsWriter(folder / "metrics.jsonl") as metrics:
        metrics.row("event", event="start" if attempt == 1 else "resume", step=first - 1, attempt=attempt)
        for step in range(first, first + steps):
            numbers = {"loss": 5 - step / 10, "tokens_per_second": 1000.0 + step, "mfu": 0.5, "step_seconds": 1.0}
            metrics.row("train", step=step, attempt=attempt, **numbers, time=1e9 + 2 * step)
        for event in events:
            metrics.row("event", attempt=attempt, **event)
    return folder


def hold(folder: Path, host: str | None = None, process: int | None = None) -> None:
    holder = f"host {host or platform.node()}, process {process or os.getpid()}; beat 3\n"
    (folder / "lock").write_text(holder)


def end(state: str, **more: Any) -> dict[str, Any]:
    return {"event": "end", "status": state, "step": 10, **more}


def test_the_numbers_of_a_run_that_trains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", {"event": "checkpoint", "step": 10, "saved_step": 10}, {"event": "traffic"})
    hold(run)
    found = read_status(run)
    assert (found.state, found.step, found.steps, found.attempts, found.job) == ("running", 10, 100, 1, "12")
    assert (found.loss, found.tokens_per_second, found.mfu) == (4.0, pytest.approx(1005.5), 0.5)
    assert found.eta_seconds == pytest.approx(90 * 2.0), "by the clock: validation and saves count"
    assert found.event is not None
    assert found.event["event"] == "checkpoint"
    facts = json.loads((run / "environment.json").read_text())
    stages = [[1, 8, 64], [10, 16, 64], [51, 32, 64]]  # the steps at hand are of 8 sequences, but for the last one
    (run / "environment.json").write_text(json.dumps({**facts, "training_stages": stages}))
    left, lately = 40 * 16 + 50 * 32, (8 * 8 + 16) / 9
    assert read_status(run).eta_seconds == pytest.approx(2.0 * left / lately)


@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
def test_the_state_of_a_run_that_has_ended(tmp_path: Path, state: str) -> None:
    run = write_run(tmp_path / "mine", end(state))
    (run / "lock").write_text("")
    assert (read_status(run).state, read_status(run).eta_seconds) == (state, None)


def test_a_run_without_an_end_has_failed_unless_somebody_holds_its_lock(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    assert read_status(run).state == "failed"
    hold(run, host="elsewhere", process=1)
    assert read_status(run).state == "running"
    changed = (run / "lock").stat().st_mtime
    assert is_held(run, changed + 60)
    assert not is_held(run, changed + 100), "its holder shows no more signs of life"
    hold(run, process=2**22 + 1)
    assert not is_held(run), "the process has gone from this machine"


def test_rows_that_a_resume_withdrew_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", end("stopped"))
    write_run(run, attempt=2, first=6, steps=0)
    hold(run)
    assert (read_status(run).step, read_status(run).attempts) == (5, 2)
    write_run(run, attempt=3, first=6, steps=2)
    assert (read_status(run).step, read_status(run).loss) == (7, pytest.approx(4.3))


def test_the_node_that_failed_is_read_from_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", end("failed"))
    (run / "failures").mkdir()
    report = "exit code 1\nmegalm: error: rank 3 on gpu-n2 (cuda:3) has vanished, ranks 4-5 on n7 too\nmore\n"
    (run / "failures" / "attempt-1.txt").write_text(report)
    assert read_status(run).failed_hosts == ("gpu-n2", "n7")
    (run / "failures" / "attempt-2.txt").write_text("exit code 1\nmegalm: error: rank 1 failed:\n  a\nKeyError: 'x'\n")
    found = read_status(run)  # the second attempt has failed before its first row
    assert (found.attempts, found.failed_hosts) == (2, ())
    assert_names(found.failure, "rank 1", "KeyError")


def test_only_the_ends_of_long_files_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    rows = [{"kind": "train", "time": 1.0, "step": step, "loss": 1.0, "attempt": 1} for step in range(2000)]
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(2**35)  # a hole: to read it all would take minutes
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    hold(run)
    assert read_status(run).step == 1999


def overview(monkeypatch: pytest.MonkeyPatch, root: Path, *jobs: QueuedJob) -> dict[str, status.Line]:
    monkeypatch.setattr(status, "_jobs", lambda: [replace(job, folder=str(root.parent)) for job in jobs])
    return {line.name: line for line in status.overview(None, root)}


def test_the_queue_says_what_a_folder_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    run = write_run(root / "mine", end("stopped"))
    waiting = replace(JOB, state="PENDING", reason="Priority", start="2026-11-29T02:00:00")
    assert overview(monkeypatch, root)["mine"].state == "stopped"
    assert overview(monkeypatch, root, JOB)["mine"].state == "running", "requeued, and about to resume"
    queued = overview(monkeypatch, root, waiting)["mine"]
    assert queued.state == "queued"
    assert_names(status._text([queued], 1e9), "Priority", "2026-11-29")
    other = replace(waiting, number="13", task="13_[2-9]", name="next")
    both = overview(monkeypatch, root, other)
    chain = [replace(JOB, task="12_1"), replace(waiting, number="12", task="12_[2-9%1]")]
    assert overview(monkeypatch, root, *chain).keys() == {"mine"}
    assert status._cells(overview(monkeypatch, root, *reversed(chain))["mine"], 1e9)[2] == "12_1"
    assert (both["mine"].state, both["next"].state, both["next"].run) == ("stopped", "queued", None)
    write_run(run, end("finished"), attempt=2, first=11)
    assert overview(monkeypatch, root, JOB)["mine"].state == "finished", "its job is about to end"
    assert overview(monkeypatch, root, replace(waiting, number="14"))["mine"].state == "queued", "to train longer"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_jobs", list)
    root = tmp_path / "runs"
    write_run(root / "one", end("finished"))
    write_run(root / "two")
    (root / "no run").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["status", "--root", str(root), "--watch"])  # ends by itself: nothing trains
    assert not left.value.code
    out = capsys.readouterr().out
    assert_names(out, "one", "finished", "two", "failed", "10 of 100", "50.0%")
    assert "no run" not in out
    with pytest.raises(SystemExit):
        main(["status", str(root / "two"), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["step"], found["state"], found["slurm"]) == ("two", 10, "failed", None)
