"""Write one checkpoint, complete or absent even after a kill; first check that it fits on the disk.

Each rank writes its own shard into `step-N.tmp`; rank 0 writes the manifest last, renames the folder and replaces
`latest`. Everything is fsynced before it gets its final name.

A save can run in the background: each rank then writes in a thread. The ranks communicate only at step boundaries and
from the main thread, because collectives issued from two threads would mix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from megalm.checkpoint.discovery import LATEST, PARTIAL_SUFFIX, folder_name
from megalm.checkpoint.manifest import Manifest, write_manifest
from megalm.checkpoint.retention import put_in_place
from megalm.checkpoint.safetensors_file import ShardSummary, write_shard
from megalm.checkpoint.shard_spec import Fragment
from megalm.communicator import Communicator
from megalm.errors import MegalmError, TrainingError
from megalm.utils.atomic_files import clear_away, make_directory, write_atomically, write_durably
from megalm.utils.formatting import format_bytes

# Disk space

# Overhead besides the fp32 values. Per fragment: a line in the shard's header and a dozen in the manifest; per rank:
# configuration and partly filled disk blocks.
_FRAGMENT_BYTES = 600
_RANK_BYTES = 64 << 10


def bytes_needed(fragments: Sequence[Fragment]) -> int:
    """Return the estimated size of this rank's part of a checkpoint, from shapes alone."""
    return _RANK_BYTES + sum(4 * fragment.key.count + _FRAGMENT_BYTES for fragment in fragments)


def require_space(folder: Path, needed: int, make_room: Callable[[], None]) -> None:
    """Refuse to start a save that does not fit on the disk.

    Args:
        folder: where the checkpoint is written; must exist.
        needed: bytes of all ranks together, because they share one file system.
        make_room: deletes what need not be kept; called only if there is too little space.

    Raises:
        TrainingError: there is too little space even after `make_room`.
    """
    if shutil.disk_usage(folder).free >= needed:
        return
    make_room()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"{folder} has {format_bytes(free)} free, a checkpoint needs {format_bytes(needed)}; free space "
            "(megalm checkpoint prune), or keep fewer checkpoints (checkpoint.keep_last)"
        )


T = TypeVar("T")


def save_checkpoint(
    checkpoints: Path,
    step: int,
    fragments: Iterable[Fragment],
    facts: dict[str, Any],
    copies: Sequence[Path],
    ranks: Communicator,
) -> Path:
    """Write `checkpoints/step-N` and wait for it; collective. Arguments and errors as for `CheckpointWrite`."""
    write = CheckpointWrite(checkpoints, step, list(fragments), facts, copies, ranks)
    write.advance(wait=True)
    return write.path


