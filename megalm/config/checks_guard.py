"""Rules about guarding, continuing and ending a run: one function and one message each, as in checks.py."""

from __future__ import annotations

import re
from collections.abc import Callable

from megalm.config.case import Case
from megalm.errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def wall_time_seconds(text: str) -> float:
    """`4h` -> 14400; also `90m`, `1h30m`, `45s`, `2d`.

    Raises:
        ConfigError: anything else, or no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ConfigError(f"train.max_wall_time={text!r} is no duration; write 30m, 4h, 1h30m or 2d")
    return seconds


def wall_time_is_a_duration(case: Case) -> None:
    if (text := case.config.train.max_wall_time) is not None:
        wall_time_seconds(text)


def guard_warms_up_in_its_window(case: Case) -> None:
    guard = case.config.guard
    if guard.warmup_steps > guard.window:
        raise ConfigError(
            f"guard.warmup_steps={guard.warmup_steps} is more than guard.window={guard.window}, so that nothing would "
            "ever be judged; shorten the one or widen the other"
        )


def guard_limit_has_both_numbers(case: Case) -> None:
    guard = case.config.guard
    if (guard.stop_above is None) != (guard.after_step is None):
        stated, absent = ("stop_above", "after_step") if guard.after_step is None else ("after_step", "stop_above")
        raise ConfigError(
            f"guard.{stated}={getattr(guard, stated):g} needs guard.{absent}: a high loss counts after some steps "
            "only, for example guard.stop_above=7 guard.after_step=1000"
        )


def rollback_has_where_to_go(case: Case) -> None:
    if case.config.guard.policy == "rollback" and case.config.checkpoint.interval_steps is None:
        raise ConfigError(
            "guard.policy=rollback goes back to a checkpoint, and none is written before the end; state "
            "checkpoint.interval_steps"
        )


GUARD_RULES: tuple[Callable[[Case], None], ...] = (
    wall_time_is_a_duration,
    guard_warms_up_in_its_window,
    guard_limit_has_both_numbers,
    rollback_has_where_to_go,
)
