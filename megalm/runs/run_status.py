"""How a run stands, from the ends of its files: quick for many runs, also for long ones and for ones that train now."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from megalm.errors import MegalmError
from megalm.planning.batch_size import TrainingStages
from megalm.runs.metrics_log import ATTEMPT_EVENTS, Row, read_newest_first
from megalm.runs.run_folder import RunFolder, failure_line, read_mapping
from megalm.runs.run_lock import is_held

State = Literal["running", "queued", "finished", "failed", "stopped"]

_ROWS = 1000  # at most, from the end of metrics.jsonl
_STEPS = 50  # over which the speed is averaged
_QUIET_EVENTS = ("traffic", "profile", "expected", "repair")
_FAILED_HOST = re.compile(r"\branks? \d+(?:-\d+)? on ([A-Za-z0-9][\w.-]*\w|\w)")


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        step, steps: the last one done and planned.
        tokens_per_second, mfu, step_seconds: of the last steps; step_seconds with validation and saves.
        steps_to_come: as many as the last ones with the tokens of those that are left; None: as many as are left.
        attempts: also counts rollbacks.
        event: the last one, as in metrics.jsonl.
        failure: the last attempt's failure report in a line.
        failed_hosts: that it names.
        job: number of the Slurm job that trains the run or did so last.
        host: where its rank 0 trains or did so last.
    """

    folder: Path
    state: State
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    step_seconds: float | None = None
    steps_to_come: float | None = None
    attempts: int = 0
    event: Row | None = None
    failure: str | None = None
    failed_hosts: tuple[str, ...] = ()
    job: str | None = None
    host: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def eta_seconds(self) -> float | None:
        """Until the last step, of a run that trains; None: not known."""
        if self.state != "running" or self.steps is None or self.step_seconds is None:
            return None
        left = max(0, self.steps - self.step) if self.steps_to_come is None else self.steps_to_come
        return left * self.step_seconds


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run, or what is left of a start."""
    files = RunFolder(folder)
    return files.config_yaml.is_file() or files.metrics.is_file() or files.never_started


def read_status(folder: Path) -> RunStatus:
    """Read how a run stands by its own files; unreadable ones count as missing."""
    files = RunFolder(folder)
    facts: dict[str, Any] = {}
    rows: list[Row] = []
    with contextlib.suppress(MegalmError, OSError):
        facts = read_mapping(files.environment_json)
    with contextlib.suppress(MegalmError, OSError):
        rows = list(islice(read_newest_first(files.metrics), _ROWS))
    steps, job, host = (facts.get(name) for name in ("planned_steps", "job", "host"))
    attempts = next((row["attempt"] for row in rows if row.get("attempt") is not None), 0)
    state: State = "running" if is_held(folder) else _state_at_rest(rows)
    failure = None
    if (
        state != "running" and (failure := failure_line(files.failure(attempts + 1))) is not None
    ):  # before its first row
        state, attempts = "failed", attempts + 1
    elif state == "failed":
        failure = failure_line(files.failure(attempts))
    trained = _of_last_attempt(rows)
    first, last = (trained[-1], trained[0]) if trained else (None, None)
    step_seconds = to_come = None
    if first is not None and last is not None and last["step"] > first["step"]:
        count = last["step"] - first["step"]
        step_seconds = (last["time"] - first["time"]) / count
        stages = TrainingStages.from_json(facts.get("training_stages"))
        if stages is not None and isinstance(steps, int):
            per_step = stages.tokens(last["step"], after=first["step"]) / count
            to_come = stages.tokens(steps, after=last["step"]) / per_step
    return RunStatus(
        folder,
        state,
        step=last["step"] if last else next((row["step"] for row in rows if isinstance(row.get("step"), int)), 0),
        steps=steps if isinstance(steps, int) else None,
        loss=last.get("loss") if last else None,
        tokens_per_second=_median(trained, "tokens_per_second"),
        mfu=_median(trained, "mfu"),
        step_seconds=step_seconds,
        steps_to_come=to_come,
        attempts=attempts,
        event=next((row for row in rows if row["kind"] == "event" and row["event"] not in _QUIET_EVENTS), None),
        failure=failure,
        failed_hosts=tuple(dict.fromkeys(_FAILED_HOST.findall(failure or ""))),
        job=job if isinstance(job, str) and job.isdecimal() else None,
        host=host if isinstance(host, str) else None,
    )


def _state_at_rest(rows: Sequence[Row]) -> State:
    """The state of a run that no job trains."""
    for row in rows:
        if row.get("event") == "end" and row.get("status") in ("finished", "failed", "stopped"):
            status: State = row["status"]
            return status
        if row.get("event") in ATTEMPT_EVENTS:
            break
    return "failed"  # killed, or it never began to train


def _of_last_attempt(rows: Sequence[Row]) -> list[Row]:
    """The last steps, newest first; not those that a later attempt has withdrawn."""
    found: list[Row] = []
    for row in rows:
        if row["kind"] == "train":
            found.append(row)
        if len(found) == _STEPS or (row.get("event") in ATTEMPT_EVENTS and (found or row.get("step") == 0)):
            break
        if row.get("event") in ATTEMPT_EVENTS and isinstance(row.get("step"), int):
            kept = row["step"]  # it has trained no step yet: the last one that counts is older
            return [old for old in rows if old["kind"] == "train" and old["step"] <= kept][:1]
    return found


def _median(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
    return statistics.median(values) if values else None
