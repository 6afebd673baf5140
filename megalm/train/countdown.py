"""A line every few seconds about what takes long before there are steps to count."""

from __future__ import annotations

import time
from collections.abc import Callable

from megalm.train.report import duration

_INTERVAL_SECONDS = 5.0


class Countdown:
    """Counts to `total`; says nothing of what is done sooner than the first line is due.

    Args:
        say: as `Reporter.say`.
    """

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        self._say, self._what, self._total = say, what, total
        self._done = 0
        self._started = self._told = time.monotonic()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._done < self._total and now - self._told >= _INTERVAL_SECONDS:
            self._told = now
            left = (now - self._started) / self._done * (self._total - self._done)
            self._say(f"{self._what}: {self._done / self._total:.0%}, about {duration(left)} left")
