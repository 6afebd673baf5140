"""Finding and taking every moment at which a process may die while it writes.

A hook of the interpreter sees each call of a C function. Those by which megalm's own code and pathlib and shutil change
files are counted; a process told so kills itself right before the n-th. Nothing of megalm is replaced.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_CALLS = {"open", "write", "flush", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"}
_PLACES = ("/megalm/checkpoint/", "/megalm/utils/atomic_files.py", "/pathlib.py", "/shutil.py")


@contextmanager
def counted(
    die_at: int | None = None, only: str | None = None, before: Callable[[int], object] | None = None
) -> Iterator[list[str]]:
    """The calls that change files, in this thread and in those started meanwhile.

    Args:
        die_at: let so many happen, and die before the next.
        only: count calls of this name alone.
        before: is called before each, with its number.
    """
    calls: list[str] = []

    def hook(frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or function.__name__ not in _CALLS or not _is_ours(frame):
            return
        if only not in (None, function.__name__):
            return
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if before is not None:
            before(len(calls))
        calls.append(function.__name__)

    threading.setprofile(hook)
    sys.setprofile(hook)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def _is_ours(frame: FrameType) -> bool:
    """Called from a place that writes files, on behalf of a checkpoint."""
    if not any(place in frame.f_code.co_filename for place in _PLACES):
        return False
    up: FrameType | None = frame
    while up is not None:
        name = up.f_code.co_filename
        if "/megalm/checkpoint/" in name:
            return True
        up = up.f_back
    return False


def left_of(checkpoints: Path) -> list[str]:
    """Names in a folder of checkpoints, for messages."""
    return sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else []
