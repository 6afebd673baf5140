"""Noticing that the launcher has gone.

`deepspeed` (0.19.8) dies of a SIGTERM without a word to the processes that it started, and no launcher says goodbye
before a SIGKILL: ranks would train on, with nobody to stop them. Each rank looks for itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_POLL_SECONDS = 1.0
_PROGRAMS = {"deepspeed", "ds", "torchrun"}
_MODULES = {
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
}
# The interpreter, its flags, and the program or module that it runs.
_LOOKED_AT_WORDS = 4


def watch_launchers() -> None:
    """Ask this process to stop (SIGTERM, so: save and leave) as soon as one of its launchers has ended.

    A shell is no launcher: a bare `python` that was left in the background goes on.
    """
    found = launchers(psutil.Process().parents())
    if found:
        threading.Thread(target=_watch, args=(found,), name="launcher-watch", daemon=True).start()


def launchers(ancestors: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The nearest of `ancestors` (parent first) that are launchers, up to the first that is none."""
    found = []
    for process in ancestors:
        try:
            words = process.cmdline()[:_LOOKED_AT_WORDS]
        except psutil.Error:
            break
        if not any(word in _MODULES or Path(word).name in _PROGRAMS for word in words):
            break
        found.append(process)
    return found


def _watch(processes: Sequence[psutil.Process]) -> None:
    while all(_alive(process) for process in processes):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
