"""A run's checkpoints being written, one at a time, at once or behind training, and the old ones going."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.discovery import BEST
from megalm.checkpoint.retention import Retention, prune
from megalm.checkpoint.save_transaction import CheckpointWrite, Ranks
from megalm.checkpoint.shard_spec import Fragment, HasFragment
from megalm.utils.atomic_files import write_durably

# Copies of a rank's fragments in host memory, from which a checkpoint is written while training goes on.


class HostStaging:
    """One buffer, made at the first use and used again: fresh or newly pinned pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, fragments: Iterable[HasFragment]) -> list[Fragment]:
        """Copies of `fragments`, fp32; what an earlier call gave is overwritten."""
        sources = list(fragments)
        total = sum(fragment.key.stop - fragment.key.start for fragment in sources)
        # Others are read from a disk when they are asked for, so that each is asked for once.
        on_device = any(fragment.tensor.is_cuda for fragment in sources if isinstance(fragment, Fragment))
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total, pin_memory=on_device)
        copies: list[Fragment] = []
        offset = 0
        for fragment in sources:
            length = fragment.key.stop - fragment.key.start
            copy = self._buffer.narrow(0, offset, length)
            copy.copy_(_flat(fragment.tensor), non_blocking=True)
            copies.append(Fragment(fragment.key, copy))
            offset += length
        if on_device:
            torch.cuda.synchronize()
        return copies


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete.

    Attributes:
        stall_seconds: how long training stood still for it.
        write_seconds: from its beginning to the moment when all ranks know that it is complete.
        bytes: of all ranks' tensors.
        pruned: names of those that went for it; rank 0 knows.
        notice: what went wrong after it was complete; rank 0 knows.
    """

    path: Path
    step: int
    stall_seconds: float
    write_seconds: float
    bytes: int
    pruned: tuple[str, ...] = ()
    notice: str = ""


class CheckpointWriter:
    """Every method is collective.

    Args:
        checkpoints: the run's folder of checkpoints.
        asynchronous: write behind training, from copies in host memory.
        origin: what this process went on from: it is kept until something was saved since.
    """

    def __init__(
        self, checkpoints: Path, retention: Retention, ranks: Ranks, asynchronous: bool, origin: Path | None = None
    ) -> None:
        self._checkpoints = checkpoints
        self._retention = retention
        self._origin = origin
        self._ranks = ranks
        self._host = HostStaging() if asynchronous else None
        self._write: CheckpointWrite | None = None
        self._step = 0
        self._begun = self._stall_seconds = 0.0
        self._best: Path | None = None  # to be named once it is complete
        self._saved: list[Saved] = []
        self._pruned: tuple[str, ...] = ()
        self._notice = ""

    def begin(self, step: int, fragments: Iterable[HasFragment], facts: dict[str, Any], copies: Sequence[Path]) -> Path:
        """Write a checkpoint, or begin to; where it will be. A second one waits for the first.

        Raises:
            TrainingError: this one, or the one before, cannot be written.
        """
        self._begun = time.perf_counter()
        self._advance(wait=True)
        self._step, self._pruned, self._notice = step, (), ""
        self._write = CheckpointWrite(
            self._checkpoints,
            step,
            self._held(fragments),
            facts,
            copies,
            self._ranks,
            asynchronous=self._host is not None,
            make_room=self._prune,
            when_complete=self._prune_when_complete,
        )
        path = self._write.path
        self._stall_seconds = time.perf_counter() - self._begun
        if self._host is None:
            self._advance(wait=True)
        return path

    def completed(self, wait: bool = False) -> list[Saved]:
        """What became complete since the last call; to be asked at every step boundary.

        Args:
            wait: until nothing is being written.

        Raises:
            TrainingError: on all ranks, where any could not write.
        """
        self._advance(wait)
        saved, self._saved = self._saved, []
        return saved

    def mark_best(self, path: Path) -> None:
        """Name a checkpoint in `checkpoints/best`, when it is complete."""
        if self._write is not None and self._write.path == path:
            self._best = path
        elif self._ranks.is_main:
            write_durably(path.with_name(BEST), f"{path.name}\n".encode())

    def rehearse(self, folder: Path, fragments: Iterable[HasFragment], facts: dict[str, Any]) -> None:
        """Write a checkpoint in another folder, in the way of the real ones, and remove it."""
        write = CheckpointWrite(
            folder, 0, self._held(fragments), facts, [], self._ranks, asynchronous=self._host is not None
        )
        write.advance(wait=True)
        if self._ranks.is_main:
            shutil.rmtree(folder)
        self._ranks.barrier()

    def _held(self, fragments: Iterable[HasFragment]) -> Sequence[HasFragment]:
        return list(fragments) if self._host is None else self._host.take(fragments)

    def _advance(self, wait: bool) -> None:
        write, self._write = self._write, None
        if write is None:
            return
        if not write.advance(wait):
            self._write = write
            return
        stall = time.perf_counter() - self._begun if self._host is None else self._stall_seconds
        self._saved.append(Saved(write.path, self._step, stall, write.seconds, write.bytes, self._pruned, self._notice))
        if self._best == write.path:
            self._best = None
            self.mark_best(write.path)

    def _prune(self) -> None:
        """On rank 0. What cannot be deleted is told; the checkpoint that was just written is complete all the same."""
        try:
            self._pruned += tuple(path.name for path in prune(self._checkpoints, self._retention, self._origin))
        except OSError as error:
            self._notice = f"an old checkpoint cannot be deleted: {error}"

    def _prune_when_complete(self) -> None:
        self._origin = None
        self._prune()
