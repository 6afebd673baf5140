"""The learning rate as a pure function of the step.

Steps count from 1. Warm-up is linear from the initial rate at step 0, or logarithmic from the initial rate at step 1,
to the peak at step `warmup_steps`. Then the kind decides, and step `decay_end` has the final rate (constant and
inverse_sqrt have no final rate of their own).

By DeepSpeed's convention the rates are those that its engine uses: its scheduler begins at index -1 and steps after
each update, so step s has index s - 2, and steps 1 and 2 have the initial rate (of a cosine, step 1 has 0).

A run that continues with another schedule has several segments, one after the other. Every checkpoint stores them, so
that the rate of each past step is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from megalm.checkpoint.manifest import StoredScheduleSegment
from megalm.config.schema import ScheduleKind, StepConvention, WarmupKind

ENDLESS: tuple[ScheduleKind, ...] = ("constant", "inverse_sqrt")  # kinds without a final rate of their own


@dataclass(frozen=True)
class ScheduleFacts:
    """A learning-rate schedule: the YAML's, with the JSON's lr, if given, as its peak.

    Attributes:
        steps: its length; `decay_end_step` may come before or after it.
    """

    kind: ScheduleKind
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_steps: int
    steps: int
    warmup_kind: WarmupKind = "linear"
    initial_learning_rate: float = 0.0
    decay_end_step: int | None = None
    step_convention: StepConvention = "standard"

    def as_json(self) -> dict[str, Any]:
        """Return the fields for a manifest, without newer ones at their defaults: older versions compare all keys."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        }

    @property
    def decay_end(self) -> int:
        return self.decay_end_step or self.steps

    @property
    def peak_step(self) -> int:
        """The first step with the peak, as far as the kind has one."""
        return self.warmup_steps + (_LAG if self.step_convention == "deepspeed" else 0)

    @property
    def final_step(self) -> int:
        """The first step with the final rate; it may lie behind the last step."""
        return self.decay_end + (_DECAY_LAG[self.kind] if self.step_convention == "deepspeed" else 0)

    @property
    def turns(self) -> set[int]:
        """The steps at which the rate begins, turns and ends; 0 and steps behind the last are possible."""
        turns = {1, self.peak_step, self.final_step, self.steps}
        if self.kind == "wsd":
            turns.add(self.decay_end - self.decay_steps)
        return turns


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
        return {"first_step": self.first_step, "offset_steps": self.offset_steps, **self.schedule.as_json()}

    @staticmethod
    def of(stored: StoredScheduleSegment) -> ScheduleSegment:
        facts = {name: getattr(stored, name) for name in ScheduleFacts.__dataclass_fields__}
        return ScheduleSegment(stored.first_step, stored.offset_steps, ScheduleFacts(**facts))

    def __str__(self) -> str:
        facts = self.schedule
        own = f"{facts.kind} from {facts.peak_learning_rate:.3g}"
        if facts.kind not in ENDLESS:
            own += f" to {facts.final_learning_rate:.3g} at step {self.offset_steps + facts.final_step:,}"
        shape = "logarithmic " if facts.warmup_kind == "log" else ""
        warmup = f" after {facts.warmup_steps:,} steps of {shape}warm-up" if facts.warmup_steps else ""
        if warmup and facts.initial_learning_rate:
            warmup += f" from {facts.initial_learning_rate:.3g}"
        steps = ", with DeepSpeed's steps" if facts.step_convention == "deepspeed" else ""
        return f"from step {self.first_step:,}: {own}{warmup}{steps}"


def rate_at(segments: Sequence[ScheduleSegment], step: int) -> float:
    """Return the rate of step `step` of a run, 1 <= step, from the last segment that has begun by then."""
    current = [segment for segment in segments if segment.first_step <= step][-1]
    return learning_rate(current.schedule, step - current.offset_steps)


def learning_rate(schedule: ScheduleFacts, step: int) -> float:
    """Return the rate of optimizer step `step`, 1 <= step; after the last step the rate stays the same."""
    assert step >= 1, step
    if schedule.step_convention == "deepspeed":
        return _deepspeed_rate(schedule, step)
    warmup = schedule.warmup_steps
    if step < warmup:
        rise = schedule.peak_learning_rate - schedule.initial_learning_rate
        if schedule.warmup_kind == "log":
            return schedule.initial_learning_rate + rise * math.log(step) / math.log(warmup)
        return schedule.initial_learning_rate + rise * step / warmup
    return _rate_by_kind(schedule, min(step, schedule.steps, schedule.decay_end))


_LAG = 2  # of DeepSpeed's index behind the step
_DECAY_LAG: dict[ScheduleKind, int] = {"linear": 2, "cosine": 1, "constant": 0}


def _deepspeed_rate(schedule: ScheduleFacts, step: int) -> float:
    """The rate in force at an optimizer step under WarmupLR, WarmupDecayLR or WarmupCosineLR of DeepSpeed 0.19.8."""
    initial, peak, final = schedule.initial_learning_rate, schedule.peak_learning_rate, schedule.final_learning_rate
    index, warmup = min(step, schedule.steps) - _LAG, max(2, schedule.warmup_steps)
    if index < 0:
        return 0.0 if schedule.kind == "cosine" else initial
    if index < warmup:
        share = math.log(index + 1) / math.log(warmup) if schedule.warmup_kind == "log" else index / warmup
        return initial + (peak - initial) * share
    if schedule.kind == "constant":
        return peak
    length = max(1, schedule.decay_end - warmup)
    if schedule.kind == "linear":
        return final + (peak - final) * max(0.0, (schedule.decay_end - index) / length)
    progress = min(1.0, (index - warmup + 1) / length)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _rate_by_kind(schedule: ScheduleFacts, step: int) -> float:
    """The rate of a step behind the warm-up, up to the end of the decay."""
    peak, final, warmup = schedule.peak_learning_rate, schedule.final_learning_rate, schedule.warmup_steps
    start, end = warmup, schedule.decay_end
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "inverse_sqrt":  # as in Vaswani et al., 2017
        return peak * math.sqrt(max(warmup, 1) / step)
    if schedule.kind == "wsd":  # warm-up, stable, decay (Hu et al., 2024): the last `decay_steps` are a line down
        start = max(warmup, end - schedule.decay_steps)
        if step <= start:
            return peak
    progress = (step - start) / (end - start) if end > start else 1.0
    if schedule.kind == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (final - peak) * progress
