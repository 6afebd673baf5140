"""Which curves a run's page shows, and what is marked on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megalm.runs.metrics_history import History, Numbers
from megalm.runs.metrics_log import Row
from megalm.tracking.compare_runs import TOTAL
from megalm.tracking.report.svg_chart import (
    Chart,
    Line,
    Mark,
    Point,
    Scale,
    dots,
    label,
    path,
    running_median,
    short,
    thinned,
)

# Events that are marked, and what a reader is told they are.
MARKED = {
    "resume": "resumed",
    "rollback": "rolled back",
    "skip": "update skipped",
    "spike": "spike",
    "signal": "signal",
    "warning": "warning",
}
NO_NUMBER = "no-number"

_BUCKETS = 500
_FAINT_BUCKETS = 150
_MEDIAN_POINTS = 240
_MARK_BUCKETS = 400
# Attempts that were taken back, and validation sets, that get lines of their own.
_MOST_ABANDONED = 12
_MOST_SETS = 5


@dataclass(frozen=True)
class _Curve:
    """A column of the training rows as a chart of its own."""

    column: str
    name: str
    unit: str
    factor: float = 1.0
    logarithmic: bool = False
    median: bool = False
    wanted: Callable[[Numbers], bool] = lambda values: True


_CURVES = (
    _Curve("lr", "Learning rate", "per step"),
    _Curve("grad_norm", "Gradient norm", "before clipping, logarithmic", logarithmic=True, median=True),
    _Curve("tokens_per_second", "Speed", "tokens per second", median=True),
    _Curve("mfu", "MFU", "% of the peak that was measured or is known", factor=100.0, median=True),
    _Curve("memory_bytes", "Memory", "GiB, highest of a rank so far", factor=1 / 2**30),
    # One value in every row says that nothing was scaled.
    _Curve("loss_scale", "Loss scale", "fp16, logarithmic", logarithmic=True, wanted=lambda it: bool((it != 1).any())),
)


def charts(history: History) -> list[Chart]:
    """The loss first; only what was recorded."""
    steps = history.train["step"]
    others = [row for row in history.events if row.get("event") in MARKED] + history.evaluations
    last = max([float(steps.max(initial=0.0)), *(float(event_step(row)) for row in others)])
    across = Scale(0.0, max(1.0, last))
    found = [_loss_chart(history, across), *(_chart(history, curve, across) for curve in _CURVES)]
    shown = [chart for chart in found if chart is not None]
    ticks, marks = _x_ticks(history, across), _marks(history.events, across)
    for chart in shown:
        chart.x_ticks, chart.marks = ticks, sorted([*chart.marks, *marks], key=lambda mark: mark.left)
    if shown and marks:
        looks = dict.fromkeys(mark.look for mark in marks)
        shown[0].legend += [(f"mark {look}", MARKED[look]) for look in looks]
    return shown


def _loss_chart(history: History, across: Scale) -> Chart | None:
    step, loss = history.column("step"), history.column("loss")
    sets = _validation_sets(history.evaluations)
    medians = _points(*running_median(step, loss, _MEDIAN_POINTS))
    up = _robust_scale(loss, medians, list(sets.values()))
    if up is None:
        return None
    lines = _abandoned(history, "loss", across, up)
    legend = [("line abandoned", "taken back later")] if lines else []
    curve = thinned(step, loss, across.low, across.high, _BUCKETS)
    if curve.stretches:
        lines += _lines(curve.stretches, "steps", across, up)
        legend.append(("line steps", "training, each step"))
    if medians:
        lines.append(Line(path([medians], across, up), "median"))
        legend.append(("line median", "its running median"))
    for number, (name, points) in enumerate(sets.items()):
        look = "validation" if name == TOTAL else f"set-{number % _MOST_SETS}"
        lines.append(Line(path([points], across, up), look))
        lines.append(Line(dots(points, across, up), f"{look} dots", name))
        legend.append((f"line {look}", "validation" if name == TOTAL else f"validation on {name}"))
    chart = Chart("Loss", "nats per token", lines, _y_ticks(up), legend=legend, tall=True)
    chart.notes = _above(step, loss, up)
    _mark_no_numbers(chart, curve.no_numbers, across)
    return chart


def _chart(history: History, curve: _Curve, across: Scale) -> Chart | None:
    step, values = history.column("step"), history.column(curve.column) * curve.factor
    known = values[np.isfinite(values) & (values > 0 if curve.logarithmic else True)]
    if not len(known) or not curve.wanted(known):
        return None
    up = Scale.around(float(known.min()), float(known.max()), curve.logarithmic)
    lines = _abandoned(history, curve.column, across, up, curve.factor)
    found = thinned(step, values, across.low, across.high, _BUCKETS)
    lines += _lines(found.stretches, "steps" if curve.median else "median", across, up)
    if curve.median and (medians := _points(*running_median(step, values, _MEDIAN_POINTS))):
        lines.append(Line(path([medians], across, up), "median"))
    chart = Chart(curve.name, curve.unit, lines, _y_ticks(up))
    if curve.column == "grad_norm":
        _mark_no_numbers(chart, found.no_numbers, across)
    return chart


def _lines(stretches: Sequence[Sequence[Point]], look: str, across: Scale, up: Scale) -> list[Line]:
    """The curve, and a dot where a step stands alone: the line there is too short to be seen."""
    alone = [points[0] for points in stretches if len(points) == 1]
    curve = Line(path(stretches, across, up), look)
    return [curve, Line(dots(alone, across, up), f"{look} dots")] if alone else [curve]


def _validation_sets(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Name -> (step, loss); all sets together come first. What is no number is no point."""
    sets: dict[str, list[Point]] = {}
    for row in rows:
        points = sets.setdefault(str(row.get("dataset") or TOTAL), [])
        loss = row.get("loss")
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            points.append((float(row.get("step", 0)), float(loss)))
    names = sorted((name for name, points in sets.items() if points), key=lambda name: name != TOTAL)
    return {name: sets[name] for name in names[: _MOST_SETS + 1]}


