"""The page that a run leaves costs it nothing: what fails, or takes too long, is a line."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megalm.train import page
from megalm.train.report import Reporter
from megalm.train.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "event", "event": "start", "time": 1.0}) + "\n")
    return RunFolder(tmp_path)


def test_it_is_in_the_run_folder(folder: RunFolder) -> None:
    assert page.leave_page(folder, Reporter(active=True)) == folder.path / "report.html"
    assert (folder.path / "report.html").is_file()


def test_what_cannot_be_read_is_a_line(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.metrics.write_text("damaged\nrows\n")
    assert page.leave_page(folder, Reporter(active=True)) is None
    told = capsys.readouterr().out
    assert told.startswith("no page about this run (")
    assert told.count("\n") == 1
    assert f"megalm report {folder.path}" in told


def test_any_failure_at_all_is_a_line(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(page, "write_report", fail)
    assert page.leave_page(folder, Reporter(active=True)) is None
    assert "no page about this run (ZeroDivisionError)" in capsys.readouterr().out


def test_it_is_not_waited_for_without_end(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(page, "write_report", lambda _: done.wait(60))
    begun = time.monotonic()
    assert page.leave_page(folder, Reporter(active=True), patience_seconds=0.1) is None
    assert time.monotonic() - begun < 30
    done.set()
    assert "not done within 0 s" in capsys.readouterr().out
