"""When something long says how far it is, where there is no bar: a line every few seconds, with the time left."""

from __future__ import annotations

import time

LINE_INTERVAL_SECONDS = 5.0


class Pace:
    """Counts to `total`; what is done before the first line is due is not told at all."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._started = self._told = time.monotonic()

    def advance(self) -> float | None:
        """Count one more; the seconds left, where a line is due."""
        self.done += 1
        now = time.monotonic()
        if self.done >= self.total or now - self._told < LINE_INTERVAL_SECONDS:
            return None
        self._told = now
        return (now - self._started) / self.done * (self.total - self.done)
