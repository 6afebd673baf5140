"""How long a thread of a matrix product waits awake for the others: set before torch, with its OpenMP, is imported."""

from __future__ import annotations

import os

_STATED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_awake_briefly() -> None:
    """Some ten microseconds instead of milliseconds, unless the environment states something.

    Within a step the other threads are done in microseconds. Where one of them has lost its core to another program,
    the one that waits awake holds the very core that it waits for; asleep, it gives it away. GNU's OpenMP only.
    """
    if not any(name in os.environ for name in _STATED):
        os.environ["GOMP_SPINCOUNT"] = "10000"
