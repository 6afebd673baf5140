"""Kept arrays: made by one process while others wait, also where the one that makes them is killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from megalm.data.sampling import index_cache
from megalm.data.sampling.index_cache import ArrayCache, Arrays
from megalm.errors import DataError
from megalm.utils.atomic_files import temporary_name
from tests.messages import assert_names

SPAWN = multiprocessing.get_context("spawn")
FACTS = ("squares", 1)


def make(folder: Path, processes: int) -> Arrays:
    """Ends when so many have come and had time to find nothing there; leaves a note of who made it."""
    note(folder, "makers")
    wait_for(folder, "came", processes)
    time.sleep(0.1)
    return {"squares": np.arange(1000) ** 2, "cubes": np.arange(10) ** 3}


def open_cached(folder: Path, processes: int) -> None:
    note(folder, "came")
    arrays = ArrayCache(folder / "cache").get(FACTS, lambda: make(folder, processes))
    content = f"{arrays['squares'].sum()} {arrays['cubes'].sum()} {type(arrays['squares']).__name__}"
    (folder / f"read-{os.getpid()}").write_text(content)


def start(folder: Path, processes: int) -> BaseProcess:
    process = SPAWN.Process(target=open_cached, args=(folder, processes), daemon=True)
    process.start()
    return process


def note(folder: Path, name: str) -> None:
    with (folder / name).open("a") as notes:
        notes.write(f"{os.getpid()}\n")


def noted(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split() if (folder / name).exists() else []


def wait_for(folder: Path, name: str, count: int) -> None:
    while len(noted(folder, name)) < count:
        time.sleep(0.01)


def read_by(folder: Path, process: BaseProcess) -> str:
    return (folder / f"read-{process.pid}").read_text()


EXPECTED = f"{(np.arange(1000) ** 2).sum()} {(np.arange(10) ** 3).sum()} memmap"


def test_several_processes_make_it_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 3) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [read_by(tmp_path, process) for process in processes] == [EXPECTED] * 3
    assert len(noted(tmp_path, "makers")) == 1


def test_the_maker_is_killed_and_another_takes_over(tmp_path: Path) -> None:
    first = start(tmp_path, 600)  # never so many: it is killed while it makes
    wait_for(tmp_path, "makers", 1)
    others = [start(tmp_path, 0) for _ in range(2)]
    wait_for(tmp_path, "came", 3)
    time.sleep(0.1)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    for process in (first, *others):
        process.join(60)
    assert [read_by(tmp_path, process) for process in others] == [EXPECTED] * 2
    assert len(noted(tmp_path, "makers")) == 2  # the one that was killed, and one of the two


def test_what_a_killed_maker_left_is_cleared_later(tmp_path: Path) -> None:
    ArrayCache(tmp_path).get(FACTS, lambda: {"a": np.arange(3)})
    (folder,) = tmp_path.iterdir()
    old, young = temporary_name(folder / "a.npy"), temporary_name(folder / "b.npy")
    old.write_bytes(b"half")
    os.utime(old, (time.time() - index_cache._ABANDONED_SECONDS - 60,) * 2)
    young.write_bytes(b"of a process that writes now")
    (folder / "a.npy").write_bytes(b"cut short")
    assert ArrayCache(tmp_path).get(FACTS, lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    assert not old.exists()
    assert young.exists()


def test_without_locks_it_is_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert ArrayCache(tmp_path).get(FACTS, lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """By a limit of the system; NumPy's own error has words, and no number of the system's."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError) as error:
            ArrayCache(tmp_path).get(("facts",), lambda: {"a": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_names(error.value, tmp_path, 100000)
    assert not list(tmp_path.glob("*/*.np*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        ArrayCache(tmp_path / "file").get(FACTS, lambda: {"a": np.arange(3)})
    assert_names(error.value, tmp_path / "file", "data.cache", "MEGALM_CACHE")
