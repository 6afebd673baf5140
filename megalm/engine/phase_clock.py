"""The phases of a training step: their names in a profile, and their seconds where a run asks for them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from megalm.engine.device import wait_for
from megalm.engine.interface import PROFILED_PHASE


class PhaseClock:
    """Use as `with clock("forward"):`.

    Args:
        measures: add up seconds; on a GPU each phase then waits for the device before and after it. Without it only
            a profiler that records sees the phase.
    """

    def __init__(self, device: torch.device, measures: bool) -> None:
        self._device = device
        self._measures = measures
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with record_function(f"{PROFILED_PHASE}{phase}"):
            if not self._measures:
                yield
                return
            start = self._now()
            yield
            self._seconds[phase] += self._now() - start

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last reading."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _now(self) -> float:
        wait_for(self._device)
        return time.perf_counter()
