"""The signals that ask a run to stop: a rank saves and exits at them, a process beside it ignores them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

# Slurm's and launchers' SIGTERM, Ctrl-C, Slurm's warning before the time limit, and a terminal that closes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def respected_stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals to stop at: without SIGHUP where `nohup` made the process ignore it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignores_hangup)


def answer_stop_signals() -> None:
    """End this process at stop signals, as usual, though the launcher that started it ignores them itself."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def handled_stop_signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handle` at stop signals inside the context."""
    before = {number: signal.signal(number, handle) for number in respected_stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
