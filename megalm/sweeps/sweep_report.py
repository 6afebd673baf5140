"""The result of a sweep: its ranking as a table, in a sentence, as JSON, and a page with the effect of each value."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalm.runs.metrics_log import METRICS_FILE
from megalm.runs.run_folder import ResumeCommand
from megalm.sweeps.expansion import SEED, Sweep
from megalm.sweeps.ranking import Entry, RankedRun, Ranking, ValueEffect, effects, rank, score_runs
from megalm.sweeps.sweep_folder import SweepFolder, state_of
from megalm.tracking.compare_runs import RunRecord, incomparable, read_run
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sync_state import STATE_FILE, MetricValue, MirrorState
from megalm.tracking.report.comparison import ComparisonPage, PageTable, write_comparison
from megalm.tracking.report.svg_chart import Chart, Scale, label

# From this ratio of the largest to the smallest value on, an axis is logarithmic.
_WIDE = 8.0


def begun_runs(sweep: Sweep) -> list[Path]:
    """Return the folders of the runs that have written a row."""
    folders = [sweep.root / run.name for run in sweep.runs]
    return [folder for folder in folders if (folder / METRICS_FILE).is_file()]


def read_ranking(sweep: Sweep, read_runs: Callable[[Sequence[Path]], list[RunRecord]] | None = None) -> Ranking:
    """Read the runs of a sweep and rank them.

    Args:
        read_runs: reads run folders; None: one after another.

    Raises:
        DataError, ConfigError: a file of a run is damaged.
    """
    folders = begun_runs(sweep)
    records = list(map(read_run, folders)) if read_runs is None else read_runs(folders)
    known = {folder.name: record for folder, record in zip(folders, records, strict=True)}
    found = [(run, state_of(sweep.root / run.name), known.get(run.name)) for run in sweep.runs]
    return rank(*score_runs(found))


def ranking_rows(ranking: Ranking, axes: Sequence[str]) -> tuple[list[str], list[list[object]]]:
    """Return headings and rows: the entries by score, then the runs without one."""
    swept = [key for key in axes if key != SEED]
    headings = ["", *swept, *(["seeds"] if SEED in axes else []), ranking.scored_by, "standard error", "from the best"]
    rows: list[list[object]] = []
    for number, entry in enumerate(ranking.entries, 1):
        seeds: list[object] = [len(entry.runs)] if SEED in axes else []
        values = [entry.values.get(key) for key in swept]
        error = None if entry.stderr is None else f"{entry.stderr:.4f}"
        rows.append([number, *values, *seeds, f"{entry.score:.4f}", error, _from_best(ranking, entry)])
    for run in ranking.rest:
        seeds = [run.run.values.get(SEED)] if SEED in axes else []
        rows.append([None, *(run.run.values.get(key) for key in swept), *seeds, None, None, _without_score(run)])
    return headings, rows


def verdict(ranking: Ranking) -> str:
    """Return the best entry in a sentence, with its uncertainty and those that it cannot be told from."""
    best = ranking.best
    if best is None:
        return "No run is finished yet, so none is the best."
    error = f" ± {best.stderr:.4f}" if best.stderr is not None else ""
    text = f"Best: {_values(best)}, {ranking.scored_by} {best.score:.4f}{error}"
    text += f" (mean of {len(best.runs)} seeds)." if len(best.runs) > 1 else "."
    others = ranking.entries[1:]
    alike = [entry for entry in others if ranking.equals_best(entry)]
    if not others:
        return text
    if any(ranking.noise(entry) is None for entry in others):
        return f"{text} The uncertainty is not known: add train.seed=1,2,3 to the sweep."
    of = "seeds" if ranking.by_seeds else "validation samples, one seed each"
    if alike:
        return f"{text} No difference within the noise ({of}) from: {'; '.join(_values(entry) for entry in alike)}."
    return f"{text} It differs from all others by more than the noise ({of})."


def summary(sweep: Sweep, ranking: Ranking) -> dict[str, Any]:
    """Return the result as JSON would have it."""
    best = ranking.best
    return {
        "sweep": sweep.name,
        "axes": {key: list(values) for key, values in sweep.axes.items()},
        "scored_by": ranking.scored_by,
        "uncertainty": None if best is None or best.stderr is None else "seeds" if ranking.by_seeds else "samples",
        "best": None if best is None else _entry(ranking, best),
        "ranking": [_entry(ranking, entry) for entry in ranking.entries],
        "unranked": [{"run": it.run.name, "values": dict(it.run.values), "state": it.state} for it in ranking.rest],
        "effects": {
            key: [vars(effect) for effect in effects(ranking, key)] for key in sweep.axes if key != SEED
        },
    }  # fmt: skip


def write_sweep_page(sweep: Sweep, ranking: Ranking) -> Path:
    """Write report.html in the sweep's folder; return its path."""
    path = SweepFolder(sweep.folder).report
    known = [(run.run.name, run.record) for run in ranking.runs if run.record is not None]
    headings, rows = ranking_rows(ranking, list(sweep.axes))
    best = frozenset(index for index, entry in enumerate(ranking.entries) if ranking.equals_best(entry)) or frozenset(
        range(len(ranking.entries[:1]))
    )
    note = "In bold: the best, and what does not differ from it within the noise."
    names, records = [name for name, _ in known], [record for _, record in known]
    waiting = len(ranking.rest)
    page = ComparisonPage(
        title=f"Sweep {sweep.name}",
        verdict=verdict(ranking) + (f" {waiting} of {len(sweep.runs)} runs have no result." if waiting else ""),
        kind="finished" if not waiting else "stopped",
        warnings=incomparable(records, names),
        tables=[("Ranking", PageTable(headings, rows, best, note))],
        effects=[chart for key in sweep.axes if key != SEED and (chart := effect_chart(ranking, key)) is not None],
        commands=_commands(sweep, ranking),
    )
    write_comparison(path, page, records, names)
    return path


