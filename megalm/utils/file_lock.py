"""Exclusive kernel locks on files and folders; only this module imports `filelock`, and none imports `fcntl`.

A lock belongs to an open file (`flock`). The kernel releases it once every process that has the file open, forked
children included, has closed it or ended, even by SIGKILL. The content of a lock file is not changed.

On a file system without locks, the caller proceeds without one, and each process logs one warning per file system. Any
error of the lock call itself counts as this case: on a damaged file system the next write fails too. A caller that
needs the kernel's decision reads `HeldLock.in_kernel`: the run lock then relies on its heartbeat, and `SwapFolder`
deletes no folder.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalm.utils.atomic_files import still_names

log = logging.getLogger(__name__)

# Waiting polls, ever more slowly: thousands of ranks can wait for one file of a network file system.
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.05, 1.0
_REPORTED_DEVICES: set[int] = set()


@dataclass(frozen=True)
class HeldLock:
    """A held lock, released at the end of its `with` block, by `release`, or when the process ends.

    Attributes:
        descriptor: the open file, which holds the lock.
        in_kernel: false on a file system without locks, where other processes may be at work too.
    """

    descriptor: int
    in_kernel: bool

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        os.close(self.descriptor)


def take_lock(
    path: Path, wait_seconds: float = math.inf, on_wait: Callable[[], None] | None = None, is_folder: bool = False
) -> HeldLock:
    """Lock a file, which is created if missing, or an existing folder.

    If its holder deletes or replaces the file, the lock is taken anew on the file that now has the name.

    Args:
        on_wait: called once, if another process holds the lock, before waiting for it.

    Raises:
        BlockingIOError: another process still holds the lock after `wait_seconds`.
        OSError: the file or folder cannot be opened.
    """
    from filelock import lock_descriptor  # takes 0.1 s to import

    deadline, delay = time.monotonic() + wait_seconds, _FIRST_POLL_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            _report_no_locks(path, descriptor, error)
            return HeldLock(descriptor, in_kernel=False)
        if held and still_names(path, descriptor):
            return HeldLock(descriptor, in_kernel=True)
        os.close(descriptor)
        if not held:
            if time.monotonic() >= deadline:
                raise BlockingIOError(f"{path} is locked by another process")
            if on_wait is not None:
                on_wait()
                on_wait = None
        time.sleep(min(delay, max(0.0, deadline - time.monotonic())))
        delay = min(1.5 * delay, _LONGEST_POLL_SECONDS)


def _report_no_locks(path: Path, descriptor: int, error: OSError) -> None:
    device = os.fstat(descriptor).st_dev
    if device not in _REPORTED_DEVICES:
        _REPORTED_DEVICES.add(device)
        log.warning(
            "%s: this file system has no locks (%s); let only one process at a time write there", path, error.strerror
        )
