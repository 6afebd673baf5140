"""One lock at a time: two open files of one process contend as those of two processes do."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from megalm.utils import file_lock
from megalm.utils.file_lock import take_lock
from tests.messages import assert_names


def test_a_held_lock_is_refused_at_its_deadline_and_its_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with take_lock(path) as held:
        os.write(held.descriptor, b"host node17")
        start = time.monotonic()
        with pytest.raises(BlockingIOError) as refused:
            take_lock(path, wait_seconds=0.2)
        assert time.monotonic() - start >= 0.2
        assert_names(refused.value, path)
    with take_lock(path, wait_seconds=0.0) as held:
        assert held.in_kernel
        assert os.read(held.descriptor, 100) == b"host node17"


def test_a_waiting_caller_is_called_once_and_gets_the_lock(tmp_path: Path) -> None:
    held, waits = take_lock(tmp_path / "lock"), list[float]()
    threading.Timer(0.4, held.release).start()
    with take_lock(tmp_path / "lock", on_wait=lambda: waits.append(time.monotonic())):
        assert len(waits) == 1
        assert time.monotonic() - waits[0] >= 0.2


def test_an_inherited_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    """A forked child has a copy of the open file, as `dup` makes one."""
    held = take_lock(tmp_path / "lock")
    inherited = os.dup(held.descriptor)
    held.release()
    with pytest.raises(BlockingIOError):
        take_lock(tmp_path / "lock", wait_seconds=0.0)
    os.close(inherited)
    take_lock(tmp_path / "lock", wait_seconds=0.0).release()


def test_a_file_deleted_by_its_holder_is_locked_anew(tmp_path: Path) -> None:
    """The file is deleted between our opening it and its lock: another process may lock a new one of that name."""
    path, holders = tmp_path / "lock", [take_lock(tmp_path / "lock")]
    real = fcntl.flock

    def delete_first(descriptor: int, operation: int) -> None:
        while holders:
            path.unlink()
            holders.pop().release()
        real(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", delete_first)
        ours = take_lock(path, wait_seconds=0.0)
    with ours, pytest.raises(BlockingIOError):
        take_lock(path, wait_seconds=0.0)


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(FileNotFoundError):
        take_lock(folder, is_folder=True)
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        take_lock(folder)
    with take_lock(folder, is_folder=True):
        with pytest.raises(BlockingIOError):
            take_lock(folder, wait_seconds=0.0, is_folder=True)
        shutil.rmtree(folder)
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_each_caller_proceeds_and_one_is_reported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_lock, "_REPORTED_DEVICES", set())
    monkeypatch.setattr(fcntl, "flock", flock)
    with take_lock(tmp_path / "lock") as first, take_lock(tmp_path / "lock"), take_lock(tmp_path / "other"):
        assert not first.in_kernel
    (warning,) = caplog.messages
    assert_names(warning, tmp_path / "lock", os.strerror(number))
