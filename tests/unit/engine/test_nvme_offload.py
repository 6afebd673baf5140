"""The folder that optimizer states are swapped to: whose it is, and what becomes of those that were left."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest

from megalm.engine import nvme_offload
from megalm.engine.nvme_offload import SwapFolder
from megalm.errors import ConfigError
from tests.messages import assert_names

NOBODY = 4_194_305  # no process has so high a number


def _folder(base: Path, process: int) -> Path:
    found = base / f"megalm-{socket.gethostname()}-{process}-abc"
    found.mkdir()
    (found / "states").write_bytes(b"8")
    return found


@pytest.fixture(autouse=True)
def direct_io(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever file system the tests run on."""
    try:
        os.close(os.open(tmp_path / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        monkeypatch.setattr(nvme_offload, "_require_direct_io", lambda folder: None)
    (tmp_path / "direct").unlink()


def test_what_is_in_use_stays_and_what_was_left_goes(tmp_path: Path) -> None:
    """The process of another container has a number that nobody has here; that of a dead one may be taken again."""
    in_use, left, elsewhere = _folder(tmp_path, NOBODY), _folder(tmp_path, os.getpid()), tmp_path / "megalm-other-1-abc"
    elsewhere.mkdir()
    handle = os.open(in_use, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    own = SwapFolder(str(tmp_path), 0)
    assert (in_use / "states").is_file()
    assert not left.exists()
    assert elsewhere.is_dir(), "another machine's may be in use"
    os.close(handle)
    second = SwapFolder(str(tmp_path), 0)
    assert not in_use.exists()
    assert own.path.is_dir()
    for folder in (own, second):
        folder.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["megalm-other-1-abc"]


def test_refused_in_a_line_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, needed: int) -> str:
        with pytest.raises(ConfigError) as caught:
            SwapFolder(str(path), needed)
        return str(caught.value)

    assert_names(refused(tmp_path, 10**15), f"offload_optimizer.nvme_path={tmp_path}", "909.5 TiB")
    (tmp_path / "file").touch()
    assert_names(refused(tmp_path / "file", 0), f"offload_optimizer.nvme_path={tmp_path}/file")
    monkeypatch.undo()
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # cannot be opened like that, as on a file system in memory
    assert_names(refused(tmp_path, 0), f"offload_optimizer.nvme_path={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_locks_what_was_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then whether its process is alive."""

    def flock(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    left = _folder(tmp_path, NOBODY)
    monkeypatch.setattr(fcntl, "flock", flock)
    own = SwapFolder(str(tmp_path), 0)
    assert (left / "states").is_file()
    own.remove()
    assert list(tmp_path.iterdir()) == [left]
