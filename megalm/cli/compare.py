"""`megalm compare`: the differences between runs in configuration and results."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import typer

from megalm.cli.find_run import find_run, is_long, read_watched
from megalm.errors import ConfigError
from megalm.runs.metrics_log import METRICS_FILE
from megalm.runs.run_folder import RunFolder
from megalm.tracking import compare_runs
from megalm.tracking.compare_runs import Results, RunRecord
from megalm.utils.atomic_files import refuse_overwriting_inputs
from megalm.utils.formatting import format_duration, table
from megalm.utils.progress import watched
from megalm.utils.terminal import echo

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
    """

    value: Callable[[Results], float | int | None]
    form: Callable[[float], str] | None = None
    scatter: str = ""
    difference_form: Callable[[float], str] | None = None
    whole: bool = False

    def cell(self, result: Results) -> object:
        value = self.value(result)
        return value if value is None or self.whole or self.form is None else self.form(value)


def _as(form: str) -> Callable[[float], str]:
    return lambda value: format(value, form)


def _seconds(value: float) -> str:
    return f"{'-' if round(value) < 0 else ''}{format_duration(abs(value))}"


# The lines of the table.
_LINES: dict[str, _Line] = {
    "parameters": _Line(lambda it: it.parameters, _as(","), whole=True),
    "steps": _Line(lambda it: it.steps, _as(","), whole=True),
    "tokens": _Line(lambda it: it.tokens, _as(","), whole=True),
    "tokens per parameter": _Line(lambda it: it.tokens_per_parameter, _as(".2f")),
    "training loss, last": _Line(lambda it: it.final_train_loss, _as(".4f"), "loss"),
    "validation loss, last": _Line(lambda it: it.final_validation_loss, _as(".4f")),
    "  over tokens": _Line(lambda it: it.validation_targets, whole=True),
    "  standard error": _Line(lambda it: it.validation_stderr, _as(".4f")),
    "  perplexity": _Line(lambda it: it.final_perplexity, _as(".2f")),
    "  bits per byte": _Line(lambda it: it.bits_per_byte, _as(".4f")),
    "validation loss, best": _Line(lambda it: it.best_validation_loss, _as(".4f")),
    "  at step": _Line(lambda it: it.best_validation_step, whole=True),
    "  best over tokens": _Line(lambda it: it.best_validation_targets, whole=True),
    "tokens/s, median": _Line(lambda it: it.tokens_per_second, _as(".0f"), "tokens_per_second"),
    "step, median seconds": _Line(lambda it: it.step_seconds, _as(".3g"), "step_seconds"),
    "MFU, median": _Line(lambda it: it.mfu, _as(".2%"), "mfu", lambda share: f"{100 * share:.2f} points"),
    "wall time": _Line(lambda it: it.wall_seconds, _seconds),
    "attempts": _Line(lambda it: it.attempts, whole=True),
}


def command(
    runs: list[str] = typer.Argument(help="Two or more run folders, or runs' names under runs/."),
    plot: Path = typer.Option(Path("compare.png"), help="The file for the plot of the losses over tokens."),
) -> None:
    """Compare two or more runs: the differences in configuration and in results.

    For two runs, the last column is the second minus the first. It compares
    speeds and the last training loss with the scatter of single steps. A single
    validation loss per run does not show the effect of the seed.
    """
    if len(runs) < 2:
        raise ConfigError("compare needs two or more runs; `ls runs` lists them")
    folders = [find_run(run) for run in runs]
    refuse_overwriting_inputs([plot], [path for folder in folders for path in RunFolder(folder).records])
    records = _read(folders)
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = runs  # the same name under two roots
    differences = compare_runs.differing_settings(records)
    if differences:
        echo(table(["setting", *names], [[name, *values] for name, values in differences.items()]))
    else:
        echo("config.yaml and the DeepSpeed JSONs do not differ")
    outcome = [compare_runs.results(record) for record in records]
    headings, rows = ["result", *names], [[name, *map(line.cell, outcome)] for name, line in _LINES.items()]
    if len(outcome) == 2:
        headings.append("difference")
        rows = [[*row, difference(line, *outcome)] for row, line in zip(rows, _LINES.values(), strict=True)]
    echo("\n" + table(headings, rows))
    compare_runs.plot_losses(records, plot, names)
    echo(f"\nlosses over tokens: {plot}")


def _read(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the runs, long ones at the same time."""
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