def _robust_scale(loss: Numbers, medians: Sequence[Point], sets: Sequence[Sequence[Point]]) -> Scale | None:
    """A frame for nearly everything: neither a spike to 900 nor the first steps of many must press the rest flat.

    What is above is told of.
    """
    validations = [y for points in sets for _, y in points]
    known = np.concatenate([loss[np.isfinite(loss)], validations])
    if not len(known):
        return None
    low, usual = float(known.min()), float(np.quantile(known, 0.95))
    smooth = [*(y for _, y in medians), *validations] if medians else known.tolist()
    highest = min(max(smooth), usual + 2.5 * (usual - low))
    highest = max([highest, *(points[-1][1] for points in sets)])  # of each set at least where it ended
    return Scale.around(low, min(float(known.max()), highest + 0.15 * (highest - low)))


def _above(step: Numbers, loss: Numbers, up: Scale) -> list[str]:
    over = np.isfinite(loss) & (loss > up.high)
    if not over.any():
        return []
    at = int(np.where(over, loss, -math.inf).argmax())
    count = int(over.sum())
    beyond = "1 step is" if count == 1 else f"{count:,} steps are"
    return [f"{beyond} above the frame and drawn at its edge; the highest is {loss[at]:,.4f} at step {step[at]:,.0f}."]


def _abandoned(history: History, column: str, across: Scale, up: Scale, factor: float = 1.0) -> list[Line]:
    """What resumes and rollbacks took back, by attempt."""
    gone = ~history.live
    lines = []
    for attempt in np.unique(history.train["attempt"][gone])[-_MOST_ABANDONED:]:
        chosen = gone & (history.train["attempt"] == attempt)
        step, values = history.train["step"][chosen], history.train[column][chosen] * factor
        # A run that starts again from step 0 may do so under the same number.
        breaks = np.flatnonzero(np.diff(step) < 0) + 1
        for part_step, part in zip(np.split(step, breaks), np.split(values, breaks), strict=True):
            curve = thinned(part_step, part, across.low, across.high, _FAINT_BUCKETS)
            if curve.stretches:
                lines.append(Line(path(curve.stretches, across, up), "abandoned", f"attempt {attempt:.0f}"))
    return lines


def _marks(events: Sequence[Row], across: Scale) -> list[Mark]:
    """One a kind and place: a thousand skips beside each other are a line like one."""
    places: dict[tuple[str, int], list[Row]] = {}
    for row in events:
        name = str(row.get("event"))
        if name not in MARKED or (name == "skip" and row.get("at_step") is not None):
            continue  # the spike that it answers is marked
        left = across.share(float(event_step(row)))
        places.setdefault((name, round(left * _MARK_BUCKETS)), []).append(row)
    found = []
    for (name, _), rows in places.items():
        more = f" and {len(rows) - 1} more here" if len(rows) > 1 else ""
        title = f"step {event_step(rows[0]):,}: {MARKED[name]}{more}"
        found.append(Mark(round(100 * across.share(float(event_step(rows[0]))), 2), name, title))
    return found


def event_step(row: Row) -> int:
    """The step that an event is about."""
    step = row.get("at_step", row.get("step"))
    return step if isinstance(step, int) else 0


def _mark_no_numbers(chart: Chart, steps: Sequence[float], across: Scale) -> None:
    if steps:
        chart.marks += [
            Mark(round(100 * across.share(step), 2), NO_NUMBER, f"step {step:,.0f}: no number") for step in steps
        ]
        chart.legend.append((f"mark {NO_NUMBER}", "no number (NaN or infinite)"))


def _x_ticks(history: History, across: Scale) -> list[tuple[float, str, str]]:
    """Steps, and the tokens that had been seen by then."""
    step, tokens = history.column("step"), history.column("tokens")
    known = np.isfinite(tokens)
    step, tokens = np.append(0.0, step[known]), np.append(0.0, tokens[known])
    values = [value for value, _ in across.ticks() if value == round(value)]
    ticks = []
    for value in values:
        told = short(float(np.interp(value, step, tokens))) if 0 < value <= step[-1] else ""
        ticks.append((round(100 * across.share(value), 2), label(value, values[1] - values[0]), told))
    return ticks


def _y_ticks(up: Scale) -> list[tuple[float, str]]:
    return [(round(100 * up.share(value), 2), text) for value, text in up.ticks() if up.low <= value <= up.high]


def _points(x: Numbers, y: Numbers) -> list[Point]:
    return list(zip(x.tolist(), y.tolist(), strict=True))
