"""Writing what training writes; for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.mlflow_mirror.mirror_process import sync_trackers
from megalm.tracking.mlflow_mirror.mlflow_sink import MlflowSink


class Sent(NamedTuple):
    """What `sync` sent: numbers and files, and the run's state in the store."""

    metrics: int
    artifacts: int
    status: str
    run_id: str


def sync(run_dir: Path, deadline_seconds: float = 30.0) -> Sent:
    """What `megalm track sync --to mlflow` sends."""
    (sink,) = sync_trackers(run_dir, ("mlflow",), deadline_seconds)
    assert isinstance(sink, MlflowSink)
    assert sink.state.run_id is not None
    return Sent(sink.metrics, sink.artifacts, sink.state.status, sink.state.run_id)


def write_rows(run_dir: Path, steps: range, attempt: int = 1, end: str | None = None) -> None:
    """What one attempt of training writes; `end` is its end event's status."""
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        opening = {"event": "start"} if attempt == 1 else {"event": "resume", "step": steps.start - 1}
        fingerprints = {"dataset_fingerprint": "d0", "tokenizer_fingerprint": "t0"}
        writer.row("event", **opening, attempt=attempt, **fingerprints)
        for step in steps:
            writer.row("train", step=step, tokens=step * 100, loss=4.0 / step, lr=1e-3, attempt=attempt)
        writer.row("eval", step=steps[-1], tokens=steps[-1] * 100, loss=1.5, perplexity=4.48, dataset="validation")
        if end is not None:
            writer.row("event", event="end", status=end, exit_code=0 if end == "finished" else 1)
