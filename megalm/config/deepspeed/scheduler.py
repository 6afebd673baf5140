"""The `scheduler` section of a DeepSpeed JSON as settings of the run configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def translate_scheduler(section: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Dotted run keys with their values, notes, and problems of a `scheduler` section.

    A section whose parameters are all "auto" states nothing: the schedule is the run configuration's.
    """
    params = section.get("params") or {}
    stated = [key for key, value in params.items() if value not in ("auto", None)]
    if not stated:
        return {}, [f'scheduler.type={section.get("type")}: its parameters are all "auto", schedule.* holds'], []
    return {}, [], ["the schedule belongs to the run YAML; write schedule.kind and schedule.warmup_steps there"]
