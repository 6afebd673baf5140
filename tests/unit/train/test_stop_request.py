"""When a rank that was told to stop leaves without a last checkpoint, and when it must not."""

from __future__ import annotations

import math
import signal
import threading
import time

import pytest

from megalm.train.lifecycle import shutdown
from megalm.train.lifecycle.shutdown import StopRequest
from megalm.train.lifecycle.time_limits import TimeLimits
from megalm.utils.stop_signals import STOP_SIGNALS

SHORT, SOON_SECONDS = 0.05, 10.0


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set in place of the end of the process."""
    left = threading.Event()
    monkeypatch.setattr(shutdown, "_exit_without_cleanup", left.set)
    monkeypatch.setattr(shutdown, "_WATCH_POLL_SECONDS", 0.01)
    return left


def test_the_first_signal_is_kept(left: threading.Event) -> None:
    stop = StopRequest(grace_seconds=3600)
    assert stop.signal is None
    stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGINT, None)  # the launcher passing it on
    assert stop.signal == signal.SIGTERM
    assert not left.is_set()
    stop.reached_boundary()


def test_a_rank_that_comes_no_further_leaves(left: threading.Event) -> None:
    StopRequest(SHORT)._handle(signal.SIGTERM, None)
    assert left.wait(SOON_SECONDS)


@pytest.mark.parametrize("first", [True, False], ids=["signal before the boundary", "signal while it saves"])
def test_nobody_leaves_while_all_save(left: threading.Event, first: bool) -> None:
    """The ranks of a job get their signals one after the other: some when the others have made all save."""
    stop = StopRequest(grace_seconds=0.5)
    order = [lambda: stop._handle(signal.SIGTERM, None), stop.reached_boundary]
    for act in order if first else order[::-1]:
        act()
    assert not left.wait(0.75)


def test_a_save_that_was_under_way_may_end(left: threading.Event) -> None:
    stop = StopRequest(SHORT)
    with stop.saving():
        stop._handle(signal.SIGTERM, None)
        assert not left.wait(5 * SHORT)
    assert left.wait(SOON_SECONDS), "what comes after it may hang"


def test_a_step_may_take_as_long_as_steps_do(left: threading.Event) -> None:
    limits = TimeLimits()
    limits.longest_silence = 1000.0
    stop = StopRequest(SHORT, limits)
    stop._handle(signal.SIGUSR1, None)
    assert not left.wait(5 * SHORT)
    stop.reached_boundary()


class Validating:
    """In place of Limits: a batch has been done just now, whenever somebody asks."""

    longest_silence = 0.0
    ended = False

    @property
    def last_beat(self) -> float:
        return -math.inf if self.ended else time.monotonic()


def test_a_validation_that_goes_on_is_waited_for(left: threading.Event) -> None:
    limits = Validating()
    StopRequest(SHORT, limits)._handle(signal.SIGTERM, None)  # type: ignore[arg-type]
    assert not left.wait(5 * SHORT)
    limits.ended = True
    assert left.wait(SOON_SECONDS)


def test_limits_remember_the_longest_silence() -> None:
    limits = TimeLimits()
    limits.heartbeat()
    assert limits.longest_silence == 0.0, "what came before the first step was no step"
    time.sleep(0.02)
    limits.heartbeat()
    limits.heartbeat()
    assert limits.longest_silence >= 0.02


@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN], ids=["plain", "nohup"])
def test_a_closed_terminal_stops_a_run_unless_it_was_started_with_nohup(inherited: signal.Handlers) -> None:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, inherited)
        StopRequest().install()
        handled = {number for number in STOP_SIGNALS if callable(signal.getsignal(number))}
        expected = set(STOP_SIGNALS) if inherited == signal.SIG_DFL else set(STOP_SIGNALS) - {signal.SIGHUP}
        assert handled == expected
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or inherited == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
