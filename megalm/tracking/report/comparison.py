"""One page about several runs: tables, what does not compare, and the losses at equal tokens, time or FLOPs.

The page has no scripts: which of the three is shown is a choice that the style sheet follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.errors import ConfigError
from megalm.tracking.compare_runs import AXES, UNITS, Across, Curve, Measure, RunRecord, measure_of
from megalm.tracking.report.curves import robust_scale
from megalm.tracking.report.headline import moment
from megalm.tracking.report.page import template
from megalm.tracking.report.svg_chart import FRAME, Chart, Scale, thinned
from megalm.utils.atomic_files import write_atomically, writing_to

# The runs' looks, in order; the rest share one.
_LOOKS = ("median", "validation", "set-0", "set-1", "set-2", "set-3")
_OTHERS = "abandoned"
_BUCKETS = 300
_TEMPLATE = "comparison.html"


@dataclass(frozen=True)
class PageTable:
    """A table; `best`: the rows that stand out."""

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    best: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class ComparisonPage:
    """What stands above the curves.

    Attributes:
        verdict, kind: a sentence, and the class that colours it: finished, running, stopped, failed, unknown.
        warnings: what of the runs does not compare.
        effects: a chart for each swept key.
        commands: name and shell command.
    """

    title: str
    verdict: str
    kind: str = "finished"
    warnings: Sequence[str] = ()
    tables: Sequence[tuple[str, PageTable]] = ()
    effects: Sequence[Chart] = ()
    commands: Sequence[tuple[str, str]] = ()


def write_comparison(path: Path, page: ComparisonPage, runs: Sequence[RunRecord], names: Sequence[str]) -> None:
    """Write the page of these runs, whose order is that of the colours.

    Raises:
        ConfigError: the file cannot be written.
    """
    panels = [(across, AXES[across], charts) for across in AXES if (charts := curves(runs, names, across))]
    text = template(_TEMPLATE).render(page=page, panels=panels, frame=FRAME, made=moment(time.time()))
    content = text.encode("utf-8", errors="replace")
    with writing_to(path, "choose another path", ConfigError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content), durable=False)


def curves(runs: Sequence[RunRecord], names: Sequence[str], across: Across) -> list[Chart]:
    """Return the charts of validation and training losses over tokens, time or FLOPs; [] if nothing is known."""
    measure = measure_of(runs)
    validation = [run.validation_curves(across, measure) for run in runs]
    found = [_chart("Validation loss", measure, across, validation, names, dots=True)]
    if measure == "loss":  # a training loss has no bits per byte
        training = [[curve] if (curve := run.training_curve(across)) else [] for run in runs]
        found.append(_chart("Training loss", measure, across, training, names))
    return [chart for chart in found if chart is not None]


def _chart(
    name: str, measure: Measure, across: Across, runs: Sequence[list[Curve]], names: Sequence[str], dots: bool = False
) -> Chart | None:
    points = [point for curves_of in runs for curve in curves_of for point in curve]
    if not points:
        return None
    ends = [[curve[-1]] for curves_of in runs for curve in curves_of if curve and math.isfinite(curve[-1][1])]
    up = robust_scale(np.array([y for _, y in points]), np.empty(0), ends)
    if up is None:
        return None
    chart = Chart(name, UNITS[measure], Scale(0.0, max(x for x, _ in points) or 1.0), up, tall=True)
    chart.x_ticks = [(chart.across.percent(x), text, "") for x, text in chart.across.ticks_to_end()]
    for index in reversed(range(len(runs))):  # the first is drawn last, above the others
        look = look_of(index)
        for curve in filter(None, runs[index]):
            x, y = np.array(curve).T
            stretches, _ = thinned(x, y, chart.across, _BUCKETS)
            chart.draw(stretches, look, names[index])
            chart.dot((at for part in stretches for at in part if dots or len(part) == 1), look, names[index])
    chart.legend = [(f"line {look_of(index)}", names[index]) for index in range(min(len(runs), len(_LOOKS)))]
    if len(runs) > len(_LOOKS):
        chart.legend.append((f"line {_OTHERS}", f"{len(runs) - len(_LOOKS)} others; point at a line for its name"))
    return chart


def look_of(index: int) -> str:
    return _LOOKS[index] if index < len(_LOOKS) else _OTHERS
