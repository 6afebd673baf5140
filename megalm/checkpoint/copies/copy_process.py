"""The process that copies a run's checkpoints to another place, behind training.

The training process starts it as a `CopyHandle`, reads what was done with `new_copies` and ends with `finish`;
`megalm checkpoint copy` drives the same `Copier`. No error of the other place reaches training: it is tried again for
as long as the run lasts.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from megalm.checkpoint.copies.copy_status import LOCK_FILE, Copied, CopyReader, CopyStatus
from megalm.checkpoint.copies.copy_store import CopyStore, copies_due
from megalm.checkpoint.discovery import BEST, Entry, complete_checkpoints, list_checkpoints, read_pointer
from megalm.checkpoint.manifest import MANIFEST
from megalm.checkpoint.retention import Retention
from megalm.errors import EXIT_DONE, EXIT_FAILED, CheckpointError
from megalm.utils.file_lock import take_lock
from megalm.utils.parent_watch import ParentWatch, start_beside, stdin_is_closed
from megalm.utils.progress import ProgressBar, sizes
from megalm.utils.remote_files import lasting_problem, pause_seconds, short_reason
from megalm.utils.stop_signals import STOP_SIGNALS

_MODULE = "megalm.checkpoint.copies.copy_process"
LOG_FILE = "copies.log"

_POLL_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_STATUS_SECONDS = 1.0  # between two writes of the bytes done
_RESTART_SECONDS = 60.0
# How long it keeps copying after its training process has ended.
AFTER_TRAINING_SECONDS = 600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CopyRequest:
    """What to copy where.

    Attributes:
        address: of the copies of all runs; those of this one are in ADDRESS/RUN.
        retention: of the copies.
        files: names of small files of the run folder, copied with each checkpoint.
    """

    run_dir: Path
    address: str
    retention: Retention
    files: tuple[str, ...] = ()

    def store(self) -> CopyStore:
        return CopyStore(self.address, self.run_dir.name)


_REQUEST = TypeAdapter(CopyRequest)  # as JSON on a command line


class Copier:
    """Copies what is due, one checkpoint at a time, and writes copies.json.

    Args:
        on_status: called with each status that is written.
    """

    def __init__(self, request: CopyRequest, on_status: Callable[[CopyStatus], None] = lambda _: None) -> None:
        self._request = request
        self._checkpoints = request.run_dir / "checkpoints"
        self._store = request.store()
        self._on_status = on_status
        self._copied: list[Entry] | None = None  # as last listed; None: to be listed
        self._damaged: set[str] = set()  # names, not tried again
        self._seen: object = None  # the local checkpoints when all were copied
        before = CopyStatus.read(request.run_dir)
        copied = before.copied if before.address == self._store.address else {}
        self.status = CopyStatus(address=self._store.address, copied=copied)
        self._written_at = 0.0
        self._update()

    def copy_next(self) -> bool:
        """Copy the newest checkpoint that is due; return False if there is none.

        Raises:
            Exception: of the server, or LostCopy; try again later.
        """
        state = self._local_state()
        if self._copied is not None and state == self._seen:
            return False
        local = [entry for entry in list_checkpoints(self._checkpoints) if entry.path.name not in self._damaged]
        if self._copied is None:
            self._copied = self._store.entries()
            self._store.delete_partial([entry.path.name for entry in local])
        best = read_pointer(self._checkpoints, BEST)
        due = list(copies_due(local, self._copied, self._request.retention, best))
        known = {entry.path.name: entry.manifest for entry in self._copied if entry.manifest}
        there = {
            name: self.status.copied.get(name) or Copied(bytes=manifest.bytes, seconds=0.0, at=0.0)
            for name, manifest in known.items()
        }
        names = tuple(entry.path.name for entry in due)
        self._update(copied=there, due=names, copying=names[0] if names else None, problem="")
        if not due:
            self._seen = state
            return False
        self._copy(due[0], best)
        return True

    def failed(self, error: BaseException) -> None:
        """Note why a try failed; the next one looks at the server anew."""
        self._copied = None
        why = lasting_problem(error) or short_reason(error)
        logger.warning("%s: copying failed, trying again: %s", self._store.address, why)
        self._update(problem=why, copying=None)

    def _copy(self, entry: Entry, best: str | None) -> None:
        assert entry.manifest is not None
        name, started, total = entry.path.name, time.monotonic(), entry.manifest.bytes
        self._update(bytes_done=0, bytes_total=total)
        try:
            # Before the manifest: the metrics must reach as far as the checkpoint.
            self._store.upload_run_files(self._request.run_dir / file for file in self._request.files)
            self._store.upload(entry.path, self._advance)
        except FileNotFoundError:
            if (entry.path / MANIFEST).exists():
                raise
            logger.info("%s was deleted while it was copied", name)
            self._copied = None
            return
        except CheckpointError as error:
            self._damaged.add(name)
            self._update(notices=(*self.status.notices, str(error)), copying=None)
            return
        seconds = time.monotonic() - started
        copied = Copied(bytes=total, seconds=seconds, at=time.time())
        due = tuple(other for other in self.status.due if other != name)
        self._update(copied={**self.status.copied, name: copied}, due=due, copying=None, bytes_done=total)
        logger.info("%s is copied to %s (%.1f s)", name, self._store.address, seconds)
        self._store.prune(self._request.retention, best)
        self._copied = self._store.entries()

    def _local_state(self) -> object:
        """Changes when a checkpoint is written, deleted or marked."""
        found = []
        for path in complete_checkpoints(self._checkpoints):
            try:
                found.append((path.name, (path / MANIFEST).stat().st_mtime_ns))
            except OSError:  # deleted meanwhile
                continue
        return found, sorted(self._damaged)

    def _advance(self, count: int) -> None:
        done = self.status.bytes_done + count
        self.status = self.status.model_copy(update={"bytes_done": done})
        if time.monotonic() >= self._written_at + _STATUS_SECONDS:
            self._update()

    def _update(self, **changes: object) -> None:
        self.status = self.status.model_copy(update=changes)
        self._written_at = time.monotonic()
        if self._request.run_dir.is_dir():
            self.status.write(self._request.run_dir)
        self._on_status(self.status)


class CopyHandle(CopyReader):
    """The training process's handle of the process that copies. Nothing here raises or waits, but `finish`.

    The process has its own session and ignores a job's signals, so that it can finish what training leaves.
    """

    def __init__(self, request: CopyRequest) -> None:
        super().__init__(request.run_dir, since=time.time())
        self.request = request
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        words = [_REQUEST.dump_json(self.request).decode(), "--parent-pid", str(os.getpid())]
        self.process = start_beside(_MODULE, words, self.run_dir / LOG_FILE)

    def new_copies(self) -> dict[str, Copied]:
        """Return the copies made since the last call. Starts the process again if it has ended."""
        if self.process.poll() is not None and time.monotonic() > self._started + _RESTART_SECONDS:
            self._start()
        return super().new_copies()

    def in_work(self) -> list[Path]:
        """Return the checkpoint that is being copied, which is not to be deleted meanwhile."""
        copying = self.read(now=True).copying
        return [] if copying is None else [self.run_dir / "checkpoints" / copying]

    def finish(self, timeout_seconds: float, say: Callable[[str], None]) -> list[str]:
        """Wait until all is copied; return the names of the checkpoints that are not.

        Args:
            say: called with progress lines.
        """
        if self.process.stdin is not None:
            self.process.stdin.close()  # no more checkpoints follow
        deadline = time.monotonic() + timeout_seconds
        bar = ProgressBar("copying checkpoints", None, say=say, shown=sizes)
        while self.process.poll() is None and time.monotonic() < deadline:
            status = self.read(now=True)
            bar.begin(f"copying {status.copying or 'checkpoints'}", status.bytes_total or None)
            bar.update(status.bytes_done, f"{len(status.due)} to go" if len(status.due) > 1 else "")
            time.sleep(0.1)
        status = self.read(now=True)
        return [] if self.process.poll() == EXIT_DONE else list(status.due) or ["the newest checkpoints"]


def follow(request: CopyRequest, parent: ParentWatch) -> None:
    """Copy until everything is copied after the parent has closed this process's stdin, or has ended."""
    with take_lock(request.run_dir / LOCK_FILE):  # of an earlier job it may still be at work
        copier, failures, is_last = Copier(request), 0, False
        while True:
            is_last = is_last or parent.ended.is_set() or stdin_is_closed(0.0)
            try:
                found, failures, pause = copier.copy_next(), 0, _POLL_SECONDS
                if is_last and not found:
                    return
                if found:
                    continue
            except Exception as error:  # whatever the server's package raises
                failures += 1
                copier.failed(error)
                pause = pause_seconds(failures, _LONGEST_PAUSE_SECONDS if not is_last else 5.0)
            if is_last:
                time.sleep(pause)
            else:
                is_last = stdin_is_closed(pause)


