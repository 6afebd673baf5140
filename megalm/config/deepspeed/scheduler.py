"""The `scheduler` section of a DeepSpeed JSON as settings of the run configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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


def translate_scheduler(section: Mapping[str, Any]) -> SchedulerTranslation:
    """Translate a section whose parameters are all "auto": the schedule is the run configuration's."""
    params = section.get("params") or {}
    if isinstance(params, Mapping) and all(value in ("auto", None) for value in params.values()):
        return SchedulerTranslation({}, ("its parameters are not set: schedule.* of the run configuration applies",))
    return SchedulerTranslation({}, (), ("the schedule is the run configuration's; state schedule.kind there",))
