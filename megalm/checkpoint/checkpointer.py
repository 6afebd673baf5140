"""Write a run's checkpoints one at a time, synchronously or in the background, and prune old ones.

`HostStaging` holds the host copies that a background write reads; `CheckpointWriter` drives the writes.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.discovery import BEST
from megalm.checkpoint.retention import Retention, prune
from megalm.checkpoint.save_transaction import CheckpointWrite
from megalm.checkpoint.shard_spec import Fragment
from megalm.communicator import Communicator
from megalm.errors import TrainingError
from megalm.utils.atomic_files import write_durably
from megalm.utils.formatting import format_bytes

log = logging.getLogger(__name__)

_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


class HostStaging:
    """Host copies of a rank's fragments, from which a checkpoint is written while training continues.

    One buffer is allocated at the first use and reused: fresh or newly pinned pages cost more than the copy.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Return fp32 copies of `fragments`; overwrites the copies of earlier calls."""
        sources = list(fragments)
        total = sum(fragment.key.count for fragment in sources)
        # Others may read their tensor from a disk, so each is accessed only once.
        on_device = any(fragment.tensor.is_cuda for fragment in sources if isinstance(fragment.values, torch.Tensor))
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total)
            if on_device:
                _pin(self._buffer)
        copies: list[Fragment] = []
        offset = 0
        for fragment in sources:
            copy = self._buffer.narrow(0, offset, fragment.key.count)
            copy.copy_(fragment.tensor.detach().reshape(-1), non_blocking=True)
            copies.append(Fragment(fragment.key, copy))
            offset += fragment.key.count
        if on_device:
            torch.cuda.synchronize()
        return copies


def _pin(buffer: torch.Tensor) -> None:
    """Lock the pages of memory that stays until the process ends; if the driver refuses, copies into it take longer.

    Not `pin_memory=True`: that allocator rounds up to a power of two, to twice of what is planned.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _FOR_ALL_DEVICES))
    if code:
        log.warning("CUDA cannot lock %s of memory for checkpoint.async (error %d)", format_bytes(buffer.nbytes), code)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        stall_seconds: how long training waited for it.
        write_seconds: from the start of the save until all ranks know that it is complete.
        bytes: total size of all ranks' tensors.
        pruned: names of the checkpoints deleted for it; on rank 0 only.
        notice: what failed after the checkpoint was complete; on rank 0 only.
    """

    path: Path
    step: int
    stall_seconds: float
    write_seconds: float
    bytes: int
    pruned: tuple[str, ...] = ()
    notice: str = ""


class CheckpointWriter:
    """Saves checkpoints, one at a time. Every method is collective.

    Args:
        checkpoints: the run's checkpoints folder.
        asynchronous: write in the background, from copies in host memory.
        origin: the checkpoint that this process resumed from; kept until the first save completes.
        in_use: asked on rank 0 for checkpoints not to delete now, unless a save lacks their space.
    """

    def __init__(
        self,
        checkpoints: Path,
        retention: Retention,
        ranks: Communicator,
        asynchronous: bool,
        origin: Path | None = None,
        in_use: Callable[[], Collection[Path]] = tuple,
    ) -> None:
        self._in_use = in_use
        self._checkpoints = checkpoints
        self._retention = retention
        self._origin = origin
        self._ranks = ranks
        self._host = HostStaging() if asynchronous else None
        self._write: CheckpointWrite | None = None
        self._step = 0
        self._begun = self._stall_seconds = 0.0
        self._best: Path | None = None  # gets its name in `best` once complete
        self._saved: list[Saved] = []
        self._pruned: tuple[str, ...] = ()
        self._notice = ""

    def begin(self, step: int, fragments: Iterable[Fragment], facts: dict[str, Any], copies: Sequence[Path]) -> Path:
        """Write a checkpoint, or start writing it; return its path. Waits for a save that is still in progress.

        Raises:
            TrainingError: this checkpoint, or the one before, cannot be written.
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
        """Return the checkpoints completed since the last call; call it at every step boundary.

        Args:
            wait: wait until no write is in progress.

        Raises:
            TrainingError: on all ranks, if any rank could not write.
        """
        self._advance(wait)
        saved, self._saved = self._saved, []
        return saved

    def move_to(self, checkpoints: Path) -> None:
        """Write later checkpoints to this folder, to which the old one was moved; one in progress may get lost."""
        with contextlib.suppress(TrainingError):
            self._advance(wait=True)
        self._checkpoints = checkpoints

    def mark_best(self, path: Path) -> None:
        """Name a checkpoint in `checkpoints/best` once it is complete."""
        if self._write is not None and self._write.path == path:
            self._best = path
        elif self._ranks.is_main:
            write_durably(path.with_name(BEST), f"{path.name}\n".encode())

    def preflight(self, folder: Path, fragments: Iterable[Fragment], facts: dict[str, Any]) -> None:
        """For preflight: write a checkpoint to `folder` the same way as a real save, then remove it."""
        write = CheckpointWrite(
            folder, 0, self._held(fragments), facts, [], self._ranks, asynchronous=self._host is not None
        )
        write.advance(wait=True)
        if self._ranks.is_main:
            shutil.rmtree(folder)
        self._ranks.barrier()

    def _held(self, fragments: Iterable[Fragment]) -> Sequence[Fragment]:
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

    def _prune(self, keep: Collection[Path] = ()) -> None:
        """On rank 0. A failed deletion becomes a notice: the checkpoint just written is complete regardless."""
        try:
            kept = [*keep, *([] if self._origin is None else [self._origin])]
            self._pruned += tuple(path.name for path in prune(self._checkpoints, self._retention, kept))
        except OSError as error:
            self._notice = f"cannot delete an old checkpoint: {error}"

    def _prune_when_complete(self) -> None:
        self._origin = None
        self._prune(self._in_use())
