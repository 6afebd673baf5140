"""What bounds a run in time: the wall time that it was given, and how long it may stand still."""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# A save takes longer than the ones before it now and then, and leaving takes a moment too.
_SAVE_MARGIN = 1.5
_LEAVING_SECONDS = 10.0
_POLL_SECONDS = 1.0


@dataclass
class TimeLimits:
    """Tells when the time that a run was given is up.

    Asked at every step boundary, it remembers the longest way from one to the next and the longest save: both must fit
    into what is left.

    Args:
        wall_seconds: from `started` on; None: no end.
        started: `time.monotonic()` at which the job started.
        watchdog: told of progress; it watches from the first step boundary on: what comes before may compile.
    """

    wall_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    watchdog: Watchdog | None = None
    last_beat: float = field(default=-math.inf, init=False)  # time.monotonic()
    longest_silence: float = field(default=0.0, init=False)  # seconds from one beat to the next
    _last_boundary: float | None = field(default=None, init=False)
    _longest_gap: float = field(default=0.0, init=False)
    _longest_save: float = field(default=0.0, init=False)

    def boundary(self) -> bool:
        """At a step boundary: is it time to leave?"""
        self.heartbeat()
        if self.watchdog is not None and not self.watchdog.is_alive():
            self.watchdog.start()
        now = time.monotonic()
        if self._last_boundary is not None:
            self._longest_gap = max(self._longest_gap, now - self._last_boundary)
        self._last_boundary = now
        if self.wall_seconds is None:
            return False
        needed = self._longest_gap + _SAVE_MARGIN * self._longest_save + min(_LEAVING_SECONDS, self.wall_seconds / 10)
        return now - self.started + needed >= self.wall_seconds

    def saved(self, seconds: float) -> None:
        """A save has taken so long."""
        self._longest_save = max(self._longest_save, seconds)
        self.heartbeat()

    def heartbeat(self) -> None:
        """Something has come further: a step, a validation batch, a save."""
        now = time.monotonic()
        if self.last_beat > -math.inf:
            self.longest_silence = max(self.longest_silence, now - self.last_beat)
        self.last_beat = now
        if self.watchdog is not None:
            self.watchdog.beat()

    def stop_watching(self) -> None:
        """What follows ends by itself, however long it takes."""
        if self.watchdog is not None:
            self.watchdog.stop_watching()


def process_start() -> float:
    """When this process began, on the clock of `time.monotonic()`."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


class Watchdog(threading.Thread):
    """Notices that this rank makes no progress, because it or a peer hangs; writes all its threads' stacks.

    Every rank has its own: those that wait for a stopped one inside a collective notice together.

    Args:
        stacks: the file for the stacks.
        timeout_seconds: without a beat for so long the rank hangs.
        on_hang: told once, with the seconds of silence; ends the process.
    """

    def __init__(self, stacks: Path, timeout_seconds: float, on_hang: Callable[[float], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._stacks, self._timeout, self._on_hang = stacks, timeout_seconds, on_hang
        self._last_beat = time.monotonic()
        self._watches = threading.Event()
        self._watches.set()

    def beat(self) -> None:
        self._last_beat = time.monotonic()

    def stop_watching(self) -> None:
        self._watches.clear()

    def run(self) -> None:
        last_look = time.monotonic()
        while self._watches.is_set():
            time.sleep(min(_POLL_SECONDS, self._timeout / 4))
            now = time.monotonic()
            if now - last_look > self._timeout / 2:
                self._last_beat = now  # this very process was stopped, and goes on now: give it its time again
            last_look = now
            silence = now - self._last_beat
            if silence > self._timeout and self._watches.is_set():
                write_stacks(self._stacks)
                self._on_hang(silence)
                return


def write_stacks(path: Path) -> None:
    """All threads of this process, as they stand now; failing to write them must not hide why."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError:
        pass
