"""Progress: lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import pytest
from rich.console import Console

from megalm.utils.progress import ProgressBar, percent, sizes, watched


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later each time."""
    clock = itertools.count()
    monkeypatch.setattr("megalm.utils.progress.time", SimpleNamespace(monotonic=lambda: float(next(clock))))


def test_a_line_every_few_seconds_with_the_time_left(seconds: None) -> None:
    said: list[str] = []
    with ProgressBar("reading", 12, say=said.append) as bar:
        for _ in range(12):
            bar.advance()
    assert said == ["reading 5/12  elapsed 0:05  ETA 0:07", "reading 10/12  elapsed 0:10  ETA 0:02"]


def test_what_was_done_before_does_not_count_as_fast(seconds: None) -> None:
    said: list[str] = []
    bar = ProgressBar("step", 400, done=390, say=said.append)
    bar.update(391, "loss 3.2", line_now=True)
    assert said == ["step 391/400  loss 3.2  elapsed 0:01  ETA 0:09"]


def test_another_thing_is_counted_from_the_start(seconds: None) -> None:
    said: list[str] = []
    bar = ProgressBar("tokenizing", None, say=said.append, shown=percent)
    bar.update(0.0, "3 MB/s", line_now=True)
    bar.begin("writing", 1.0)
    bar.update(0.5, line_now=True)
    assert said == ["tokenizing  3 MB/s  elapsed 0:01", "writing 50%  elapsed 0:01  ETA 0:01"]


def test_a_terminal_gets_a_bar_that_goes() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with ProgressBar("reading", 3 * 2**20, console=console, shown=sizes) as bar:
        bar.update(2**20, "a detail")
    assert "reading 1.0 MiB/3.0 MiB" in screen.getvalue()
    assert "a detail" in screen.getvalue()
    assert "ETA" in screen.getvalue()


def test_elsewhere_what_is_quick_says_nothing() -> None:
    written = io.StringIO()
    with ProgressBar("reading", 2, console=Console(file=written)) as bar:
        bar.advance()
        with bar.paused():
            bar.advance()
    assert written.getvalue() == ""


def test_watched_hands_on_everything() -> None:
    assert list(watched("loading")([1, 2, 3])) == [1, 2, 3]
