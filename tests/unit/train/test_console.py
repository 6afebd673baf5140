"""log.txt while a run is going on: deleted, or on a full disk."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.train.console import RunConsole
from tests.messages import assert_names


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    logger = logging.getLogger("megalm")
    before, propagate = list(logger.handlers), logger.propagate
    yield tmp_path / "run" / "log.txt"
    for handler in logger.handlers[len(before) :]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = propagate


def test_a_log_that_is_deleted_is_written_anew(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_file.parent.mkdir()
    console = RunConsole(True, log_file)
    console.info("the first")
    log_file.unlink()
    console.reopen_log_if_gone()
    console.info("the second")
    console.reopen_log_if_gone()
    console.info("the third")
    assert [line.split()[-1] for line in log_file.read_text().splitlines()] == ["second", "third"]
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert_names(warning, log_file)


def test_the_log_of_a_folder_that_is_moved_moves_along(log_file: Path) -> None:
    log_file.parent.mkdir()
    console = RunConsole(True, log_file)
    log_file.parent.rename(log_file.parent.with_name("elsewhere"))
    console.info("the first")
    assert not log_file.parent.exists()
    assert "the first" in (log_file.parent.with_name("elsewhere") / log_file.name).read_text()


def test_a_full_disk_costs_one_line(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_file.parent.mkdir()
    console = RunConsole(True, log_file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for number in range(3):
            console.info(f"line {number}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert err == ""
    assert_names(next(line for line in out.splitlines() if "WARNING" in line), log_file)
    console.info("there is room again")
    assert "there is room again" in log_file.read_text()
