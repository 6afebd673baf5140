"""`megalm compare`: what differs between runs, in configuration and in results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from megalm.cli import show
from megalm.cli.runs import find_run
from megalm.errors import ConfigError
from megalm.tracking import compare
from megalm.tracking.compare import Results

# What the table says of a run's results, line by line.
_LINES: dict[str, Callable[[Results], object]] = {
    "steps": lambda result: result.steps,
    "tokens": lambda result: result.tokens,
    "training loss, last": lambda result: _loss(result.final_train_loss),
    "validation loss, last": lambda result: _loss(result.final_validation_loss),
    "validation loss, best": lambda result: _loss(result.best_validation_loss),
    "  at step": lambda result: result.best_validation_step,
    "tokens/s, median": lambda result: _number(result.tokens_per_second, ".0f"),
    "MFU, median": lambda result: _number(result.mfu, ".2%"),
    "wall time": lambda result: show.duration(result.wall_seconds),
    "attempts": lambda result: result.attempts,
}


def command(
    runs: list[str] = typer.Argument(help="Two or more run folders, or names under runs/."),
    plot: Path = typer.Option(Path("compare.png"), help="Where the loss curves over tokens go."),
) -> None:
    """Two or more runs: what differs in configuration and in results."""
    if len(runs) < 2:
        raise ConfigError("compare: takes two or more runs; `ls runs` names them")
    records = [compare.read_run(find_run(run)) for run in runs]
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = runs  # the same name under two roots: as they were typed
    differences = compare.differing_settings(records)
    if differences:
        typer.echo(show.table(["setting", *names], [[name, *values] for name, values in differences.items()]))
    else:
        typer.echo("no difference in config.yaml and deepspeed.resolved.json")
    outcome = [compare.results(record) for record in records]
    rows = [[name, *map(line, outcome)] for name, line in _LINES.items()]
    typer.echo("\n" + show.table(["result", *names], rows))
    compare.plot_losses(records, plot)
    typer.echo(f"\nloss curves over tokens: {plot}")


def _loss(value: float | None) -> str | None:
    return _number(value, ".4f")


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
