"""The MLflow run of a sweep: gets the result once the runs are ranked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sync_state import STATE_FILE, MetricValue, MirrorState


@dataclass(frozen=True)
class SweepResult:
    """What the run of a sweep shows.

    Attributes:
        sentence: the best with its uncertainty; the run's description.
        best_run: the name of the best run; None: none is finished.
        score: of the best, as `scored_by` says.
        page: a file.
    """

    sentence: str
    page: Path
    best_run: str | None = None
    score: float | None = None
    scored_by: str = "validation loss"


def send_sweep_result(sweep: Path, runs: Sequence[Path], result: SweepResult) -> bool:
    """Send the result to the run of a sweep; return False if none of its runs is in MLflow.

    Any exception means: try again later.

    Args:
        sweep: its folder.
        runs: run folders.
    """
    tracked = [(run, state) for run in runs if (state := MirrorState.load(run / STATE_FILE)).run_id is not None]
    if not tracked:
        return False
    from megalm.tracking.mlflow_mirror.client import MlflowStore  # loads MLflow, which takes seconds

    run, state = tracked[-1]
    store = MlflowStore(run_facts.tracking_uri(run, state)[0], run.resolve().parent)
    tags = store.run_tags(str(state.run_id)) or {}
    parent = tags.get(run_facts.PARENT_TAG)
    if parent is None or tags.get(run_facts.SWEEP_TAG) != str(sweep.resolve()):
        return False
    store.set_tags(parent, {run_facts.NOTE_TAG: result.sentence, "megalm.best_run": result.best_run or "none yet"})
    if result.score is not None:
        name = run_facts.clean_name(f"best/{result.scored_by.replace(' ', '_')}")
        store.log_metrics(parent, [MetricValue(name, result.score, 0, int(time.time() * 1000))])
    store.upload(parent, result.page, None)
    return True