class CheckpointWrite:
    """A checkpoint that is being written; every method is collective.

    Args:
        step: completed optimizer steps; names the folder.
        fragments: this rank's part of the state; if `asynchronous`, in host memory that must not change meanwhile.
        facts: the manifest's other fields (JSON): step, tokens, data position, counters, fingerprints, ...
        copies: files to store beside the tensors (configuration).
        asynchronous: write in threads; call `advance` at step boundaries until it returns True.
        make_room: called on rank 0 if the disk is too full, to delete what need not be kept.
        when_complete: called on rank 0 after the commit, in the thread that committed.

    Raises:
        TrainingError: on every rank, here or from `advance`, if any rank could not write or the disk is too full;
            the partial checkpoint is removed. The cause is this rank's error, if it had one.
    """

    def __init__(
        self,
        checkpoints: Path,
        step: int,
        fragments: Sequence[Fragment],
        facts: dict[str, Any],
        copies: Sequence[Path],
        ranks: Communicator,
        asynchronous: bool = False,
        make_room: Callable[[], None] = lambda: None,
        when_complete: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = checkpoints / folder_name(step)
        self.bytes = 0  # of all ranks' files, once written
        self.seconds = 0.0  # from the start to the commit, once complete
        self._partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self._facts = {"step": step, **facts}
        self._copies = copies
        self._ranks = ranks
        self._asynchronous = asynchronous
        self._in_place = False  # set on rank 0 only
        self._when_complete = when_complete
        self._started = time.perf_counter()
        needed = sum(ranks.gather(bytes_needed(fragments)))
        self._all_ranks(_start(lambda: self._prepare(needed, make_room)))
        shard = self._partial / f"rank-{ranks.rank:05d}.safetensors"
        self._writing: Future[ShardSummary] | None = _start(lambda: write_shard(shard, fragments), asynchronous)
        self._commit: Future[None] | None = None

    def advance(self, wait: bool = False) -> bool:
        """Enter the next stage if all ranks are ready; return whether the checkpoint is complete.

        Args:
            wait: wait until it is complete.
        """
        if self.seconds:
            return True
        if self._writing is not None:
            if not self._all_ranks(self._writing, wait):
                return False
            shards = self._ranks.gather(self._writing.result())
            self._writing = None  # frees the fragments too
            self.bytes = sum(shard.bytes for shard in shards)
            self._commit = _start(lambda: self._publish(shards), self._asynchronous)
        assert self._commit is not None
        if not self._all_ranks(self._commit, wait):
            return False
        self.seconds = time.perf_counter() - self._started
        return True

    def _all_ranks(self, work: Future[Any], wait: bool = True) -> bool:
        """Return whether `work` is done on all ranks; if it failed on one rank, raise on every rank."""
        if wait:
            futures.wait([work])
        done = work.done()
        states = self._ranks.gather((done, _problem(work) if done else "", self._in_place))
        problem = next((f"rank {rank}: {problem}" for rank, (_, problem, _) in enumerate(states) if problem), "")
        if not problem:
            return all(done for done, _, _ in states)
        error = work.exception()  # this rank's, if it had one
        self._ranks.barrier()  # no rank is writing any more
        if self._ranks.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        if any(in_place for _, _, in_place in states):
            raise TrainingError(
                f"checkpoint {self.path} is complete, but a later step failed: {problem}; --resume auto resumes from it"
            ) from error
        raise TrainingError(
            f"cannot write checkpoint {self.path}: {problem}; --resume auto resumes from the checkpoint before it"
        ) from error

    def _prepare(self, needed: int, make_room: Callable[[], None]) -> None:
        if not self._ranks.is_main:
            return
        make_directory(self._partial.parent)
        if os.path.lexists(self._partial):
            clear_away(self._partial)
        require_space(self._partial.parent, needed, make_room)
        self._partial.mkdir()

    def _publish(self, shards: list[ShardSummary]) -> None:
        """On rank 0: write everything under the partial name, then rename it to commit."""
        if not self._ranks.is_main:
            return
        files = {shard.file: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
        for source in self._copies:
            files[source.name] = _copy(source, self._partial / source.name)
        content = {**self._facts, "files": files, "tensors": _tensor_index(shards)}
        write_manifest(self._partial, Manifest.from_json(content))
        put_in_place(self._partial, self.path)
        self._in_place = True
        write_durably(self.path.parent / LATEST, f"{self.path.name}\n".encode())
        self._when_complete()


def _start(work: Callable[[], T], thread: bool = False) -> Future[T]:
    """Run a task of this rank, now or in a thread that the end of the process does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # shared with all ranks, which then fail together
            future.set_exception(error)

    if thread:
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return future


def _problem(work: Future[Any]) -> str:
    error = work.exception()
    return "" if error is None else str(error) if isinstance(error, (MegalmError, OSError)) else repr(error)


def _copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy a small file; return its manifest entry. The folder is synced with the manifest."""
    content = source.read_bytes()
    write_atomically(target, lambda file: file.write(content))
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _tensor_index(shards: list[ShardSummary]) -> dict[str, Any]:
    """Return name -> shape and, per fragment, its file and range."""
    index: dict[str, Any] = {}
    for shard in shards:
        for key in shard.keys:
            entry = index.setdefault(key.name, {"shape": list(key.shape), "fragments": []})
            place = {name: value for name, value in dataclasses.asdict(key).items() if name not in ("name", "shape")}
            entry["fragments"].append({"file": shard.file, **place})
    return index
