"""Starts a process beside the one that trains; watches from there the one it belongs to, and ends some time later."""

from __future__ import annotations

import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from megalm.utils.child_process import child_command, child_environment

# It must take nothing of what training computes with.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS")


def start_beside(module: str, words: Sequence[str], log_file: Path) -> subprocess.Popen[bytes]:
    """Start `main` of `module` in a process of one thread and without GPUs, which this process's signals do not reach.

    Its standard input is a pipe: `stdin_is_closed` tells it when this process has closed that, or has ended.
    """
    environment = child_environment() | dict.fromkeys(_THREAD_VARIABLES, "1") | {"CUDA_VISIBLE_DEVICES": ""}
    with open(log_file, "ab") as log:
        return subprocess.Popen(
            child_command(module, words),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


class ParentWatch(threading.Thread):
    """Sets `ended` when a process has ended, and ends this process if it is still there long after that.

    Args:
        pid: the process to watch.
        patience_seconds: what the helper may take after that; a request can hang longer than any deadline that is
            checked between requests.
        when_late: called before this process is ended.
    """

    def __init__(self, pid: int, patience_seconds: float, when_late: Callable[[], None]) -> None:
        super().__init__(name="parent-watch", daemon=True)
        self.ended = threading.Event()
        self._patience_seconds = patience_seconds
        self._when_late = when_late
        try:
            # psutil also compares the start time: a later process with the same id is not the parent.
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None
        self.start()

    def run(self) -> None:
        while self._process is not None and is_alive(self._process):
            time.sleep(0.5)
        self.ended.set()
        time.sleep(self._patience_seconds)
        self._when_late()
        os._exit(1)


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stdin_is_closed(seconds: float) -> bool:
    """Whether the parent closes this process's standard input within some time; a pipe from it, to which it writes
    nothing."""
    ready, _, _ = select.select([0], [], [], seconds)
    return bool(ready) and not os.read(0, 1)
