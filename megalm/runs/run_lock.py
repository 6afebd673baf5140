"""The run lock: at most one job uses a run folder, even from different machines.

A kernel lock decides where possible: the kernel releases it when its holder dies. Some shared file systems keep such
locks per machine only, or not at all. So the holder also writes a heartbeat count into the file every few seconds. A
job that finds another machine's name in it waits to see whether the count still changes before it takes over.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megalm.errors import ConfigError
from megalm.utils.atomic_files import still_names
from megalm.utils.file_lock import HeldLock, take_lock

log = logging.getLogger(__name__)

_LOCK_FILE = "lock"
_BEAT_SECONDS = 5.0
_PATIENCE_BEATS = 4
_HOLDER = re.compile(r"host (.*), process (\d+)")
_ALIVE_SECONDS = 75.0  # since the last heartbeat: a network file system shows it up to a minute late


@dataclass(frozen=True)
class LostFolder:
    """What happened to a run folder while a job trained in it.

    Attributes:
        place: the folder to save in; None: there is none that belongs to this run.
    """

    why: str
    place: Path | None


class RunLock:
    """The lock of a run folder, held from `take` until `release` or the end of this process.

    Args:
        folder: the run folder.
        beat_seconds: interval of the holder's heartbeat; after four intervals without a change it counts as dead.
    """

    def __init__(self, folder: Path, beat_seconds: float = _BEAT_SECONDS) -> None:
        self._path = folder / _LOCK_FILE
        self._beat_seconds = beat_seconds
        self._held: HeldLock | None = None
        self._folder = -1  # a descriptor
        self._identity = ""
        self._taken_by = ""  # another job, which believed that this one is dead
        self._released = threading.Event()

    def take(self) -> None:
        """Take the lock; called on rank 0 only.

        Raises:
            ConfigError: another job, named in the message, holds the lock; or the folder cannot be written.
        """
        try:
            self._held = take_lock(self._path, wait_seconds=0.0)
        except BlockingIOError:
            raise self._refusal() from None
        except OSError as error:
            raise ConfigError(
                f"cannot write {self._path} ({error.strerror}); check its owner and permissions, or choose another "
                "run.name or run.root"
            ) from None
        if self._is_alive(platform.node() if self._held.in_kernel else None):
            self._held.release()
            self._held = None
            raise self._refusal()
        self._write(self._held, 0)
        self._folder = os.open(self._path.parent, os.O_RDONLY)
        # Some network file systems number files anew each time, so that no comparison holds.
        self._can_compare = self._is_named() and still_names(self._path.parent, self._folder)
        threading.Thread(target=self._count, args=(self._held,), name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Clear the file, so that the next job need not check whether this one is alive; no-op without the lock."""
        self._released.set()
        if self._held is not None:
            os.ftruncate(self._held.descriptor, 0)

    def lost(self) -> LostFolder | None:
        """Return what happened if the run folder or its lock is no longer the one that `take` found; None: nothing.

        Two calls of the system while all is well, so it can be asked often.
        """
        folder = self._path.parent
        if self._taken_by:
            return LostFolder(f"{self._path} names another job ({self._taken_by}), which trains the run too", folder)
        if not self._can_compare or self._is_named():
            return None
        if still_names(folder, self._folder):
            return LostFolder(f"{self._path} was deleted, so another job may train the run too", folder)
        place = _path_of(self._folder)
        if place is not None:
            return LostFolder(f"run folder {folder} was moved to {place}", place)
        if folder.exists():
            return LostFolder(f"run folder {folder} was replaced by another one", None)
        return LostFolder(f"run folder {folder} was deleted or moved", folder)

    def _is_named(self) -> bool:
        """Return whether the lock file's name is still that of the file that this job holds."""
        return self._held is not None and still_names(self._path, self._held.descriptor)

    def _is_alive(self, decided_host: str | None) -> bool:
        """Return whether the job named in the file still counts; one on `decided_host` is dead: we hold its lock."""
        seen = self._read()
        if not seen or seen.startswith(f"host {decided_host},"):
            return False
        deadline = time.monotonic() + _PATIENCE_BEATS * self._beat_seconds
        log.warning("%s names %s; checking whether that job is alive", self._path, seen)
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 2)
            now = self._read()
            if now != seen:
                return bool(now)
        return False

    def _read(self) -> str:
        """Read the file, opened again each time: a network file system then fetches what others wrote."""
        with self._path.open("rb") as file:
            return file.read(200).decode(errors="replace").strip()

    def _write(self, held: HeldLock, beat: int) -> None:
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        self._identity = f"host {platform.node()}, process {os.getpid()}{job}"
        text = f"{self._identity}; beat {beat}\n".encode()
        os.pwrite(held.descriptor, text, 0)
        os.ftruncate(held.descriptor, len(text))
        os.fsync(held.descriptor)

    def _count(self, held: HeldLock) -> None:
        beat = 0
        while not self._released.wait(self._beat_seconds):
            beat += 1
            try:
                holder = self._read().rpartition("; beat")[0]
                if holder not in ("", self._identity):
                    self._taken_by = holder
                    return
                self._write(held, beat)
            except OSError:  # a lost file system shows elsewhere; a full disk does not prevent overwriting
                log.debug("cannot write the heartbeat of the run lock", exc_info=True)

    def _refusal(self) -> ConfigError:
        holder = self._read().rpartition("; beat")[0]
        return ConfigError(
            f"another job ({holder}) trains run {self._path.parent}; wait for it, stop it, or choose another run.name"
        )


def is_held(folder: Path, now: float | None = None) -> bool:
    """Return whether a job uses a run folder, by the heartbeat in its lock; takes no lock.

    The holder empties the file when it ends. One on this machine that was killed is no longer a holder.

    Args:
        now: unix time; None: the present.
    """
    try:
        with (folder / _LOCK_FILE).open("rb") as file:  # a network file system looks again for who opens a file
            text = file.read(200).decode(errors="replace")
            changed = os.fstat(file.fileno()).st_mtime
    except OSError:
        return False
    holder = _HOLDER.match(text)
    if holder is not None and holder[1] == platform.node() and not psutil.pid_exists(int(holder[2])):
        return False
    return text != "" and abs((time.time() if now is None else now) - changed) < _ALIVE_SECONDS


def _path_of(descriptor: int) -> Path | None:
    """Return the present path of an open folder; None if it is deleted, or the system does not say."""
    try:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return None
    return path if path.exists() and still_names(path, descriptor) else None
