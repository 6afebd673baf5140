"""Times saving and loading a checkpoint against what the disk does with the same bytes, within one run.

    python -m benchmarks checkpoint [--megabytes 1024] [--folder .] [--repeat 3] [--parameters 300]
    torchrun --nproc_per_node 2 -m benchmarks checkpoint ...

Every rank's part is as large as --megabytes. The disk is measured by files of the same sizes, written in 16 MB blocks
and fsynced, by all ranks at once, in turn with the saves, so that both meet the same machine; the page cache is dropped
from the files before they are read, where the system lets us. Medians are printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.checkpointer import CheckpointWriter
from megalm.checkpoint.retention import Retention
from megalm.checkpoint.shard_spec import Fragment, FragmentKey, FragmentKind
from megalm.engine.device import claim_device
from megalm.engine.distributed import DistributedCommunicator, start_distributed
from megalm.rank_environment import rank_facts
from megalm.train.lifecycle.shutdown import exit_process

_KINDS: tuple[FragmentKind, ...] = ("master", "exp_avg", "exp_avg_sq")
_BLOCK_BYTES = 16 << 20
_READ = "read back, hashed and copied"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="a rank's part of the state, 10^6 bytes")
    parser.add_argument("--parameters", type=int, default=300, help="parameters that it is divided into")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    ranks = rank_facts()
    device = claim_device(ranks)
    comm = start_distributed(ranks, device)
    folder = arguments.folder / "checkpoint-benchmark"
    bench = Bench(comm, folder, _state(arguments.megabytes * 10**6, arguments.parameters, comm, device))
    seconds: dict[str, list[float]] = {}
    bench.round(0)  # memory is taken once
    for number in range(1, arguments.repeat + 1):
        for name, measured in bench.round(number).items():
            seconds.setdefault(name, []).append(measured)
    if comm.is_main:
        _report(seconds, bench.bytes * comm.size, comm.size)
        shutil.rmtree(folder, ignore_errors=True)
    comm.barrier()
    exit_process(0)


class Bench:
    """The same state written and read in several ways."""

    def __init__(self, comm: DistributedCommunicator, folder: Path, fragments: list[Fragment]) -> None:
        self.bytes = sum(fragment.tensor.nbytes for fragment in fragments)
        self._comm, self._folder, self._fragments = comm, folder, fragments
        self._behind = CheckpointWriter(folder / "behind", Retention(1), comm, asynchronous=True)
        self._block = os.urandom(_BLOCK_BYTES)

    def round(self, number: int) -> dict[str, float]:
        """Seconds of everything once."""
        at_once = CheckpointWriter(self._folder / "at-once", Retention(), self._comm, asynchronous=False)
        result = {"disk": self._time(self._write_to_disk)}
        result["save"] = self._time(lambda: self._begin(at_once, number))
        result["disk again"] = self._time(self._write_to_disk)
        path = self._folder / "at-once" / f"step-{number:08d}"
        self._forget(path)
        result["disk, read"] = self._time(lambda: self._read_from_disk(path))
        self._forget(path)
        result[_READ] = self._time(lambda: self._load(path))
        result["stall, behind"] = self._time(lambda: self._begin(self._behind, number))
        result["rest, behind"] = self._time(lambda: self._behind.completed(wait=True))
        if self._comm.is_main:
            shutil.rmtree(self._folder / "at-once")
        return result

    def _time(self, work: Callable[[], object]) -> float:
        self._comm.barrier()
        start = time.perf_counter()
        work()
        self._comm.barrier()
        return time.perf_counter() - start

    def _begin(self, writer: CheckpointWriter, number: int) -> None:
        writer.begin(number, self._fragments, {"attempt": 1}, [])

    def _write_to_disk(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"disk-{self._comm.rank}"
        with path.open("wb", buffering=0) as file:
            left = self.bytes
            while left:
                left -= file.write(self._block[: min(left, _BLOCK_BYTES)])
            os.fsync(file.fileno())
        path.unlink()

    def _read_from_disk(self, path: Path) -> None:
        with (path / f"rank-{self._comm.rank:05d}.safetensors").open("rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass

    def _load(self, path: Path) -> None:
        """As a resume does it: each rank verifies its share of the files and copies what it owns."""
        reader = CheckpointReader(path)
        assert reader.verify(self._comm.rank, self._comm.size) == ""
        for fragment in self._fragments:
            fragment.tensor.copy_(reader.read(fragment.key))

    def _forget(self, path: Path) -> None:
        """Take the files out of the page cache."""
        self._comm.barrier()
        for file in path.iterdir():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _state(total_bytes: int, parameters: int, comm: DistributedCommunicator, device: torch.device) -> list[Fragment]:
    """A rank's third of masters and of each moment, in parameters of one size that all ranks share."""
    length = total_bytes // (4 * len(_KINDS) * parameters)
    shape = (length * comm.size,)
    return [
        Fragment(
            FragmentKey(f"layers.{number}.weight", kind, shape, length * comm.rank, length * (comm.rank + 1)),
            torch.rand(length, device=device),
        )
        for number in range(parameters)
        for kind in _KINDS
    ]


def _report(seconds: dict[str, list[float]], total: int, ranks: int) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    disk = statistics.median(seconds["disk"] + seconds["disk again"])
    print(f"{total / 1e9:.2f} GB of {ranks} rank(s); medians of {len(seconds['save'])} rounds")
    rows = [
        ("disk: write and fsync", disk, f"{total / disk / 1e9:.2f} GB/s"),
        ("save", median["save"], f"{disk / median['save']:.0%} of the disk"),
        ("behind training: the step stands still", median["stall, behind"], f"{median['stall, behind'] / disk:.1%}"),
        ("behind training: until it is complete", median["stall, behind"] + median["rest, behind"], ""),
        ("disk: read", median["disk, read"], f"{total / median['disk, read'] / 1e9:.2f} GB/s"),
        (_READ, median[_READ], f"{median['disk, read'] / median[_READ]:.0%} of the disk"),
    ]
    for name, value, note in rows:
        print(f"  {name:<42}{value:8.3f} s   {note}")
