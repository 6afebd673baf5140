"""A DeepSpeed JSON's `scheduler` section as settings of the run configuration's `schedule` section.

Three of DeepSpeed's schedulers have an exact equal: `schedule.step_convention=deepspeed` has their rate at every step.
A parameter that is left out has DeepSpeed's default; "auto" and null leave the run configuration's value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from megalm.config.validation import shown
from megalm.utils.did_you_mean import did_you_mean

_MIN_WARMUP = 2  # DeepSpeed takes fewer steps for two


@dataclass(frozen=True)
class SchedulerTranslation:
    """The meaning of a `scheduler` section.

    Attributes:
        settings: dotted keys of the run configuration -> values.
        notes: one line each for a fact that is worth knowing, without the file's name.
        problems: one line each for a fact that has no equal; `settings` is empty if there is one.
    """

    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Parameter:
    """One parameter of a scheduler.

    Attributes:
        keys: the run configuration's keys that take its value; empty for a parameter that only has to be valid.
        replaces: other keys for the same fact.
        default: DeepSpeed's; "auto" where it has none.
    """

    keys: tuple[str, ...]
    default: Any
    expected: str
    accepts: Callable[[Any], bool]
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Scheduler:
    kind: Literal["constant", "linear", "cosine"]
    parameters: Mapping[str, _Parameter]
    no_effect: tuple[str, ...] = ()  # keys that this kind does not use


def translate_scheduler(section: Mapping[str, Any]) -> SchedulerTranslation:
    """Translate the `scheduler` section of a DeepSpeed JSON.

    Args:
        section: `type` and `params`, without comments. Without a type DeepSpeed builds no scheduler.
    """
    kind, params = section.get("type"), section.get("params")
    if unknown := [f"scheduler.{key}" for key in section if key not in ("type", "params")]:
        return _refused(f"{', '.join(unknown)}: expected type and params; remove the other keys")
    if kind in (None, "auto"):
        return SchedulerTranslation({}, ("scheduler has no type, so it asks for nothing",) if section else ())
    if params not in (None, "auto") and not isinstance(params, Mapping):
        return _refused(f"scheduler.params={shown(params)}: expected a section with the parameters of {shown(kind)}")
    if not isinstance(params, Mapping):
        params = {}
    scheduler = _SCHEDULERS.get(kind) if isinstance(kind, str) else None
    if scheduler is None:
        return _refused(_no_equal(kind, params))
    if problems := tuple(_problems(kind, scheduler, params)):
        return SchedulerTranslation({}, (), problems)
    settings: dict[str, Any] = {
        "schedule.kind": scheduler.kind,
        "schedule.step_convention": "deepspeed",
        **dict.fromkeys(scheduler.no_effect),
    }
    left: dict[str, tuple[str, ...]] = {}
    for name, parameter in scheduler.parameters.items():
        value = params.get(name, parameter.default)
        if value is None or value == "auto":
            left[name] = parameter.keys
        else:
            settings |= dict.fromkeys(parameter.keys, _tidy(name, value)) | dict.fromkeys(parameter.replaces)
    return SchedulerTranslation(settings, tuple(_notes(kind, params, settings, left)))


def _refused(problem: str) -> SchedulerTranslation:
    return SchedulerTranslation({}, (), (problem,))


def _no_equal(kind: Any, params: Mapping[str, Any]) -> str:
    """The whole section in one line, with the reason and the nearest settings."""
    given = ", ".join(f"{name}={shown(value)}" for name, value in params.items())
    said = f"scheduler.type={shown(kind)}{f' with {given}' if given else ''}"
    known = ", ".join(map(shown, _SCHEDULERS))
    if kind == "OneCycle":
        return (
            f"{said}: its rate rises and falls in stairs or lines and then decays without end, and it cycles Adam's "
            "betas, which no schedule.kind does; remove the section, the nearest is schedule.kind=linear with "
            "schedule.warmup_steps=CYCLE_FIRST_STEP_SIZE and schedule.peak_learning_rate=CYCLE_MAX_LR"
        )
    if kind == "LRRangeTest":
        return f"{said}: its rate rises without end, which no schedule.kind does; remove the section"
    hint = did_you_mean(kind, _SCHEDULERS) if isinstance(kind, str) else ""
    return f"{said}: it is translated for {known} only{hint}; remove the section and set schedule.*"


def _problems(kind: str, scheduler: _Scheduler, params: Mapping[str, Any]) -> Iterator[str]:
    for name, value in params.items():
        said, parameter = f"scheduler.params.{name}={shown(value)}", scheduler.parameters.get(name)
        if parameter is None:
            hint = did_you_mean(name, scheduler.parameters)
            yield f"{said}: {kind} has no such parameter{hint or '; remove it'}"
        elif value is not None and value != "auto" and not parameter.accepts(value):
            yield f"{said}: expected {parameter.expected}"
    defaults = {name: parameter.default for name, parameter in scheduler.parameters.items()}
    low, high = ({**defaults, **params}.get(name) for name in ("warmup_min_lr", "warmup_max_lr"))
    if _is_number(low) and _is_number(high) and low > high:
        yield (
            f"scheduler.params.warmup_min_lr={shown(low)} is above warmup_max_lr={shown(high)}: the warm-up would "
            "lower the rate; exchange them"
        )


def _notes(
    kind: str, params: Mapping[str, Any], settings: Mapping[str, Any], left: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    done = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    yield f'scheduler "{kind}" is {done}: the same rate at every step'
    for name, keys in left.items():
        if name == "total_num_steps":
            yield f"scheduler.params.{name} is not given: the decay ends with train.steps"
        elif name == "warmup_max_lr":
            yield f"scheduler.params.{name} is not given: the peak is optimizer.params.lr, or else {keys[0]}"
        elif keys:
            yield f"scheduler.params.{name} is not given: {' and '.join(keys)} of the run configuration"
    given = params.get("warmup_num_steps")
    if _is_number(given) and given < _MIN_WARMUP:
        yield (
            f"scheduler.params.warmup_num_steps={shown(given)} is {_MIN_WARMUP}: DeepSpeed's warm-up has at least "
            f"{_MIN_WARMUP} steps"
        )
    if (shape := params.get("warmup_type")) not in (None, "auto", "log", "linear"):
        yield f'scheduler.params.warmup_type={shown(shape)} is unknown: "log", as in DeepSpeed'
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        yield "scheduler.params.warmup_max_lr is left out: 0.001, DeepSpeed's default, not optimizer.params.lr"
    end, warmup = settings.get("schedule.decay_end_step"), settings.get("schedule.warmup_steps")
    if end is not None and warmup is not None and end <= warmup:
        yield (
            f"scheduler.params.total_num_steps={end} is not above warmup_num_steps={warmup}: after the warm-up the "
            "rate falls to its final value at once"
        )


def _tidy(name: str, value: Any) -> Any:
    if name == "warmup_num_steps":
        return max(_MIN_WARMUP, int(value))
    if name == "total_num_steps":
        return int(value)
    if name == "warmup_type":
        return "linear" if value == "linear" else "log"
    return float(value)


def _is_number(value: Any) -> TypeGuard[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # not nan, and an integer that a float holds


def _rate(*keys: str, default: Any) -> _Parameter:
    replaces = tuple(key.replace("_learning_rate", "_ratio") for key in keys)
    return _Parameter(keys, default, "a number of at least 0", lambda it: _is_number(it) and it >= 0, replaces)


def _peak(default: Any) -> _Parameter:
    keys = ("schedule.peak_learning_rate",)
    return _Parameter(keys, default, "a number above 0", lambda value: _is_number(value) and value > 0)


def _ratio(key: str, default: float) -> _Parameter:
    replaces = (key.replace("_ratio", "_learning_rate"),)
    return _Parameter((key,), default, "a number from 0 to 1", lambda it: _is_number(it) and 0 <= it <= 1, replaces)


def _steps(key: str, default: Any, least: int) -> _Parameter:
    def accepts(value: Any) -> bool:
        return _is_number(value) and value >= least and float(value).is_integer()

    return _Parameter((key,), default, f"a whole number of at least {least}", accepts)


_WARMUP = {
    "warmup_num_steps": _steps("schedule.warmup_steps", 1000, 0),
    "warmup_type": _Parameter(("schedule.warmup_kind",), "log", '"log" or "linear"', lambda it: isinstance(it, str)),
    "last_batch_iteration": _Parameter(
        (), -1, "-1, the start of the schedule; megalm counts the run's steps itself, remove it", lambda it: it == -1
    ),
}
_DECAY = {"total_num_steps": _steps("schedule.decay_end_step", "auto", 1)}
_INITIAL, _FINAL = "schedule.initial_learning_rate", "schedule.final_learning_rate"
_SCHEDULERS: Mapping[str, _Scheduler] = {
    "WarmupLR": _Scheduler(
        "constant",
        {"warmup_min_lr": _rate(_INITIAL, default=0.0), "warmup_max_lr": _peak("auto"), **_WARMUP},
        ("schedule.decay_steps", "schedule.decay_end_step", "schedule.final_learning_rate", "schedule.final_ratio"),
    ),
    "WarmupDecayLR": _Scheduler(
        "linear",
        {"warmup_min_lr": _rate(_INITIAL, _FINAL, default=0.0), "warmup_max_lr": _peak(0.001), **_WARMUP, **_DECAY},
        ("schedule.decay_steps",),
    ),
    "WarmupCosineLR": _Scheduler(
        "cosine",
        {
            "warmup_min_ratio": _ratio("schedule.initial_ratio", 0.0),
            "cos_min_ratio": _ratio("schedule.final_ratio", 0.0001),
            **_WARMUP,
            **_DECAY,
        },
        ("schedule.decay_steps",),
    ),
}