def effect_chart(ranking: Ranking, key: str) -> Chart | None:
    """Return the chart of a key's effect: scores over its values; None with fewer than two values with a score."""
    found = effects(ranking, key)
    if len(found) < 2:
        return None
    places, across = _places([effect.value for effect in found])
    dots = [(places[run.run.values[key]], run) for run in ranking.runs if run.score is not None]
    ends = [effect.score + sign * (effect.stderr or 0.0) for effect in found for sign in (-1, 1)]
    scores = [run.score for _, run in dots if run.score is not None]
    chart = Chart(key, ranking.scored_by, across, _closely(min([*scores, *ends]), max([*scores, *ends])))
    for x, run in dots:
        chart.dot([(x, run.score or 0.0)], "validation", f"{run.run.name}: {run.score:.4f}")
    ordered = sorted(found, key=lambda effect: places[effect.value])
    chart.draw([[(places[effect.value], effect.score) for effect in ordered]], "median")
    for effect in ordered:
        x, title = places[effect.value], f"{effect.value}: {effect.score:.4f}, mean of {effect.count}"
        if effect.stderr is not None:
            chart.draw([[(x, effect.score - effect.stderr), (x, effect.score + effect.stderr)]], "median", title)
    chart.x_ticks = [(across.percent(places[effect.value]), _tick(effect), "") for effect in ordered]
    return chart


def _closely(low: float, high: float) -> Scale:
    """Return a scale that shows small differences: it does not begin at 0."""
    room = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
    return Scale(low - room, high + room)


def _places(values: Sequence[str]) -> tuple[dict[str, float], Scale]:
    """Return the place of each value: by its size, if all are numbers, else side by side."""
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        return {value: float(index) for index, value in enumerate(values)}, Scale(-0.5, len(values) - 0.5)
    places = {value: number for value, number in zip(values, numbers, strict=True) if number is not None}
    low, high = min(places.values()), max(places.values())
    if low > 0 and high / low >= _WIDE:
        return places, Scale.around(low, high, logarithmic=True)
    room = 0.08 * (high - low)
    return places, Scale(low - room, high + room)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _tick(effect: ValueEffect) -> str:
    number = _number(effect.value)
    return label(number) if number is not None else effect.value.rpartition("/")[2][-24:]


def _values(entry: Entry) -> str:
    return ", ".join(f"{key}={value}" for key, value in entry.values.items()) or "any seed"


def _from_best(ranking: Ranking, entry: Entry) -> str | None:
    if ranking.best is None or entry is ranking.best:
        return None
    difference = f"+{entry.score - ranking.best.score:.4f}"
    return f"{difference}, no difference" if ranking.equals_best(entry) else difference


def _without_score(run: RankedRun) -> str:
    return f"{run.state}: {run.run.name}" if run.state != "finished" else f"no finite loss: {run.run.name}"


def _entry(ranking: Ranking, entry: Entry) -> dict[str, Any]:
    return {
        "values": dict(entry.values),
        "runs": [run.run.name for run in entry.runs],
        "score": entry.score,
        "stderr": entry.stderr,
        "noise": ranking.noise(entry),
        "differs_from_best": ranking.noise(entry) is not None and not ranking.equals_best(entry),
    }


def _commands(sweep: Sweep, ranking: Ranking) -> list[tuple[str, str]]:
    folder = str(sweep.folder)
    rows = [("compare in the terminal", shlex.join(["megalm", "compare", "--sweep", folder]))]
    if ranking.rest:
        rows.append(("run what is missing", shlex.join(["megalm", "sweep", folder])))
    if ranking.best is not None:
        best = sweep.root / ranking.best.runs[0].run.name
        rows.append(("page of the best run", shlex.join(["megalm", "report", str(best)])))
        rows.append(("train the best longer", ResumeCommand(best).shell("--resume", "auto", "train.steps=N")))
    return rows


def send_sweep_result(sweep: Sweep, ranking: Ranking, page: Path) -> bool:
    """Send a ranking and its page to the MLflow run of a sweep; return False if none of its runs is in MLflow.

    Any exception means: try again later.
    """
    found = [(run, MirrorState.load(run / STATE_FILE)) for run in begun_runs(sweep)]
    tracked = [(run, state) for run, state in found if state.run_id is not None]
    if not tracked:
        return False
    from megalm.tracking.mlflow_mirror.client import MlflowStore  # loads MLflow, which takes seconds

    run, state = tracked[-1]
    store = MlflowStore(run_facts.tracking_uri(run, state)[0], run.resolve().parent)
    tags = store.run_tags(str(state.run_id)) or {}
    parent = tags.get(run_facts.PARENT_TAG)
    if parent is None or tags.get(run_facts.SWEEP_TAG) != str(sweep.folder.resolve()):
        return False
    best = ranking.best
    name = "none yet" if best is None else best.runs[0].run.name
    store.set_tags(parent, {run_facts.NOTE_TAG: verdict(ranking), "megalm.best_run": name})
    if best is not None:
        metric = run_facts.clean_name(f"best/{ranking.scored_by.replace(' ', '_')}")
        store.log_metrics(parent, [MetricValue(metric, best.score, 0, int(time.time() * 1000))])
    store.upload(parent, page, None)
    return True
