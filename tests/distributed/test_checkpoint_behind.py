"""Writing behind training: the steps go on, nobody is told too early, and one rank's failure is everybody's."""

from __future__ import annotations

import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint import save_transaction as saving
from megalm.checkpoint.checkpointer import CheckpointWriter, Saved
from megalm.checkpoint.discovery import complete_checkpoints
from megalm.checkpoint.retention import Retention
from megalm.errors import TrainingError
from tests.checkpoint_files import assert_holds, fragments
from tests.kill_points import left_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Brake:
    """Holds this rank's writing thread before it writes."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self._write = saving.write_shard
        saving.write_shard = self._wait_and_write  # the real one, a moment later

    def _wait_and_write(self, *arguments: Any) -> Any:
        assert self.released.wait(60)
        return self._write(*arguments)


def _writer(comm: Any, place: Path) -> CheckpointWriter:
    return CheckpointWriter(place, Retention(), comm, asynchronous=True)


def _begin(writer: CheckpointWriter, comm: Any, step: int) -> list[Any]:
    parts = fragments(step, comm.rank, comm.size)
    writer.begin(step, parts, {"attempt": 1}, [])
    return parts


def _until_complete(writer: CheckpointWriter) -> list[Saved]:
    for _ in range(2000):
        if saved := writer.completed():
            return saved
        time.sleep(0.005)  # a training step
    raise AssertionError("never complete")


def _failure(work: Callable[[], object]) -> str:
    try:
        work()
    except TrainingError as error:
        return str(error)
    return "no error"


def _behind(comm: Any, device: Any, place: Path) -> dict[str, Any]:
    brake, writer, seen = Brake(), _writer(comm, place), {}
    parts = _begin(writer, comm, 10)
    for part in parts:
        part.tensor.fill_(-1.0)  # the next training step
    seen["while nobody has written"] = (writer.completed(), complete_checkpoints(place))
    if comm.rank == 0:
        brake.released.set()
        time.sleep(1.0)
    comm.barrier()
    seen["while rank 1 has not"] = (writer.completed(), complete_checkpoints(place))
    brake.released.set()
    seen["saved"] = _until_complete(writer)
    seen["after"] = writer.completed()

    brake.released.clear()
    _begin(writer, comm, 20)
    start = time.perf_counter()
    threading.Timer(0.3, brake.released.set).start()
    _begin(writer, comm, 30)  # waits for 20
    seen["waited"] = time.perf_counter() - start
    seen["both"] = [saved.step for saved in writer.completed(wait=True)]
    return seen


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    for seen in run_ranks(2, _behind, tmp_path):
        assert seen["while nobody has written"] == seen["while rank 1 has not"] == ([], [])
        (saved,) = seen["saved"]
        assert (saved.path.name, saved.step) == ("step-00000010", 10)
        assert saved.stall_seconds < 1.0 <= saved.write_seconds
        assert seen["after"] == []
        assert seen["waited"] > 0.25
        assert seen["both"] == [20, 30]
    for step in (10, 20, 30):
        assert_holds(tmp_path / f"step-{step:08d}", step)


def _too_long(comm: Any, device: Any, place: Path, behind: bool) -> tuple[str, list[str], int]:
    """Rank 1 may not write files as long as its own."""
    writer = CheckpointWriter(place, Retention(), comm, behind)
    _begin(writer, comm, 10)
    writer.completed(wait=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if comm.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    def save() -> None:
        _begin(writer, comm, 20)
        writer.completed(wait=True)

    told = _failure(save)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    comm.barrier()
    left = left_of(place)
    _begin(writer, comm, 20)  # once there is room again
    return told, left, writer.completed(wait=True)[0].step


@pytest.mark.parametrize("behind", [False, True])
def test_one_rank_that_cannot_write_fails_all_together(tmp_path: Path, behind: bool) -> None:
    for told, left, step in run_ranks(2, _too_long, tmp_path, behind):
        assert all(word in told for word in ("step-00000020", "rank 1", "File too large")), told
        assert left == ["latest", "step-00000010"]
        assert step == 20
    assert_holds(tmp_path / "step-00000010", 10)
    assert_holds(tmp_path / "step-00000020", 20)


def _fills_up(comm: Any, device: Any, disk: Path) -> tuple[str, str, int]:
    """Somebody else takes the space between the check and the write."""
    brake, writer, other = Brake(), _writer(comm, disk / "run"), disk / "other"
    brake.released.set()
    _begin(writer, comm, 10)
    writer.completed(wait=True)
    brake.released.clear()
    _begin(writer, comm, 20)
    if comm.rank == 0:
        with pytest.raises(OSError, match="No space left"):
            other.write_bytes(b"x" * (2 << 20))
    comm.barrier()
    brake.released.set()
    midway = _failure(lambda: writer.completed(wait=True))
    before = _failure(lambda: _begin(writer, comm, 20))
    comm.barrier()
    other.unlink(missing_ok=True)
    comm.barrier()
    _begin(writer, comm, 30)
    return midway, before, writer.completed(wait=True)[0].step


@pytest.fixture
def small_disk(mounted_disk: Callable[[str], Path]) -> Path:
    return mounted_disk("1m")


def test_a_disk_that_fills_up_midway(small_disk: Path) -> None:
    for midway, before, step in run_ranks(2, _fills_up, small_disk):
        assert all(word in midway for word in ("step-00000020", "rank", "No space left on device")), midway
        assert re.search(r"/run .*\d (B|[KM]iB) .*\d [KM]iB", before), "what is free, and what is needed"
        assert step == 30
    assert left_of(small_disk / "run") == ["latest", "step-00000010", "step-00000030"]
    assert_holds(small_disk / "run" / "step-00000010", 10)
