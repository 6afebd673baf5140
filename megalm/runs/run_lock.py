"""At most one job works in a run folder, also where the jobs are on different machines.

The kernel's lock decides where it can: it is given back when its holder dies, however it dies. Some shared file systems
keep such locks for one machine only, or not at all. So the holder also writes a count into the file every few seconds:
a job that finds the name of another machine there looks whether it still counts before it takes over.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import threading
import time
from pathlib import Path

from megalm.errors import ConfigError

log = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0
_PATIENCE_BEATS = 4
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Held from `take` until `release`, or the end of this process.

    Args:
        folder: the run folder.
        beat_seconds: how often the holder counts; four such without a change and it is taken for dead.
    """

    def __init__(self, folder: Path, beat_seconds: float = _BEAT_SECONDS) -> None:
        self._path = folder / "lock"
        self._beat_seconds = beat_seconds
        self._descriptor = -1  # open, and with it the kernel's lock held
        self._released = threading.Event()

    def take(self) -> None:
        """Called on rank 0 only.

        Raises:
            ConfigError: another job holds it; it says which. Or the folder cannot be written.
        """
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self._path} cannot be written ({error.strerror}): look at its owner and rights, or choose "
                "another run.name or run.root"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kernel_decides = True
        except BlockingIOError:
            raise self._refusal() from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            kernel_decides = False
        if self._is_alive(platform.node() if kernel_decides else None):
            raise self._refusal()
        self._write(0)
        threading.Thread(target=self._count, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Whoever comes next need not wait to see whether this job is alive. Harmless where nothing is held."""
        self._released.set()
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)

    def _is_alive(self, decided_host: str | None) -> bool:
        """Whether the job whose name is there still counts; a job of `decided_host` does not: the kernel says so."""
        seen = self._read()
        if not seen or seen.startswith(f"host {decided_host},"):
            return False
        deadline = time.monotonic() + _PATIENCE_BEATS * self._beat_seconds
        log.warning("%s was held by %s; looking whether that job is alive", self._path, seen)
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 2)
            now = self._read()
            if now != seen:
                return bool(now)
        return False

    def _read(self) -> str:
        """Opened anew each time: that is when a network file system looks for what others wrote."""
        with self._path.open("rb") as file:
            return file.read(200).decode(errors="replace").strip()

    def _write(self, beat: int) -> None:
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        text = f"host {platform.node()}, process {os.getpid()}{job}; beat {beat}\n".encode()
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))
        os.fsync(self._descriptor)

    def _count(self) -> None:
        beat = 0
        while not self._released.wait(self._beat_seconds):
            beat += 1
            try:
                self._write(beat)
            except (
                OSError
            ):  # a full disk: what is written over takes no room; a file system that is gone says so itself
                log.debug("the lock's count cannot be written", exc_info=True)

    def _refusal(self) -> ConfigError:
        holder = self._read().rpartition("; beat")[0]
        os.close(self._descriptor)
        self._descriptor = -1
        return ConfigError(
            f"run {self._path.parent} is being trained by another job ({holder}); wait for it, stop it, or choose "
            "another run.name"
        )
