"""The learning-rate schedule that two configurations mean: its peak, its lengths, its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from megalm.checkpoint.manifest import StoredScheduleSegment
from megalm.config.deepspeed.json_reader import DeepSpeedConfig
from megalm.config.loading import LoadedConfig
from megalm.config.schema import ScheduleKind, ScheduleSection, StepConvention, WarmupKind

ENDLESS: tuple[ScheduleKind, ...] = ("constant", "inverse_sqrt")  # kinds without a final rate of their own


@dataclass(frozen=True)
class ScheduleFacts:
    """The learning-rate schedule in force, of both configurations together.

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


def fit_warmup(loaded: LoadedConfig) -> tuple[LoadedConfig, list[str]]:
    """Shorten a preset's warm-up with a run that a person made short; planning/checks has refused a person's own.

    In the configuration itself, so that the run folder's YAML, where every value is stated, starts the same run. A
    warm-up with DeepSpeed's steps that somebody states stays: DeepSpeed's may be longer than a run.
    """
    schedule, steps = loaded.config.schedule, loaded.config.train.steps
    source = loaded.sources["schedule.warmup_steps"]
    if schedule.warmup_steps < steps:
        return loaded, []
    if schedule.step_convention == "deepspeed" and not source.startswith(("default", "preset ")):
        return loaded, []
    warmup = steps // 10
    notice = f"schedule.warmup_steps={schedule.warmup_steps} ({source}) is not below train.steps={steps}: {warmup}"
    config = loaded.config.model_copy(update={"schedule": schedule.model_copy(update={"warmup_steps": warmup})})
    sources = loaded.sources | {"schedule.warmup_steps": f"{source}, shortened"}
    return replace(loaded, config=config, sources=sources), [notice]


