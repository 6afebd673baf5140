"""The charts of a run's page: its curves, and the events marked on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megalm.runs.metrics_history import History, Numbers
from megalm.runs.metrics_log import LOSS_OF, TOTAL, Row
from megalm.tracking.report.svg_chart import Chart, Point, Scale, label, running_median, thinned

# Events that are marked, with their names in the legend.
MARKED = {
    "resume": "resumed",
    "rollback": "rolled back",
    "skip": "update skipped",
    "spike": "spike",
    "signal": "signal",
    "warning": "warning",
}
NOT_FINITE = "not-finite"

_BUCKETS = 500
_FAINT_BUCKETS = 150
_MEDIAN_POINTS = 240
_MARK_BUCKETS = 400
# At most this many withdrawn attempts, and validation sets, get their own lines.
_MOST_ABANDONED = 12
_MOST_SETS = 5


@dataclass(frozen=True)
class _Curve:
    """A column of the training rows, drawn as its own chart."""

    column: str
    name: str
    unit: str
    factor: float = 1.0
    logarithmic: bool = False
    median: bool = False
    marks_gaps: bool = False
    wanted: Callable[[Numbers], bool] = lambda values: True


_LOSS = _Curve("loss", "Loss", "nats per token", median=True, marks_gaps=True)
_CURVES = (
    _Curve("lr", "Learning rate", "per step"),
    _Curve("grad_norm", "Gradient norm", "before clipping, logarithmic", 1.0, True, median=True, marks_gaps=True),
    _Curve("tokens_per_second", "Speed", "tokens per second", median=True),
    _Curve("mfu", "MFU", "% of the measured or data-sheet peak", factor=100.0, median=True),
    _Curve("memory_bytes", "Memory", "GiB, highest of any rank so far", factor=1 / 2**30),
    _Curve("expert_load_max", "Fullest expert", "times its equal share, of any layer", median=True),
    _Curve("dropped_tokens", "Dropped tokens", "share of the choices of experts", median=True),
    _Curve("router_entropy", "Router entropy", "nats, mean over tokens and layers", median=True),
    # A scale of 1 in every row means no loss scaling.
    _Curve("loss_scale", "Loss scale", "fp16, logarithmic", logarithmic=True, wanted=lambda it: bool((it != 1).any())),
)
_OF_TRAINING = {"abandoned": "withdrawn later", "steps": "training, each step", "median": "its running median"}


def charts(history: History) -> list[Chart]:
    """Return the charts of all recorded curves, the loss first."""
    steps = history.train["step"]
    others = [row for row in history.events if row.get("event") in MARKED]
    others += [*history.evaluations, *history.tasks]
    last = max([float(steps.max(initial=0.0)), *(float(event_step(row)) for row in others)])
    across = Scale(0.0, max(1.0, last))
    found = [
        _loss_chart(history, across),
        _datasets_chart(history, across),
        _tasks_chart(history, across),
        *(_chart(history, curve, across) for curve in _CURVES),
    ]
    shown = [chart for chart in found if chart is not None]
    ticks = _x_ticks(history, across)
    for chart in shown:
        chart.x_ticks = ticks
        if chart.marks:
            chart.legend.append((f"mark {NOT_FINITE}", "not finite (NaN or infinity)"))
        looks = _mark_events(chart, history.events)
        if chart is shown[0]:
            chart.legend += [(f"mark {look}", MARKED[look]) for look in looks]
        chart.marks.sort(key=lambda mark: mark.left)
    return shown


def _loss_chart(history: History, across: Scale) -> Chart | None:
    step, loss = history.column("step"), history.column("loss")
    curves = _validation_curves(history.evaluations)
    validations = [[point for stretch in stretches for point in stretch] for *_, stretches in curves]
    up = robust_scale(loss, running_median(step, loss, _MEDIAN_POINTS)[1], validations)
    if up is None:
        return None
    chart = Chart(_LOSS.name, _LOSS.unit, across, up, tall=True)
    _draw_training(chart, history, _LOSS)
    looks = {line.look for line in chart.lines}
    chart.legend = [(f"line {look}", name) for look, name in _OF_TRAINING.items() if look in looks]
    for (look, name, stretches), points in zip(curves, validations, strict=True):
        chart.draw(stretches, look)
        chart.dot(points, look, name)
        of_set = "" if look == "validation" else f" on {name}" if look != "ema" else f", {name}"
        chart.legend.append((f"line {look}", f"validation{of_set}"))
    chart.notes = _above(step, loss, up)
    return chart


def _datasets_chart(history: History, across: Scale) -> Chart | None:
    """Return the chart of the training loss by dataset, as running medians; None without a mixture."""
    curves = {name: curve for name in history.datasets if (curve := _dataset_curve(history, name))}
    shown = dict(list(curves.items())[:_MOST_SETS])
    up = robust_scale(np.empty(0), np.empty(0), list(shown.values()))
    if up is None:
        return None
    chart = Chart("Loss by dataset", "nats per token", across, up)
    for number, (name, curve) in enumerate(shown.items()):
        chart.draw([curve], f"set-{number}")
        chart.legend.append((f"line set-{number}", f"training on {name}, running median"))
    if len(curves) > len(shown):
        chart.notes = [f"{len(curves) - len(shown)} more are in metrics.jsonl."]
    return chart


def _tasks_chart(history: History, across: Scale) -> Chart | None:
    """Return the chart of the accuracy on the files of evaluate.tasks; None without any."""
    sets = _by_name(history.tasks, "task", "accuracy", "questions")
    points = {name: [point for stretch in stretches for point in stretch] for name, stretches in sets.items()}
    values = [value for each in points.values() for _, value in each]
    if not values:
        return None
    chart = Chart("Accuracy", "share of questions answered right", across, Scale.around(min(values), max(values)))
    shown = list(sets)[:_MOST_SETS]
    for number, name in enumerate(shown):
        chart.draw(sets[name], f"set-{number}")
        chart.dot(points[name], f"set-{number}", name)
        chance = next(row["chance"] for row in history.tasks if row["task"] == name)
        chart.legend.append((f"line set-{number}", f"{name}, chance {chance:.1%}"))
    if len(sets) > len(shown):
        chart.notes = [f"{len(sets) - len(shown)} more are in metrics.jsonl."]
    return chart


def _dataset_curve(history: History, name: str) -> list[Point]:
    """Return (step, loss): running medians, or each step of a short run."""
    step, loss = history.column("step"), history.column(LOSS_OF + name)
    at, values = running_median(step, loss, _MEDIAN_POINTS)
    if not len(at):
        at, values = step[np.isfinite(loss)], loss[np.isfinite(loss)]
    return list(zip(at.tolist(), values.tolist(), strict=True))


def _chart(history: History, curve: _Curve, across: Scale) -> Chart | None:
    values = history.column(curve.column) * curve.factor
    known = values[np.isfinite(values) & (values > 0 if curve.logarithmic else True)]
    if not len(known) or not curve.wanted(known):
        return None
    up = Scale.around(float(known.min()), float(known.max()), curve.logarithmic)
    chart = Chart(curve.name, curve.unit, across, up)
    _draw_training(chart, history, curve)
    return chart


def _draw_training(chart: Chart, history: History, curve: _Curve) -> None:
    """Draw withdrawn attempts, then the curve, then its running median; an isolated step is a dot."""
    _draw_abandoned(chart, history, curve)
    step, values = history.column("step"), history.column(curve.column) * curve.factor
    stretches, not_finite = thinned(step, values, chart.across, _BUCKETS)
    look = "steps" if curve.median else "median"
    chart.draw(stretches, look)
    chart.dot((points[0] for points in stretches if len(points) == 1), look)
    if curve.median:
        at, medians = running_median(step, values, _MEDIAN_POINTS)
        chart.draw([list(zip(at.tolist(), medians.tolist(), strict=True))], "median")
    if curve.marks_gaps:
        for place in not_finite:
            chart.mark(place, NOT_FINITE, "not finite")


def _draw_abandoned(chart: Chart, history: History, curve: _Curve) -> None:
    """Draw the rows that resumes and rollbacks withdrew, by attempt."""
    gone = ~history.live
    for attempt in np.unique(history.train["attempt"][gone])[-_MOST_ABANDONED:]:
        chosen = gone & (history.train["attempt"] == attempt)
        step, values = history.train["step"][chosen], history.train[curve.column][chosen] * curve.factor
        # A run that starts again from step 0 may have the same attempt number.
        breaks = np.flatnonzero(np.diff(step) < 0) + 1
        for part_step, part in zip(np.split(step, breaks), np.split(values, breaks), strict=True):
            stretches, _ = thinned(part_step, part, chart.across, _FAINT_BUCKETS)
            chart.draw(stretches, "abandoned", f"attempt {attempt:.0f}")


def _mark_events(chart: Chart, events: Sequence[Row]) -> list[str]:
    """Mark events, one mark per kind and place, since adjacent marks look like one; return the looks of the marks."""
    places: dict[tuple[str, int], list[Row]] = {}
    for row in events:
        name = str(row.get("event"))
        if name not in MARKED or (name == "skip" and row.get("at_step") is not None):
            continue  # the spike that caused the skip is marked
        left = chart.across.share(float(event_step(row)))
        places.setdefault((name, round(left * _MARK_BUCKETS)), []).append(row)
    for (name, _), rows in places.items():
        more = f" and {len(rows) - 1} more here" if len(rows) > 1 else ""
        chart.mark(event_step(rows[0]), name, f"{MARKED[name]}{more}")
    return list(dict.fromkeys(name for name, _ in places))


def event_step(row: Row) -> int:
    """Return the step that an event is about."""
    step = row.get("at_step", row.get("step"))
    return step if isinstance(step, int) else 0


def _validation_curves(rows: Sequence[Row]) -> list[tuple[str, str, list[list[Point]]]]:
    """Return look, name and (step, loss) points: of all sets together, of each, and with the average of the weights.

    The points are in stretches over the same number of tokens: a loss over others is not on the same line.
    """
    sets = _by_name(rows, "dataset", "loss", "targets")
    average = _by_name(rows, "dataset", "ema_loss", "targets").get(TOTAL)
    names = sorted(sets, key=lambda name: name != TOTAL)[: _MOST_SETS + 1]
    looks = ["validation" if name == TOTAL else f"set-{number % _MOST_SETS}" for number, name in enumerate(names)]
    curves = [(look, name, sets[name]) for look, name in zip(looks, names, strict=True)]
    return [*curves, ("ema", "average of the weights", average)] if average else curves


def _by_name(rows: Sequence[Row], named: str, column: str, over: str) -> dict[str, list[list[Point]]]:
    """Return name -> (step, value) points, in stretches of the same `over`; values that are not finite are left out."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        value = row.get(column)
        if isinstance(value, (int, float)) and math.isfinite(value):
            sets.setdefault(str(row.get(named) or TOTAL), []).append(row)
    return {
        name: [
            [(float(row.get("step", 0)), float(row[column])) for row in stretch]
            for _, stretch in groupby(found, key=lambda row: row.get(over))
        ]
        for name, found in sets.items()
    }


