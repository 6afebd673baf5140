"""Ranks that are slower than the others for a while, by their own work: a step takes the same time on all of them.

Every few seconds, at a logged step, the ranks exchange how long each waited for data and how long its device computes:
on a CPU the time of its steps outside collectives, on a GPU that of a fixed matrix product between two steps, which the
device times by itself and which is read at the next exchange.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megalm.communicator import Communicator
from megalm.nodes.collective_clock import CollectiveClock
from megalm.nodes.temperature import device_temperature
from megalm.rank_environment import RankPlace
from megalm.runs.metrics_log import describe_straggler

Quantity = Literal["compute", "data"]

_EXCHANGE_SECONDS = 10.0
_EXCHANGES_TO_REPORT = 4  # at least this many must find a rank slow, however short train.slow_seconds is
_PROBE_SIZE, _PROBE_PRODUCTS = 2048, 20  # about half a millisecond, and 24 MiB


@dataclass(frozen=True)
class RankPace:
    """A rank's means of some steps, in seconds; `compute_seconds` is None where it is not known."""

    step_seconds: float
    data_seconds: float
    compute_seconds: float | None
    temperature: float | None = None


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow for `lasted_seconds`."""

    place: RankPlace
    slow: SlowRank
    lasted_seconds: float
    temperature: float | None

    def fields(self) -> dict[str, Any]:
        """Return the fields of the event."""
        place = {"host": self.place.host, "device": self.place.device}
        return {**vars(self.slow), **place, "lasted_seconds": self.lasted_seconds, "temperature": self.temperature}

    def __str__(self) -> str:
        return describe_straggler(self.fields())


@dataclass(frozen=True)
class SlowRank:
    """A rank that an exchange finds slow."""

    rank: int
    quantity: Quantity
    own_seconds: float
    median_seconds: float


def slow_ranks(paces: Sequence[RankPace], work: Sequence[int], factor: float) -> list[SlowRank]:
    """Return the ranks that take `factor` times the median of those with the same work, or wait so much for data.

    Of two ranks the faster one is the median. Data is compared with the time of a step: twice a millisecond is nothing.

    Args:
        work: of each rank: ranks with the same number do the same.
    """
    found = []
    for kind in dict.fromkeys(work):
        known = {
            rank: seconds
            for rank, (pace, own) in enumerate(zip(paces, work, strict=True))
            if own == kind and (seconds := pace.compute_seconds) is not None
        }
        median = statistics.median_low(known.values()) if known else 0.0
        slow = {rank: seconds for rank, seconds in known.items() if seconds > factor * median}
        found += [SlowRank(rank, "compute", seconds, median) for rank, seconds in slow.items()]
    waits = [pace.data_seconds for pace in paces]
    median = statistics.median_low(waits)
    allowed = median + (factor - 1) * statistics.median_low(pace.step_seconds for pace in paces)
    found += [SlowRank(rank, "data", seconds, median) for rank, seconds in enumerate(waits) if seconds > allowed]
    return found


class SlowTimes:
    """How long each rank has been slow without a break.

    Args:
        factor: of `slow_ranks`.
        seconds: a rank that was slow for so long is reported, once until it has recovered.
    """

    def __init__(self, factor: float, seconds: float) -> None:
        self.factor, self.seconds = factor, seconds
        self._lasted: dict[tuple[int, Quantity], tuple[float, int]] = {}
        self._reported: set[tuple[int, Quantity]] = set()

    def add(self, found: Sequence[SlowRank], elapsed_seconds: float) -> list[tuple[SlowRank, float]]:
        """Take what the exchange after `elapsed_seconds` found; return whom to report, with the seconds so far."""
        before, self._lasted, due = self._lasted, {}, []
        for slow in found:
            key = slow.rank, slow.quantity
            lasted, times = before.get(key, (0.0, 0))
            self._lasted[key] = lasted + elapsed_seconds, times + 1
            is_long = lasted + elapsed_seconds >= self.seconds and times + 1 >= _EXCHANGES_TO_REPORT
            if is_long and key not in self._reported:
                self._reported.add(key)
                due.append((slow, lasted + elapsed_seconds))
        self._reported &= self._lasted.keys()
        return due


class StragglerWatch:
    """Measures this rank's steps, and compares the ranks every few seconds.

    Args:
        clock: of the collectives, on a CPU; None: its computing is not known.
        places: of all ranks.
        work: of all ranks: those with the same number do the same in a step.
        times: decides who is reported.
        interval_steps: exchanges are at multiples of this.
    """

    def __init__(
        self,
        comm: Communicator,
        device: torch.device,
        clock: CollectiveClock | None,
        places: Sequence[RankPlace],
        work: Sequence[int],
        times: SlowTimes,
        interval_steps: int = 1,
    ) -> None:
        self._comm, self._device, self._clock = comm, device, clock
        self._places, self._times, self._interval = places, times, interval_steps
        self._exchange_seconds = min(_EXCHANGE_SECONDS, times.seconds / _EXCHANGES_TO_REPORT)
        self._probe = _Probe(device) if device.type == "cuda" else None
        # Every rank of a GPU multiplies the same matrices, whatever its work in a step is.
        self._work = work if self._probe is None else [0] * len(work)
        self._steps, self._step_seconds, self._data_seconds, self._compute_seconds = -1, 0.0, 0.0, 0.0
        self._waited, self._next_step, self._last = 0.0, 0, time.monotonic()

    def begin_step(self) -> None:
        self._waited = 0.0 if self._clock is None else self._clock.seconds

    def end_step(self, step_seconds: float, data_seconds: float) -> None:
        """Count a step that took `step_seconds`, of which this rank waited `data_seconds` for data."""
        self._steps += 1
        if self._steps == 0:  # the first one compiles and allocates
            self._last = time.monotonic()
            return
        self._step_seconds += step_seconds
        self._data_seconds += data_seconds
        if self._clock is not None:
            self._compute_seconds += step_seconds - data_seconds - (self._clock.seconds - self._waited)

    def exchange(self, step: int) -> list[Straggler]:
        """Collective: call after each step; return whom to report now."""
        if step < self._next_step or step % self._interval or self._steps < 1:
            return []
        paces = self._comm.gather(self._pace())
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        # By numbers that all ranks have, so that all exchange at the same step.
        longest = max(pace.step_seconds for pace in paces)
        self._next_step = step + max(1, math.ceil(self._exchange_seconds / max(longest, 1e-6)))
        found = slow_ranks(paces, self._work, self._times.factor)
        return [
            Straggler(self._places[slow.rank], slow, lasted, paces[slow.rank].temperature)
            for slow, lasted in self._times.add(found, elapsed)
        ]

    def _pace(self) -> RankPace:
        steps = self._steps
        compute = None if self._clock is None else self._compute_seconds / steps
        if self._probe is not None:
            compute = self._probe.read()
            self._probe.start()
        pace = RankPace(
            self._step_seconds / steps, self._data_seconds / steps, compute, device_temperature(self._device)
        )
        self._steps, self._step_seconds, self._data_seconds, self._compute_seconds = 0, 0.0, 0.0, 0.0
        return pace


class _Probe:
    """A matrix product that a GPU does and times between two steps, without the host waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._left, self._right, self._result = (
            torch.rand(_PROBE_SIZE, _PROBE_SIZE, device=device, dtype=torch.float16) for _ in range(3)
        )
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._has_started = False

    def start(self) -> None:
        self._first.record()
        for _ in range(_PROBE_PRODUCTS):
            torch.mm(self._left, self._right, out=self._result)
        self._last.record()
        self._has_started = True

    def read(self) -> float | None:
        """Return the seconds of the last one that was started; None: it is not done."""
        if not self._has_started or not self._last.query():
            return None
        return self._first.elapsed_time(self._last) / 1e3
