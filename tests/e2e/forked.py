"""A command on one or several ranks, in processes forked from one that has imported torch, deepspeed and megalm.

The script itself runs as `python script words...` runs it: in a session, a folder and an environment of its own, with
its standard streams and its exit code. Only the imports are there already, which take a launcher's ranks five to ten
seconds.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import psutil
from torch.distributed import TCPStore

from tests import WORKER
from tests.ranks import FORK_SERVER, rank_environment

# What the other ranks have once one has failed; launchers give them half a minute.
_GRACE_SECONDS = 15.0


class ForkedRanks:
    """What `subprocess.Popen` is for a launcher.

    Like a launcher it ends the other ranks when one fails; its exit code is that of the rank that failed first.
    """

    stdout = None  # in files until the end

    def __init__(self, words: Sequence[str], ranks: int, folder: Path, environment: Mapping[str, str]) -> None:
        self._output = Path(tempfile.mkdtemp(prefix="forked-"))
        # A lone rank finds an address by itself, as under a plain python.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
        self._kill_at = float("inf")
        self.returncode: int | None = None
        self.ranks = []
        for rank in range(ranks):
            place = rank_environment(rank, ranks, self._store.port) if self._store else {}
            arguments = (list(words), str(folder), {**environment, **place}, str(self._output), WORKER + rank)
            self.ranks.append(FORK_SERVER.Process(target=_run, args=arguments))
        for process in self.ranks:
            process.start()
        self.pids = [process.pid for process in self.ranks]
        self.pid = self.pids[0]

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.ranks]
        if self.returncode is None and any(codes):
            self.returncode = next(code for code in codes if code)
            self._kill_at = time.monotonic() + _GRACE_SECONDS
            for process in self.ranks:
                if process.exitcode is None:
                    process.kill() if _is_stopped(process.pid) else process.terminate()
        if None in codes:
            if time.monotonic() > self._kill_at:
                self.kill()
            return None
        self.returncode = self.returncode or 0
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked ranks", timeout)
            wait([process.sentinel for process in self.ranks if process.exitcode is None], timeout=1.0)
        stdout, stderr = (
            (self._output / name).read_text(errors="replace") if (self._output / name).exists() else ""
            for name in ("stdout", "stderr")
        )
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        for process in self.ranks:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def close(self) -> None:
        shutil.rmtree(self._output, ignore_errors=True)


def _is_stopped(pid: int | None) -> bool:
    """Such a process hears no SIGTERM, however long one waits."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _run(words: list[str], folder: str, environment: dict[str, str], output: str, core: int) -> None:
    os.setsid()
    # On one core, so with one thread: for models as small as these, two take twice the time of the processor.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{output}/stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{output}/stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
