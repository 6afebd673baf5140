"""`megalm status`: runs and their jobs in one table, from run folders and Slurm's queue."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from megalm.cli.find_run import find_run, warn
from megalm.cluster.slurm_client import QueuedJob, own_jobs, require_slurm
from megalm.config.schema import RunSection
from megalm.errors import ConfigError
from megalm.runs.metrics_log import plain
from megalm.runs.run_status import RunStatus, State, is_run, read_status
from megalm.utils.formatting import format_duration, table
from megalm.utils.terminal import echo, echo_text

_CLEAR = "\x1b[H\x1b[2J"
_LONGEST_EVENT = 90
_HEADINGS = ("run", "state", "job", "step", "loss", "tokens/s", "MFU", "time left", "attempts", "last event", "node")


@dataclass(frozen=True)
class Line:
    """A run, a job, or a run with its job.

    Attributes:
        run: None for a job without a run folder yet.
    """

    name: str
    state: State
    run: RunStatus | None = None
    job: QueuedJob | None = None

    @property
    def is_over(self) -> bool:
        return self.state not in ("running", "queued")


def command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Run folders, or runs' names under runs/. Default: all under --root."),
    ] = None,
    root: Annotated[Path, typer.Option("--root", help="The folder of the run folders.")] = Path(RunSection().root),
    watch: Annotated[bool, typer.Option("--watch", help="Renew the table until no run is queued or trains.")] = False,
    interval_seconds: Annotated[
        float, typer.Option("--interval", min=0.1, metavar="SECONDS", help="With --watch: between two tables.")
    ] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list (with --watch, one a line).")] = False,
) -> None:
    """Show runs and their jobs: state, step, loss, speed, time left, attempts, last event, node that failed.

    Reads the ends of the files in the run folders, and your jobs in Slurm's queue if there is one.

    \b
    megalm status
    megalm status mine other --watch
    """
    folders = [find_run(run) for run in runs or []]
    while True:
        lines = overview(folders or None, root)
        if as_json:
            echo_text(json.dumps([_as_json(line) for line in lines], indent=None if watch else 2))
        else:
            if watch and sys.stdout.isatty():
                echo_text(_CLEAR, end="")
            echo(_text(lines, time.time()) if lines else f"no runs in {root}, and no jobs")
        if not watch or all(line.is_over for line in lines):
            return
        try:
            time.sleep(interval_seconds)
        except KeyboardInterrupt:
            return


def overview(folders: Sequence[Path] | None, root: Path) -> list[Line]:
    """Return the runs of these folders with their jobs; with None, all runs and jobs of a run root."""
    jobs = _jobs()
    if folders is None:
        found = sorted(root.iterdir()) if root.is_dir() else []
        chosen = [path for path in found if path.is_dir() and not path.name.startswith(".") and is_run(path)]
    else:
        chosen = list(folders)
    lines, placed = [], set()
    for folder in chosen:
        line = _placed(read_status(folder), jobs)
        lines.append(line)
        placed |= {line.job.number} if line.job else set()
    if folders is None:
        placed |= {job.number for job in jobs if job.name in {line.name for line in lines}}
        here = [job for job in jobs if job.number not in placed and _starts_in(job, root)]
        lines += [Line(job.name, "running" if job.on_nodes else "queued", None, job) for job in here]
    return lines


def _jobs() -> list[QueuedJob]:
    try:
        require_slurm("squeue")
    except ConfigError:  # not a cluster
        return []
    try:
        return own_jobs()
    except ConfigError as error:
        warn(f"{error}; the table has the run folders alone")
        return []


def _placed(run: RunStatus, jobs: Sequence[QueuedJob]) -> Line:
    """Find the run's job: the one that trained it last if it is still there, else one of its name from here."""
    own = [job for job in jobs if job.number == run.job]
    own += [job for job in jobs if job.name == run.name and _starts_in(job, run.folder.parent)]
    job = next((job for job in own if job.on_nodes), next(iter(own), None))
    if job is None or run.state == "running" or (run.state == "finished" and job.number == run.job):
        return Line(run.name, run.state, run, job)
    state: State = "running" if job.on_nodes else "queued"
    return Line(run.name, state, replace(run, state=state), job)


def _starts_in(job: QueuedJob, root: Path) -> bool:
    """Whether a job's runs are in this run root by default."""
    return os.path.realpath(Path(job.folder) / RunSection().root) == os.path.realpath(root)


# --- The table --------------------------------------------------------------------------------------------------------


def _text(lines: Sequence[Line], now: float) -> str:
    return table(_HEADINGS, [_cells(line, now) for line in lines])


def _cells(line: Line, now: float) -> list[object]:
    run, job = line.run, line.job
    if run is None:
        numbers: list[object] = [None] * 5
    else:
        step = f"{run.step:,}" if run.steps is None else f"{run.step:,} of {run.steps:,}"
        eta = None if run.eta_seconds is None else format_duration(run.eta_seconds)
        speed = _number(run.tokens_per_second, ",.0f")
        numbers = [step, _number(run.loss, ".4f"), speed, _number(run.mfu, ".1%"), eta]
    task = job.task if job is not None else run.job if run is not None else None
    attempts = None if run is None else run.attempts
    return [line.name, line.state, task, *numbers, attempts, _event(line, now), _node(line)]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _event(line: Line, now: float) -> str | None:
    run, job = line.run, line.job
    if line.state == "queued" and job is not None:
        start = f", expected {job.start.replace('T', ' ')}" if job.start else ""
        return f"waits: {job.reason or job.state}{start}"
    if run is None:
        return "starts"
    if run.failure is not None:
        return run.failure if len(run.failure) <= _LONGEST_EVENT else f"{run.failure[: _LONGEST_EVENT - 3]}..."
    if run.event is None:
        return "starts" if line.state == "running" else "ended without a message"
    event = run.event
    what = event["status"] if event["event"] == "end" and event.get("status") else event["event"]
    if line.state == "failed" and event["event"] != "end":
        what = f"ended without a message after {what}"
    step = f" at step {event['step']:,}" if isinstance(event.get("step"), int) else ""
    return f"{what}{step}, {format_duration(max(0.0, now - event['time']))} ago"


def _node(line: Line) -> str | None:
    """The nodes that failed, or the ones where the run trains."""
    run, job = line.run, line.job
    if run is not None and run.failed_hosts and line.state == "failed":
        return f"failed: {', '.join(run.failed_hosts)}"
    if job is not None and job.on_nodes:
        return job.nodes or None
    return run.host if run is not None and line.state == "running" else None


def _as_json(line: Line) -> dict[str, Any]:
    run = {} if line.run is None else {**asdict(line.run), "eta_seconds": line.run.eta_seconds}
    return {
        "name": line.name,
        **plain(run),
        "state": line.state,
        "slurm": None if line.job is None else asdict(line.job),
    }
