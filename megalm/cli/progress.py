"""How far a command has come, on stderr with the time left: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megalm.pace import Pace

T = TypeVar("T")


class Counter:
    """Counts to `total`. Use it as a context manager."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._pace = what, Pace(total)
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal or self._console.is_dumb_terminal,
        )
        self._task = self._bar.add_task(what, total=total)

    def advance(self) -> None:
        left = self._pace.advance()
        self._bar.update(self._task, completed=self._pace.done)
        if self._bar.disable and left is not None:
            self._console.print(f"{self._what} {self._pace.done:,}/{self._pace.total:,}, about {_clock(left)} left")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While something else is counted."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def __enter__(self) -> Counter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def watched(what: str) -> Callable[[Sequence[T]], Iterator[T]]:
    """What hands on the items of a sequence and counts them."""

    def each(items: Sequence[T]) -> Iterator[T]:
        with Counter(what, len(items)) as counter:
            for item in items:
                yield item
                counter.advance()

    return each


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
