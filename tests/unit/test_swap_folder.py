"""The folder that optimizer states are swapped to: whose it is, and what becomes of those that were left."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from megalm.engine import nvme_offload
from megalm.engine.nvme_offload import SwapFolder
from megalm.errors import ConfigError

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
    with pytest.raises(ConfigError, match=r"nvme_path=.*\d GiB.* 931,3\d\d\.\d GiB"):
        SwapFolder(str(tmp_path), 10**15)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"nvme_path=.*/file .*\((File exists|Not a directory)\)"):
        SwapFolder(str(tmp_path / "file"), 0)
    monkeypatch.undo()
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # cannot be opened like that, as on a file system in memory
    with pytest.raises(ConfigError, match=rf"nvme_path={tmp_path} .*\(.+\)"):
        SwapFolder(str(tmp_path), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
