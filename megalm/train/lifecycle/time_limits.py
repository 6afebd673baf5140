"""Time limits of a run: its wall time, and the watchdog that detects hangs."""

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

from megalm.rank_environment import allocation_end

# Allow for a save that is slower than those before, and for the exit itself.
_SAVE_MARGIN = 1.5
_LEAVING_SECONDS = 10.0
_POLL_SECONDS = 1.0


@dataclass
class TimeLimits:
    """Decides when a run must stop to stay within its wall time.

    Measures the longest time between step boundaries and the longest save: both must fit into the remaining time.

    Args:
        wall_seconds: counted from `started`; None: no limit.
        started: `time.monotonic()` at which the job started.
        watchdog: notified of progress; starts at the first step boundary, since compilation before it may be slow.
        progress: notified too, with the number of the last step at its boundary.
    """

    wall_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    watchdog: Watchdog | None = None
    progress: Callable[[int | None], None] = lambda step: None
    last_beat: float = field(default=-math.inf, init=False)  # time.monotonic()
    longest_silence: float = field(default=0.0, init=False)  # seconds from one beat to the next
    _last_boundary: float | None = field(default=None, init=False)
    _longest_gap: float = field(default=0.0, init=False)
    _longest_save: float = field(default=0.0, init=False)

    def boundary(self, step: int | None = None, growth: float = 1.0) -> bool:
        """Call at each step boundary; return whether it is time to stop.

        Args:
            growth: how many times longer than the last step the next one takes.
        """
        self.heartbeat(step)
        if self.watchdog is not None and not self.watchdog.is_alive():
            self.watchdog.start()
        now = time.monotonic()
        if self._last_boundary is not None:
            self._longest_gap = max(self._longest_gap, now - self._last_boundary)
        self._last_boundary = now
        if self.wall_seconds is None:
            return False
        needed = self._longest_gap * max(1.0, growth) + _SAVE_MARGIN * self._longest_save
        needed += min(_LEAVING_SECONDS, self.wall_seconds / 10)
        return now - self.started + needed >= self.wall_seconds

    def saved(self, seconds: float) -> None:
        """Record the duration of a save."""
        self._longest_save = max(self._longest_save, seconds)
        self.heartbeat()

    def heartbeat(self, step: int | None = None) -> None:
        """Record progress: a step, a validation batch or a save."""
        self.progress(step)
        now = time.monotonic()
        if self.last_beat > -math.inf:
            self.longest_silence = max(self.longest_silence, now - self.last_beat)
        self.last_beat = now
        if self.watchdog is not None:
            self.watchdog.beat()

    def stop_watching(self) -> None:
        """Stop the watchdog: what follows may take any time."""
        if self.watchdog is not None:
            self.watchdog.stop_watching()


def wall_seconds(limit: float | None, started: float) -> float | None:
    """Return the seconds from `started` within which a run must end: `limit`, or up to the end of its job."""
    end = allocation_end()
    if limit is not None or end is None:
        return limit
    return end - time.time() + time.monotonic() - started


def process_start() -> float:
    """Return when this process started, on the clock of `time.monotonic()`, whoever sets the system's clock."""
    boot = psutil.boot_time()  # in create_time too: the difference is the kernel's own figure
    started = psutil.Process().create_time() - boot
    return time.monotonic() - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


class Watchdog(threading.Thread):
    """Detects that this rank makes no progress, because it or a peer hangs; writes the stacks of all its threads.

    Every rank has its own watchdog: those that wait for a stopped rank inside a collective detect it together.

    Args:
        stacks: the file for the stacks.
        timeout_seconds: a rank without a beat for this long counts as hung.
        on_hang: called once, with the seconds without a beat; ends the process.
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
                self._last_beat = now  # this process was suspended and has resumed: restart its timeout
            last_look = now
            silence = now - self._last_beat
            if silence > self._timeout and self._watches.is_set():
                write_stacks(self._stacks)
                self._on_hang(silence)
                return


def write_stacks(path: Path) -> None:
    """Write the stacks of all threads of this process; an error in writing must not hide the original problem."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError:
        pass