def robust_scale(loss: Numbers, medians: Numbers, sets: Sequence[Sequence[Point]]) -> Scale | None:
    """Return a scale for nearly all losses: neither a spike nor the first steps must flatten the rest of the curve.

    `_above` reports what is beyond it.
    """
    validations = [y for points in sets for _, y in points]
    known = np.concatenate([loss[np.isfinite(loss)], validations])
    if not len(known):
        return None
    low, usual = float(known.min()), float(np.quantile(known, 0.95))
    smooth = [*medians.tolist(), *validations] if len(medians) else known.tolist()
    highest = min(max(smooth), usual + 2.5 * (usual - low))
    highest = max([highest, *(points[-1][1] for points in sets)])  # at least the last point of each set is inside
    return Scale.around(low, min(float(known.max()), highest + 0.15 * (highest - low)))


def _above(step: Numbers, loss: Numbers, up: Scale) -> list[str]:
    over = np.isfinite(loss) & (loss > up.high)
    if not over.any():
        return []
    at = int(np.where(over, loss, -math.inf).argmax())
    count = int(over.sum())
    beyond = "1 step is" if count == 1 else f"{count:,} steps are"
    return [f"{beyond} above the frame and drawn at its edge; the highest is {loss[at]:,.4f} at step {step[at]:,.0f}."]


def _x_ticks(history: History, across: Scale) -> list[tuple[float, str, str]]:
    """Return ticks of steps, with the tokens read until then."""
    step, tokens = history.column("step"), history.column("tokens")
    known = np.isfinite(tokens)
    step, tokens = np.append(0.0, step[known]), np.append(0.0, tokens[known])
    ticks = []
    for value, text in across.ticks_to_end(whole=True):
        tokens_text = label(float(np.interp(value, step, tokens))) if 0 < value <= step[-1] else ""
        ticks.append((across.percent(value), text, tokens_text))
    return ticks
