"""The learning rate as a pure function of the step.

Steps count from 1. Warm-up is linear from peak / warmup to the peak at step `warmup_steps`. Then the kind decides, and
step `steps` has the final rate (constant and inverse_sqrt have no final rate of their own).

A run that continues with another schedule has several segments, one after the other. Every checkpoint stores them, so
that the rate of each past step is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalm.checkpoint.manifest import StoredScheduleSegment
from megalm.config.schema import ScheduleKind


@dataclass(frozen=True)
class ScheduleFacts:
    """A learning-rate schedule: the YAML's, with the JSON's lr, if given, as its peak."""

    kind: ScheduleKind
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_steps: int
    steps: int


@dataclass(frozen=True)
class ScheduleSegment:
    """One schedule, used from a step on.

    Attributes:
        first_step: of the run, from 1.
        offset_steps: the run's steps before step 1 of the schedule: 0 if the schedule counts the run's steps,
            `first_step` - 1 if it starts anew.
    """

    first_step: int
    offset_steps: int
    schedule: ScheduleFacts

    @property
    def last_step(self) -> int:
        """The run's step at which this schedule ends."""
        return self.offset_steps + self.schedule.steps

    def as_json(self) -> dict[str, Any]:
        return {"first_step": self.first_step, "offset_steps": self.offset_steps, **asdict(self.schedule)}

    @staticmethod
    def of(stored: StoredScheduleSegment) -> ScheduleSegment:
        facts = {name: getattr(stored, name) for name in ScheduleFacts.__dataclass_fields__}
        return ScheduleSegment(stored.first_step, stored.offset_steps, ScheduleFacts(**facts))

    def __str__(self) -> str:
        facts = self.schedule
        own = f"{facts.kind} from {facts.peak_learning_rate:.3g}"
        if facts.kind not in ("constant", "inverse_sqrt"):
            own += f" to {facts.final_learning_rate:.3g} at step {self.last_step:,}"
        warmup = f" after {facts.warmup_steps:,} steps of warm-up" if facts.warmup_steps else ""
        return f"from step {self.first_step:,}: {own}{warmup}"


def rate_at(segments: Sequence[ScheduleSegment], step: int) -> float:
    """Return the rate of step `step` of a run, 1 <= step, from the last segment that has begun by then."""
    current = [segment for segment in segments if segment.first_step <= step][-1]
    return learning_rate(current.schedule, step - current.offset_steps)


def learning_rate(schedule: ScheduleFacts, step: int) -> float:
    """Return the rate of optimizer step `step`, 1 <= step; after the last step the rate stays the same."""
    assert step >= 1, step
    if step < schedule.warmup_steps:
        return schedule.peak_learning_rate * step / schedule.warmup_steps
    return _KINDS[schedule.kind](schedule, min(step, schedule.steps))


def _line(first: float, last: float, step: int, start: int, end: int) -> float:
    """Interpolate linearly from `first` at step `start` to `last` at step `end`."""
    return first + (last - first) * ((step - start) / (end - start) if end > start else 1.0)


def _cosine(schedule: ScheduleFacts, step: int) -> float:
    progress = _line(0.0, 1.0, step, schedule.warmup_steps, schedule.steps)
    height = schedule.peak_learning_rate - schedule.final_learning_rate
    return schedule.final_learning_rate + height * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(schedule: ScheduleFacts, step: int) -> float:
    ends = schedule.peak_learning_rate, schedule.final_learning_rate
    return _line(*ends, step, schedule.warmup_steps, schedule.steps)


def _constant(schedule: ScheduleFacts, step: int) -> float:
    return schedule.peak_learning_rate


def _wsd(schedule: ScheduleFacts, step: int) -> float:
    """Warm-up, stable, decay (Hu et al., 2024): the peak until the last `decay_steps`, then a straight line down."""
    start = max(schedule.warmup_steps, schedule.steps - schedule.decay_steps)
    if step <= start:
        return schedule.peak_learning_rate
    return _line(schedule.peak_learning_rate, schedule.final_learning_rate, step, start, schedule.steps)


def _inverse_sqrt(schedule: ScheduleFacts, step: int) -> float:
    """peak x sqrt(warmup / step), as in Vaswani et al., 2017."""
    return schedule.peak_learning_rate * math.sqrt(max(schedule.warmup_steps, 1) / step)


_KINDS: dict[ScheduleKind, Callable[[ScheduleFacts, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
