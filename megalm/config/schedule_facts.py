"""The learning-rate schedule that two configurations mean: its peak, its lengths, its end."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalm.config.deepspeed_json import DeepSpeedConfig
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
    """Shorten a preset's warm-up with a run that a person made short; checks.py has refused a person's own.

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
        # checks.py has refused a peak that a person stated as well: here it is a preset's or a default.
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
