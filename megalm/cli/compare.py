"""`megalm compare`: the differences between runs in configuration and results."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megalm.cli.find_run import find_run, is_long, read_watched, warn
from megalm.errors import ConfigError
from megalm.runs.metrics_log import METRICS_FILE
from megalm.runs.run_folder import RunFolder
from megalm.sweeps.sweep_folder import find_sweep
from megalm.sweeps.sweep_report import begun_runs, ranking_rows, read_ranking, summary, verdict
from megalm.tracking import compare_runs
from megalm.tracking.compare_runs import Results, RunRecord
from megalm.tracking.report.comparison import ComparisonPage, PageTable, write_comparison
from megalm.utils.atomic_files import refuse_overwriting_inputs
from megalm.utils.formatting import format_duration, table
from megalm.utils.progress import watched
from megalm.utils.terminal import echo, echo_text

# A difference counts from this multiple of `Results.scatter`; with normal noise, two standard deviations.
_SCATTERS = 3.0


@dataclass(frozen=True)
class _Line:
    """A line of the table.

    Attributes:
        form: formats the number and the difference; None: the line has no difference.
        scatter: the key in `Results.scatter` for the number's scatter over steps.
        difference_form: formats the difference, if it needs another format.
        whole: the table formats the number itself.
        per_token: of losses per token, which do not compare where tokenizers differ.
        validation: of validations, which do not compare over other samples.
    """

    value: Callable[[Results], float | int | None]
    form: Callable[[float], str] | None = None
    scatter: str = ""
    difference_form: Callable[[float], str] | None = None
    whole: bool = False
    per_token: bool = False
    validation: bool = False

    def cell(self, result: Results) -> object:
        value = self.value(result)
        return value if value is None or self.whole or self.form is None else self.form(value)


def _as(form: str) -> Callable[[float], str]:
    return lambda value: format(value, form)


def _seconds(value: float) -> str:
    return f"{'-' if round(value) < 0 else ''}{format_duration(abs(value))}"


def _of_dataset(name: str) -> _Line:
    return _Line(lambda it: it.dataset_losses.get(name), _as(".4f"), per_token=True)


# The lines of the table.
_LINES: dict[str, _Line] = {
    "parameters": _Line(lambda it: it.parameters, _as(","), whole=True),
    "steps": _Line(lambda it: it.steps, _as(","), whole=True),
    "tokens": _Line(lambda it: it.tokens, _as(","), whole=True),
    "tokens per parameter": _Line(lambda it: it.tokens_per_parameter, _as(".2f")),
    "training loss, last": _Line(lambda it: it.final_train_loss, _as(".4f"), "loss", per_token=True),
    "validation loss, last": _Line(lambda it: it.final_validation_loss, _as(".4f"), per_token=True, validation=True),
    "  over tokens": _Line(lambda it: it.validation_targets, whole=True),
    "  standard error": _Line(lambda it: it.validation_stderr, _as(".4f"), per_token=True),
    "  averaged weights": _Line(lambda it: it.validation_ema_loss, _as(".4f"), per_token=True, validation=True),
    "  perplexity": _Line(lambda it: it.final_perplexity, _as(".2f"), per_token=True, validation=True),
    "  bits per byte": _Line(lambda it: it.bits_per_byte, _as(".4f"), validation=True),
    "validation loss, best": _Line(lambda it: it.best_validation_loss, _as(".4f"), per_token=True, validation=True),
    "  at step": _Line(lambda it: it.best_validation_step, whole=True, per_token=True),
    "  best over tokens": _Line(lambda it: it.best_validation_targets, whole=True, per_token=True),
    "tokens/s, median": _Line(lambda it: it.tokens_per_second, _as(".0f"), "tokens_per_second"),
    "step, median seconds": _Line(lambda it: it.step_seconds, _as(".3g"), "step_seconds"),
    "MFU, median": _Line(lambda it: it.mfu, _as(".2%"), "mfu", lambda share: f"{100 * share:.2f} points"),
    "wall time": _Line(lambda it: it.wall_seconds, _seconds),
    "attempts": _Line(lambda it: it.attempts, whole=True),
}


class Horizontal(str, Enum):
    """What losses are plotted over."""

    tokens = "tokens"
    time = "time"
    flops = "flops"


# With more runs than this, the table has a row for each, and these results.
_MOST_COLUMNS = 4
_MAIN_LINES = ("validation loss, last", "  perplexity", "  bits per byte", "tokens", "tokens/s, median", "wall time")


def command(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Two or more run folders, or runs' names under runs/.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", metavar="NAME", help="Compare the runs of this sweep, ranked.")
    ] = None,
    plot: Annotated[Path, typer.Option(help="The file for the plot of the losses.")] = Path("compare.png"),
    over: Annotated[
        Horizontal, typer.Option("--over", help="Plot the losses over tokens, seconds of training, or FLOPs.")
    ] = Horizontal.tokens,
    page: Annotated[
        Path | None,
        typer.Option(
            "--page", metavar="FILE.html", help="Also write a page with the curves at equal tokens, time, FLOPs."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print settings and results as JSON; plot nothing.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line of CSV for each run; plot nothing.")] = False,
) -> None:
    """Compare two or more runs: the differences in configuration and in results.

    For two runs, the last column is the second minus the first. It compares
    speeds and the last training loss with the scatter of single steps. A single
    validation loss per run does not show the effect of the seed.

    Runs with other tokenizers are compared by bits per byte. What else does not
    compare is named: other validation data, means over other numbers of tokens.
    """
    if as_json and as_csv:
        raise ConfigError("--json and --csv exclude each other; give one")
    folders = [find_run(run) for run in runs or []]
    swept = None if sweep is None else find_sweep(sweep).read()[0]
    of_sweep = [] if swept is None else begun_runs(swept)
    if len(folders) + len(of_sweep) < 2:
        raise ConfigError(
            "compare needs two or more runs; `ls runs` lists them"
            if sweep is None
            else f"sweep {sweep} has fewer than two runs that have begun; `megalm sweep {sweep}` runs them"
        )
    drawn = [] if as_json or as_csv else [plot]
    written = [*drawn, *([page] if page is not None else [])]
    refuse_overwriting_inputs(written, [path for folder in (*folders, *of_sweep) for path in RunFolder(folder).records])
    ranking = None if swept is None else read_ranking(swept, read_runs)
    records = read_runs(folders)
    if ranking is not None:
        by_name = {run.run.name: run.record for run in ranking.runs}
        records += [record for folder in of_sweep if (record := by_name[folder.name]) is not None]
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = list(map(str, (*folders, *of_sweep)))  # the same name under two roots
    comparison = Comparison(records, names)
    if page is not None:
        write_comparison(page, comparison.page(), records, names)
    if as_json:
        content = comparison.as_json()
        if swept is not None and ranking is not None:
            content["sweep"] = summary(swept, ranking)
        echo_text(json.dumps(content, indent=2, ensure_ascii=False))
    elif as_csv:
        echo_text(comparison.as_csv(), end="")
    else:
        for line in comparison.warnings:
            warn(f"WARNING: {line}")
        if swept is not None and ranking is not None:
            echo(f"{table(*ranking_rows(ranking, list(swept.axes)))}\n\n{verdict(ranking)}\n")
        echo(comparison.as_text() if len(records) <= _MOST_COLUMNS else table(*comparison.columns()))
        compare_runs.plot_losses(records, plot, names, over.value)
        echo(f"\nlosses over {compare_runs.AXES[over.value]}: {plot}")


class Comparison:
    """Runs side by side.

    Attributes:
        warnings: what of them does not compare.
    """

    def __init__(self, records: Sequence[RunRecord], names: Sequence[str]) -> None:
        self._names = list(names)
        self._differences = compare_runs.differing_settings(records)
        self.warnings = compare_runs.incomparable(records, names)
        self._outcome = [compare_runs.results(record) for record in records]
        self._validations_compare = compare_runs.validations_compare(records)
        per_token = compare_runs.measure_of(records) == "loss"
        self._datasets = sorted({name for outcome in self._outcome for name in outcome.dataset_losses})
        self._lines = {name: line for name, line in _LINES.items() if per_token or not line.per_token}
        for name in self._datasets if per_token else ():
            self._lines[f"training loss on {name}, last tenth"] = _of_dataset(name)
        self._evaluations = list(dict.fromkeys(name for outcome in self._outcome for name in outcome.evaluations))
        for name in self._evaluations:
            if per_token or ", loss of " not in name:
                self._lines[name] = _Line(partial(_evaluation, name=name), _as(".4f"))

    def as_text(self) -> str:
        """The table of the settings that differ, and that of the results."""
        settings = "config.yaml and the DeepSpeed JSONs do not differ"
        if self._differences:
            rows = [[name, *values] for name, values in self._differences.items()]
            settings = table(["setting", *self._names], rows)
        return f"{settings}\n\n{table(*self._results())}"

    def columns(self) -> tuple[list[str], list[list[object]]]:
        """One row for each run, of many: what differs, and the main results."""
        shown = {name: line for name, line in self._lines.items() if name in _MAIN_LINES}
        rows: list[list[object]] = [
            [name, *self._settings(index).values(), *(line.cell(self._outcome[index]) for line in shown.values())]
            for index, name in enumerate(self._names)
        ]
        return ["run", *self._differences, *(name.strip() for name in shown)], rows

    def as_json(self) -> dict[str, Any]:
        runs = [
            {"name": name, "settings": self._settings(index), "results": _facts(self._outcome[index], self._datasets)}
            for index, name in enumerate(self._names)
        ]
        return {"runs": runs, "warnings": self.warnings}

    def as_csv(self) -> str:
        text = io.StringIO()
        facts = [_facts(outcome, self._datasets) for outcome in self._outcome]
        writer = csv.writer(text, lineterminator="\n")
        evaluations = [found.pop("evaluations") for found in facts]
        writer.writerow(["run", *self._differences, *facts[0], *self._evaluations])
        for index, (name, found) in enumerate(zip(self._names, facts, strict=True)):
            evaluated = map(evaluations[index].get, self._evaluations)
            writer.writerow([name, *self._settings(index).values(), *found.values(), *evaluated])
        return text.getvalue()

    def page(self) -> ComparisonPage:
        headings, rows = self._results()
        tables = [("Results", PageTable(headings, rows))]
        if self._differences:
            differing = [[name, *values] for name, values in self._differences.items()]
            tables.insert(0, ("Settings that differ", PageTable(["setting", *self._names], differing)))
        count = len(self._differences)
        sentence = f"{len(self._names)} runs that differ in {count} setting{'' if count == 1 else 's'}."
        return ComparisonPage(" / ".join(self._names[:4]), sentence, warnings=self.warnings, tables=tables)

    def _settings(self, index: int) -> dict[str, str | None]:
        return {key: values[index] for key, values in self._differences.items()}

    def _results(self) -> tuple[list[str], list[list[object]]]:
        headings = ["result", *self._names]
        rows: list[list[object]] = [[name, *map(line.cell, self._outcome)] for name, line in self._lines.items()]
        if len(self._outcome) == 2:
            headings.append("difference")
            rows = [[*row, self._difference(line)] for row, line in zip(rows, self._lines.values(), strict=True)]
        return headings, rows

    def _difference(self, line: _Line) -> str | None:
        if line.validation and not self._validations_compare:
            return None
        return difference(line, *self._outcome)


def _evaluation(results: Results, name: str) -> float | None:
    return results.evaluations.get(name)


def _facts(results: Results, datasets: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of a run by name; null for those that JSON does not have."""
    found = {name: value for name, value in vars(results).items() if name not in ("scatter", "dataset_losses")}
    found |= {f"final_train_loss_of_{name}": results.dataset_losses.get(name) for name in datasets}
    found |= {"tokens_per_parameter": results.tokens_per_parameter, "final_perplexity": results.final_perplexity}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()
    }


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders, long ones at the same time."""
    if sum(is_long(folder / METRICS_FILE) for folder in folders) < 2:
        return [compare_runs.read_run(folder, read_watched) for folder in folders]
    processes = min(len(folders), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        reading = [pool.submit(compare_runs.read_run, folder) for folder in folders]  # before the bar has a thread
        return [run.result() for run in watched("reading runs")(reading)]


def difference(line: _Line, first: Results, second: Results) -> str | None:
    """The second minus the first, in its unit and in percent; None if either is unknown."""
    before, now = line.value(first), line.value(second)
    if line.form is None or before is None or now is None or not (math.isfinite(before) and math.isfinite(now)):
        return None
    if now == before:
        return "none"
    text = (line.difference_form or line.form)(now - before)
    text = text if text.startswith("-") else f"+{text}"
    if before > 0:
        text += f" ({(now - before) / before:+.2%})"
    known = [result.scatter[line.scatter] for result in (first, second) if line.scatter in result.scatter]
    if len(known) == 2 and abs(now - before) <= _SCATTERS * max(known):
        text += ", within the scatter of steps"
    return text
