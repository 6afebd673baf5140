"""The learning-rate schedule that two configurations mean: its peak, its lengths, its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalm.checkpoint.manifest import StoredScheduleSegment
from megalm.config.deepspeed.json_reader import DeepSpeedConfig
from megalm.config.loading import LoadedConfig
from megalm.config.schema import ScheduleKind, ScheduleSection


@dataclass(frozen=True)
class ScheduleFacts:
    """The learning-rate schedule in force: the YAML's, or with the JSON's lr as its peak."""

    kind: ScheduleKind
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_steps: int
    steps: int


def fit_warmup(loaded: LoadedConfig) -> tuple[LoadedConfig, list[str]]:
    """Shorten a preset's warm-up with a run that a person made short; planning/checks has refused a person's own.

    In the configuration itself, so that the run folder's YAML, where every value is stated, starts the same run.
    """
    schedule, steps = loaded.config.schedule, loaded.config.train.steps
    if schedule.warmup_steps < steps:
        return loaded, []
    warmup = steps // 10
    source = loaded.sources["schedule.warmup_steps"]
    notice = f"schedule.warmup_steps={schedule.warmup_steps} ({source}) is not below train.steps={steps}: {warmup}"
    config = loaded.config.model_copy(update={"schedule": schedule.model_copy(update={"warmup_steps": warmup})})
    sources = loaded.sources | {"schedule.warmup_steps": f"{source}, shortened"}
    return replace(loaded, config=config, sources=sources), [notice]


def decay_steps_of(schedule: ScheduleSection, steps: int) -> int:
    """How many of `steps` the rate falls in: a fifth, where nothing is stated."""
    return schedule.decay_steps or max(1, steps // 5)


def schedule_facts(loaded: LoadedConfig, ds: DeepSpeedConfig) -> tuple[ScheduleFacts, list[str]]:
    """The schedule of both files together, and a notice where the JSON's rate goes before a preset's."""
    schedule, steps = loaded.config.schedule, loaded.config.train.steps
    peak, notices = schedule.peak_learning_rate, []
    lr = ds.settings.optimizer.params.lr if ds.settings.optimizer else None
    if lr is not None:
        # planning/checks has refused a peak that a person stated as well: here it is a preset's or a default.
        peak = lr
        source = loaded.sources["schedule.peak_learning_rate"]
        notices = [
            f"peak learning rate {lr:g} is optimizer.params.lr of {ds.path}; "
            f"schedule.peak_learning_rate={schedule.peak_learning_rate:g} ({source}) is not used"
        ]
    final = schedule.final_learning_rate if schedule.final_learning_rate is not None else peak / 10
    facts = ScheduleFacts(
        kind=schedule.kind,
        peak_learning_rate=peak,
        final_learning_rate=peak if schedule.kind in ("constant", "inverse_sqrt") else final,
        warmup_steps=schedule.warmup_steps,
        decay_steps=decay_steps_of(schedule, steps),
        steps=steps,
    )
    return facts, notices


# The learning rate as a pure function of the step.
#
# Steps count from 1. Warm-up is linear from peak / warmup to the peak, which step `warmup_steps` has; from there the
# kind decides, and step `steps` has the final rate (constant and inverse_sqrt have no final rate of their own).
#
# A run that is continued with another schedule has several, one after the other: its segments. They are kept in every
# checkpoint, so that the rate of each step of the past can be told.


@dataclass(frozen=True)
class ScheduleSegment:
    """One schedule, in force from a step on.

    Attributes:
        first_step: of the run, from 1.
        offset_steps: the run's steps before the schedule's own first one: 0 where it counts the run's steps,
            `first_step` - 1 where it starts anew.
    """

    first_step: int
    offset_steps: int
    schedule: ScheduleFacts

    @property
    def last_step(self) -> int:
        """Of the run, by this schedule's own length."""
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
    """The rate of step `step` of a run, 1 <= step: the last segment that has begun by then decides."""
    current = [segment for segment in segments if segment.first_step <= step][-1]
    return learning_rate(current.schedule, step - current.offset_steps)


def learning_rate(schedule: ScheduleFacts, step: int) -> float:
    """The rate of optimizer step `step`, 1 <= step; beyond the last step it stays where it ended."""
    assert step >= 1, step
    if step < schedule.warmup_steps:
        return schedule.peak_learning_rate * step / schedule.warmup_steps
    return _KINDS[schedule.kind](schedule, min(step, schedule.steps))


def _line(first: float, last: float, step: int, start: int, end: int) -> float:
    """From `first` at step `start` straight to `last` at step `end`."""
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