def copy_now(request: CopyRequest, patience_seconds: float, on_status: Callable[[CopyStatus], None]) -> CopyStatus:
    """Copy everything that is due.

    Raises:
        CheckpointError: the other place refuses, or does not answer within `patience_seconds`; or the run's own process
            is at work.
    """
    try:
        held = take_lock(request.run_dir / LOCK_FILE, wait_seconds=0.0)
    except BlockingIOError:
        raise CheckpointError(
            f"{request.run_dir}: its checkpoints are being copied by the run itself; wait until it ends"
        ) from None
    with held:
        copier, deadline, failures = Copier(request, on_status), time.monotonic() + patience_seconds, 0
        while True:
            try:
                if not copier.copy_next():
                    return copier.status
                failures = 0
            except Exception as error:
                failures += 1
                copier.failed(error)
                if lasting_problem(error) or time.monotonic() + pause_seconds(failures) > deadline:
                    raise CheckpointError(
                        f"{copier.status.address}: {copier.status.problem}; check the address and the credentials"
                    ) from error
                time.sleep(pause_seconds(failures))


def main(arguments: Sequence[str] | None = None) -> int:
    """`REQUEST --parent-pid N`, see utils/child_process.py; exit code 0: all is copied."""
    parser = argparse.ArgumentParser(prog=_MODULE, description="Copy the checkpoints of a run as they are written.")
    parser.add_argument("request", type=_REQUEST.validate_json)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args(arguments)
    os.nice(19)
    for number in (*STOP_SIGNALS, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logger.setLevel(logging.INFO)
    parent = ParentWatch(
        options.parent_pid,
        AFTER_TRAINING_SECONDS,
        lambda: logger.error("not everything is copied: megalm checkpoint copy RUN ADDRESS copies the rest"),
    )
    try:
        follow(options.request, parent)
    except Exception as error:
        logger.error("copying ended: %s", short_reason(error))
        return EXIT_FAILED
    return EXIT_DONE
