"""`megalm track` and `megalm report`: send run folders to trackers, write a page about one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

from megalm.cli.find_run import find_run, read_watched
from megalm.cli.options import Run
from megalm.config.schema import TRACKERS
from megalm.errors import ConfigError
from megalm.tracking.mlflow_mirror import mirror_process
from megalm.tracking.mlflow_mirror.sink import RUNNING
from megalm.utils.terminal import echo

Tracker = Enum("Tracker", {name: name for name in TRACKERS}, type=str)  # type: ignore[misc]
app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `sync` a subcommand: Typer drops the name of an only command."""


@app.command()
def sync(
    runs: list[str] = typer.Argument(help="Run folders, or runs' names under runs/."),
    to: list[Tracker] = typer.Option([], help="A tracker; may be repeated. Default: those of the run."),
    deadline_seconds: float = typer.Option(30.0, min=0.0, help="Retry for this long if a tracker is down."),
) -> None:
    """Send the data of these runs that a tracker lacks: MLflow, TensorBoard
    or Weights & Biases. Nothing is sent twice.
    """
    for run_dir in [find_run(run) for run in runs]:  # refuse a wrong name before anything is sent
        for sink in mirror_process.sync_trackers(run_dir, [tracker.value for tracker in to], deadline_seconds):
            echo(f"{run_dir}: sent {sink.outcome}")
            if sink.state.status == RUNNING:
                echo(f"{run_dir}: metrics.jsonl has no end event, so {sink.name} has the run as running")


def report(
    run: Run,
    output: Path = typer.Option(None, help="The file to write. Default: report.html in the run folder."),
    show_it: bool = typer.Option(False, "--open", help="Open the page in the browser."),
) -> None:
    """Write a page about a run: outcome, curves, notable events, checkpoints,
    samples, configuration and environment. The run may still be training.

    The page is one HTML file without scripts that needs no network and no
    other file, so it can be mailed and printed. A run writes it at its end.
    """
    from megalm.tracking.report.page import write_report  # loads the template engine

    if output is not None and output.is_dir():
        raise ConfigError(f"{output} is a folder; name a file, such as {output / 'report.html'}")
    path = write_report(find_run(run), output, read_watched)
    echo(f"{path}: {path.stat().st_size / 1000:,.0f} kB")
    if show_it:
        typer.launch(str(path))
