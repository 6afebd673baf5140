"""A line every few seconds about what takes long before there are steps to count."""

from __future__ import annotations

from collections.abc import Callable

from megalm.pace import Pace
from megalm.train.console import duration


class Countdown:
    """Counts to `total`.

    Args:
        say: as `RunConsole.info`.
    """

    def __init__(self, say: Callable[[str], None], what: str, total: int) -> None:
        self._say, self._what, self._pace = say, what, Pace(total)

    def advance(self) -> None:
        left = self._pace.advance()
        if left is not None:
            self._say(f"{self._what}: {self._pace.done / self._pace.total:.0%}, about {duration(left)} left")
