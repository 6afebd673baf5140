"""One job at a time in a run folder: on this machine, on another one, and where the file system knows no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.runs.run_lock import RunLock
from tests.messages import assert_names

BEAT_SECONDS = 0.1
# The arguments: folder, the machine's name, whether its file system has locks.
HOLDER = f"""
import errno, fcntl, platform, sys, time
from pathlib import Path
from megalm.runs.run_lock import RunLock

def refuse(*_):
    raise OSError(errno.EOPNOTSUPP, "no locks here")

platform.node = lambda: sys.argv[2]
if sys.argv[3] == "without locks":
    fcntl.flock = refuse
lock = RunLock(Path(sys.argv[1]), {BEAT_SECONDS})
lock.take()
print("taken", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path, host: str, locks: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder), host, locks]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def take_and_release(folder: Path, beat_seconds: float = BEAT_SECONDS) -> None:
    lock = RunLock(folder, beat_seconds)
    lock.take()
    lock.release()


@pytest.mark.parametrize(
    ("host", "locks"), [("node17", "with locks"), ("node18", "with locks"), ("node18", "without locks")]
)
def test_one_job_at_a_time(tmp_path: Path, host: str, locks: str) -> None:
    """The second is told who holds the lock; a holder that is killed holds nothing."""
    with holder(tmp_path, host, locks) as process:
        for _ in range(2):
            with pytest.raises(ConfigError) as refused:
                RunLock(tmp_path, BEAT_SECONDS).take()
            assert_names(refused.value, tmp_path, host, process.pid, "run.name")
        process.kill()
        process.wait()
        take_and_release(tmp_path)


def test_without_locks_two_jobs_of_a_machine_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with holder(tmp_path, platform.node(), "without locks") as process:
        with pytest.raises(ConfigError) as refused:
            RunLock(tmp_path, BEAT_SECONDS).take()
        assert_names(refused.value, process.pid)
        process.kill()
        process.wait()
        take_and_release(tmp_path)


def test_a_folder_that_cannot_be_written_is_reported_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError) as refused:
        RunLock(tmp_path).take()
    assert_names(refused.value, tmp_path / "lock", os.strerror(errno.EISDIR), "run.name")


def test_a_job_that_left_in_peace_is_not_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path, "there", "without locks") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "released\n"
        start = time.monotonic()
        take_and_release(tmp_path, beat_seconds=60)
        assert time.monotonic() - start < 30


def test_a_refused_job_leaves_the_lock_as_it_was(tmp_path: Path) -> None:
    with holder(tmp_path, "here", "with locks") as process:
        refused = RunLock(tmp_path)
        with pytest.raises(ConfigError):
            refused.take()
        refused.release()
        assert_names((tmp_path / "lock").read_text(), process.pid)


def test_a_suspended_holder_finds_who_took_its_lock(tmp_path: Path) -> None:
    """Without kernel locks a job that is suspended for long counts as dead."""
    lock = RunLock(tmp_path, BEAT_SECONDS)
    lock.take()
    assert lock.lost() is None
    (tmp_path / "lock").write_text("host node17, process 12; beat 3\n")
    deadline = time.monotonic() + 20
    while (lost := lock.lost()) is None:
        assert time.monotonic() < deadline
        time.sleep(BEAT_SECONDS)
    assert_names(lost.why, "node17", 12)
    assert lost.place == tmp_path
    assert "node17" in (tmp_path / "lock").read_text(), "it is theirs"
    lock.release()
