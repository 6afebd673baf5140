"""Progress of a long task: a bar on a terminal, a line every few seconds elsewhere, both with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megalm.utils.formatting import format_bytes, format_clock, printable

LINE_INTERVAL_SECONDS = 5.0

T = TypeVar("T")


def counts(done: float, total: float) -> str:
    return f"{done:.0f}/{total:.0f}"


def percent(done: float, total: float) -> str:
    return f"{done / total if total else 1.0:.0%}"  # of nothing, all is done


def sizes(done: float, total: float) -> str:
    return f"{format_bytes(done)}/{format_bytes(total)}"


class ProgressBar:
    """A progress bar that counts to `total`. Use it as a context manager.

    Args:
        total: None while unknown.
        done: start value.
        console: the terminal or stream to write to; default stderr.
        say: receives the lines; there is no bar then.
        shown: formats (done, total).
        transient: remove the bar at the end.
    """

    def __init__(
        self,
        name: str,
        total: float | None,
        *,
        done: float = 0,
        console: Console | None = None,
        say: Callable[[str], None] | None = None,
        shown: Callable[[float, float], str] = counts,
        transient: bool = True,
    ) -> None:
        self._name, self._total, self._done, self._first = printable(name), total, done, done
        self._shown, self._detail = shown, ""
        self._started = self._last_line_time = time.monotonic()
        console = console or Console(stderr=True, highlight=False, markup=False)
        self._say = say or (lambda line: console.print(line, soft_wrap=True))
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            redirect_stdout=sys.stdout.isatty(),  # else piped results would go to the terminal
            disable=say is not None or not console.is_terminal or console.is_dumb_terminal,
        )
        self._task = self._bar.add_task(self._title, total=total, completed=int(done), detail="")

    @property
    def _title(self) -> str:
        return self._name if self._total is None else f"{self._name} {self._shown(self._done, self._total)}"

    @property
    def line(self) -> str:
        """Return e.g. `checking step-00000010 12/40  elapsed 0:05  ETA 0:12`."""
        return self._line(time.monotonic())

    def _line(self, now: float) -> str:
        elapsed = now - self._started
        words = [self._title, self._detail, f"elapsed {format_clock(elapsed)}"]
        if self._total is not None and self._done > self._first:
            left = elapsed / (self._done - self._first) * (self._total - self._done)
            words.append(f"ETA {format_clock(left)}")
        return "  ".join(filter(None, words))

    def advance(self, count: float = 1) -> None:
        self.update(self._done + count)

    def update(self, done: float, detail: str = "", line_now: bool = False) -> None:
        """Set the current count.

        Args:
            detail: shown beside the count.
            line_now: without a terminal, write a line even if none is due.
        """
        self._done, self._detail = done, detail
        if not self._bar.disable:
            self._bar.update(self._task, description=self._title, completed=done, total=self._total, detail=detail)
            return
        now = time.monotonic()
        due = now - self._last_line_time >= LINE_INTERVAL_SECONDS and (self._total is None or done < self._total)
        if due or line_now:
            self._last_line_time = now
            self._say(self._line(now))

    def begin(self, name: str, total: float | None) -> None:
        """Start to count `name` from 0, unless it is already being counted."""
        name = printable(name)
        if name != self._name:
            self._done = self._first = 0.0
            self._started = time.monotonic()
        self._name, self._total = name, total

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the bar while something else is counted."""
        self.stop()
        try:
            yield
        finally:
            self._bar.start()

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        if not self._bar.disable:  # rich ends with an empty line even without a bar
            self._bar.stop()

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def watched(name: str) -> Callable[[Sequence[T]], Iterator[T]]:
    """Return a function that yields the items of a sequence and shows their progress."""

    def each(items: Sequence[T]) -> Iterator[T]:
        with ProgressBar(name, len(items)) as bar:
            for item in items:
                yield item
                bar.advance()

    return each
