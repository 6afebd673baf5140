"""The page that a run leaves costs it nothing: what fails, or takes too long, is a line."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from megalm.runs.run_folder import RunFolder
from megalm.train import run_summary
from megalm.train.console import RunConsole
from tests.messages import assert_names


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "event", "event": "start", "time": 1.0}) + "\n")
    return RunFolder(tmp_path)


def test_it_is_in_the_run_folder(folder: RunFolder) -> None:
    assert run_summary.write_report_page(folder, RunConsole(active=True)) == folder.path / "report.html"
    assert (folder.path / "report.html").is_file()


def test_what_cannot_be_read_is_a_line(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.metrics.write_text("damaged\nrows\n")
    assert run_summary.write_report_page(folder, RunConsole(active=True)) is None
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert_names(told, folder.metrics, f"megalm report {folder.path}")


def test_any_failure_at_all_is_a_line(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Path:
        raise ZeroDivisionError

    monkeypatch.setattr(run_summary, "write_report", fail)
    assert run_summary.write_report_page(folder, RunConsole(active=True)) is None
    assert_names(capsys.readouterr().out, "ZeroDivisionError", f"megalm report {folder.path}")


def test_it_is_not_waited_for_without_end(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(run_summary, "write_report", lambda _: done.wait(60))
    begun = time.monotonic()
    assert run_summary.write_report_page(folder, RunConsole(active=True), patience_seconds=0.1) is None
    assert time.monotonic() - begun < 30
    done.set()
    assert_names(capsys.readouterr().out, "0 s", f"megalm report {folder.path}")
