"""The learning rate over a run's steps, as a picture: what the name of a schedule promises is seen before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.picture import new_axes, write_picture
from megalm.train.schedule import ScheduleSegment, rate_at

_MOST_POINTS = 2000  # of a picture some 1,300 pixels wide


def points(schedules: Sequence[ScheduleSegment]) -> tuple[list[int], list[float]]:
    """Steps and their rates: every step of a short run, some two thousand of a long one, and each turn."""
    last = schedules[-1].last_step
    steps = set(range(1, last + 1, max(1, last // _MOST_POINTS)))
    for segment in schedules:
        peak = segment.offset_steps + segment.schedule.warmup_steps
        steps |= {segment.first_step - 1, segment.first_step, peak, segment.last_step}
        if segment.schedule.kind == "wsd":
            steps.add(segment.last_step - segment.schedule.decay_steps)
    kept = sorted(step for step in steps if 1 <= step <= last)
    return kept, [rate_at(schedules, step) for step in kept]


def draw_rates(schedules: Sequence[ScheduleSegment], path: Path) -> None:
    """Draw the rate of every step, and a line where a schedule took over from another.

    Raises:
        ConfigError: the file's suffix names no format that can be drawn, or it cannot be written.
    """
    figure, axes = new_axes("step", "learning rate")
    axes.plot(*points(schedules))
    for segment in schedules[1:]:
        axes.axvline(segment.first_step, color="grey", linestyle="--", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title("\n".join(map(str, schedules)), fontsize="medium", loc="left")
    write_picture(figure, path)
