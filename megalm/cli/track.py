"""`megalm track`: send run folders to MLflow."""

from __future__ import annotations

import typer

from megalm.cli.find_run import find_run
from megalm.tracking.mlflow_mirror import mirror_process
from megalm.utils.terminal import echo

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `sync` a subcommand: Typer drops the name of an only command."""


@app.command()
def sync(
    runs: list[str] = typer.Argument(help="Run folders, or runs' names under runs/."),
    deadline_seconds: float = typer.Option(30.0, min=0.0, help="Retry for this long if the store is down."),
) -> None:
    """Send the data of these runs that MLflow lacks; nothing is sent twice."""
    for run_dir in [find_run(run) for run in runs]:  # refuse a wrong name before anything is sent
        sent = mirror_process.sync(run_dir, deadline_seconds)
        echo(
            f"{run_dir}: sent {sent.metrics} metric values and {sent.artifacts} files to {sent.tracking_uri}, "
            f"run {sent.run_id}, {sent.status}"
        )
        if sent.status == "RUNNING":
            echo(f"{run_dir}: metrics.jsonl has no end event, so MLflow shows the run as running")