def decay_steps_of(schedule: ScheduleSection, steps: int) -> int:
    """How many of `steps` the rate falls in: a fifth, where nothing is stated."""
    return schedule.decay_steps or max(1, steps // 5)


def peak_learning_rate(loaded: LoadedConfig, ds: DeepSpeedConfig) -> tuple[float, str, str]:
    """The peak of both files together, the key that gives it, and the origin of that key.

    A JSON's lr goes before a preset's peak; planning/checks has refused a peak that a person states as well.
    """
    key = "schedule.peak_learning_rate"
    lr = ds.settings.optimizer.params.lr if ds.settings.optimizer else None
    if lr is None:
        return loaded.config.schedule.peak_learning_rate, key, loaded.sources[key]
    return lr, "optimizer.params.lr", ds.path


def schedule_facts(loaded: LoadedConfig, ds: DeepSpeedConfig) -> tuple[ScheduleFacts, list[str]]:
    """The schedule of both files together, and notices of values that are not used or not reached."""
    schedule, steps = loaded.config.schedule, loaded.config.train.steps
    peak, key, _ = peak_learning_rate(loaded, ds)
    notices = []
    if key == "optimizer.params.lr":
        source = loaded.sources["schedule.peak_learning_rate"]
        notices = [
            f"peak learning rate {peak:g} is optimizer.params.lr of {ds.path}; "
            f"schedule.peak_learning_rate={schedule.peak_learning_rate:g} ({source}) is not used"
        ]
    facts = ScheduleFacts(
        kind=schedule.kind,
        peak_learning_rate=peak,
        final_learning_rate=peak if schedule.kind in ENDLESS else _end(schedule, "final", peak, peak / 10),
        warmup_steps=schedule.warmup_steps,
        decay_steps=decay_steps_of(schedule, steps),
        steps=steps,
        warmup_kind=schedule.warmup_kind,
        initial_learning_rate=_end(schedule, "initial", peak, 0.0),
        decay_end_step=schedule.decay_end_step,
        step_convention=schedule.step_convention,
    )
    return facts, [*notices, *_unreached(facts)]


def _end(schedule: ScheduleSection, end: str, peak: float, default: float) -> float:
    rate, ratio = getattr(schedule, f"{end}_learning_rate"), getattr(schedule, f"{end}_ratio")
    return default if rate is None and ratio is None else peak * ratio if rate is None else rate


def _unreached(facts: ScheduleFacts) -> Iterator[str]:
    if facts.step_convention == "deepspeed" and facts.peak_step > facts.steps:
        yield f"train.steps={facts.steps} ends within the warm-up of {facts.warmup_steps} steps: no step has the peak"
    elif facts.decay_end_step is not None and facts.final_step > facts.steps:
        yield (
            f"train.steps={facts.steps} ends before schedule.decay_end_step={facts.decay_end_step}: the last rate is "
            f"{learning_rate(facts, facts.steps):.3g}, not {facts.final_learning_rate:.3g}"
        )
    elif facts.decay_end_step is not None and facts.final_step < facts.steps:
        yield (
            f"schedule.decay_end_step={facts.decay_end_step} is before train.steps={facts.steps}: the rate stays at "
            f"{facts.final_learning_rate:.3g} from step {facts.final_step} on"
        )


# The learning rate as a pure function of the step.
#
# Steps count from 1. Warm-up is linear from the initial rate, which step 0 would have, to the peak, which step
# `warmup_steps` has; a logarithmic one has the initial rate at step 1. From there the kind decides, and step
# `decay_end` has the final rate (constant and inverse_sqrt have no final rate of their own).
#
# By DeepSpeed's convention the rates are those that its engine has in force: its scheduler begins at index -1 and steps
# after each update, so step s has index s - 2, and steps 1 and 2 have the initial rate (for a cosine, step 1 has 0).
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
    """The rate of step `step` of a run, 1 <= step: the last segment that has begun by then decides."""
    current = [segment for segment in segments if segment.first_step <= step][-1]
    return learning_rate(current.schedule, step - current.offset_steps)


def learning_rate(schedule: ScheduleFacts, step: int) -> float:
    """The rate of optimizer step `step`, 1 <= step; beyond the last step it stays where it ended."""
    assert step >= 1, step
    if schedule.step_convention == "deepspeed":
        return _deepspeed_rate(schedule, step)
    warmup = schedule.warmup_steps
    if step < warmup:
        rise = schedule.peak_learning_rate - schedule.initial_learning_rate
        if schedule.warmup_kind == "log":
            return schedule.initial_learning_rate + rise * math.log(step) / math.log(warmup)
        return schedule.initial_learning_rate + rise * step / warmup
    return _KINDS[schedule.kind](schedule, min(step, schedule.steps, schedule.decay_end))


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


def _line(first: float, last: float, step: int, start: int, end: int) -> float:
    """From `first` at step `start` straight to `last` at step `end`."""
    return first + (last - first) * ((step - start) / (end - start) if end > start else 1.0)


def _cosine(schedule: ScheduleFacts, step: int) -> float:
    progress = _line(0.0, 1.0, step, schedule.warmup_steps, schedule.decay_end)
    height = schedule.peak_learning_rate - schedule.final_learning_rate
    return schedule.final_learning_rate + height * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(schedule: ScheduleFacts, step: int) -> float:
    ends = schedule.peak_learning_rate, schedule.final_learning_rate
    return _line(*ends, step, schedule.warmup_steps, schedule.decay_end)


def _constant(schedule: ScheduleFacts, step: int) -> float:
    return schedule.peak_learning_rate


def _wsd(schedule: ScheduleFacts, step: int) -> float:
    """Warm-up, stable, decay (Hu et al., 2024): the peak until the last `decay_steps`, then a straight line down."""
    start = max(schedule.warmup_steps, schedule.decay_end - schedule.decay_steps)
    if step <= start:
        return schedule.peak_learning_rate
    return _line(schedule.peak_learning_rate, schedule.final_learning_rate, step, start, schedule.decay_end)


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
