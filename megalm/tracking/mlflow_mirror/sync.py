"""Send a run folder to a tracking store: rows, parameters, tags, artifacts, status.

RUN_DIR/mlflow.json records the progress after each batch, so that a pass can fail anywhere and be repeated. After a
crash between a batch and its record, the batch is sent again with the same keys, steps and times, which MLflow stores
once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.runs.metrics_log import METRICS_FILE, Row, read_rows
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sync_state import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    STATE_FILE,
    MetricValue,
    MirrorState,
    Owner,
)
from megalm.utils.addresses import public_address

if TYPE_CHECKING:  # the training process imports this module and must not load MLflow
    from megalm.tracking.mlflow_mirror.client import MlflowStore

# MLflow's limit of entities in one request.
_BATCH_METRICS = 1000
# Fields that locate or identify a row and are not measurements.
_NO_SERIES = ("kind", "time", "step", "attempt")
_NO_SERIES_OF_EVENTS = (*_NO_SERIES, "exit_code", "signal", "world_size")
_END_STATUS = {"finished": FINISHED, "failed": FAILED, "stopped": KILLED}
_EXIT_STATUS = {0: FINISHED, 75: KILLED}

logger = logging.getLogger(__name__)


@dataclass
class Sent:
    """The result of one `MlflowSync.deliver`: numbers and files sent, and the run's state in the store."""

    metrics: int = 0
    artifacts: int = 0
    status: str = RUNNING
    run_id: str = ""
    tracking_uri: str = ""


class MlflowSync:
    """Sends one run folder to its store; each call sends the new rows and files.

    `run_has_ended` becomes true with an end event at unix time `since` or later: the rows of a resumed run also contain
    the end event of its earlier attempt, possibly not yet sent.
    """

    def __init__(self, run_dir: Path, since: float = 0.0) -> None:
        self.run_dir = run_dir
        self.run_has_ended = False
        self._since = since
        self._state_path = run_dir / STATE_FILE
        self._state = MirrorState.load(self._state_path)
        self._store: MlflowStore | None = None
        self._copied_from: Path | None = None
        self._address, is_default = run_facts.tracking_uri(run_dir, self._state)
        uri = public_address(self._address)  # for the state file and messages
        both_default = is_default and self._state.default_store  # a moved run root takes its store along
        before = public_address(self._state.tracking_uri)  # version 0.1.0 kept user names
        if before not in ("", uri) and not both_default:
            logger.warning("%s is now tracked at %s: sending it to a new MLflow run from its first row", run_dir, uri)
            self._state = MirrorState()
        self._state.tracking_uri, self._state.default_store = uri, is_default

    @property
    def tracking_uri(self) -> str:
        return self._state.tracking_uri

    def deliver(self, parent_ended: bool = False) -> Sent:
        """Send everything not yet sent; with `parent_ended`, also close a run without an end event."""
        state = self._state
        store, run_id = self._open()
        sent = Sent(run_id=run_id, tracking_uri=state.tracking_uri)
        self._send_facts(store, run_id)
        sent.metrics = self._send_rows(store, run_id)
        sent.artifacts = self._send_artifacts(store, run_id)
        if parent_ended and state.status == RUNNING:
            # The training process ended without writing an end event.
            state.status, state.end_ms = (KILLED if state.signalled else FAILED), int(time.time() * 1000)
        if state.status != state.status_sent:
            store.set_status(run_id, state.status, state.end_ms)
            state.status_sent = state.status
        self._state.save(self._state_path)
        sent.status = state.status
        return sent

    def _open(self) -> tuple[MlflowStore, str]:
        if self._store is None:
            from megalm.tracking.mlflow_mirror.client import MlflowStore

            store = MlflowStore(self._address, self.run_dir.resolve().parent)
            if self._state.run_id:
                self._claim(store, self._state.run_id)
            self._state.owner = Owner.of(self.run_dir)
            self._store = store
        state = self._state
        if state.run_id is None:
            state.experiment = run_facts.experiment(self.run_dir)
            state.save(self._state_path)  # the key first: a lost response must not create a second run
            start_ms = run_facts.start_ms(self.run_dir)
            state.run_id = self._store.create_run(state.experiment, self.run_dir.resolve().name, state.key, start_ms)
            if self._copied_from is not None:
                self._store.set_tags(state.run_id, {"megalm.copied_from": str(self._copied_from)})
            state.status_sent = RUNNING
            state.save(self._state_path)
        return self._store, state.run_id

    def _claim(self, store: MlflowStore, run_id: str) -> None:
        """Claim the recorded MLflow run for this folder; start a new one where it is gone or another folder's."""
        tags, state, here = store.run_tags(run_id), self._state, str(self.run_dir.resolve())
        if tags is None:
            logger.warning("MLflow run %s no longer exists: sending all rows to a new one", run_id)
        else:
            self._copied_from = state.original_of(self.run_dir, tags.get(run_facts.RUN_DIR_TAG))
            if self._copied_from is None:
                if state.owner != Owner.of(self.run_dir) or tags.get(run_facts.RUN_DIR_TAG) != here:
                    store.set_tags(run_id, {run_facts.RUN_DIR_TAG: here})
                return
            logger.warning(
                "%s is a copy of %s, which keeps MLflow run %s: sending all rows to a new one",
                self.run_dir,
                self._copied_from,
                run_id,
            )
        self._state = MirrorState(tracking_uri=state.tracking_uri, default_store=state.default_store)

    def _send_facts(self, store: MlflowStore, run_id: str) -> None:
        """Send parameters and tags, again whenever one of their files has changed (a resume)."""
        signatures = {
            f"facts:{name}": mark
            for name in run_facts.FACT_FILES
            if (mark := run_facts.signature(self.run_dir / name)) is not None
        }
        if not any(self._state.artifacts.get(name) != mark for name, mark in signatures.items()):
            return
        store.set_parameters(run_id, run_facts.parameters(self.run_dir))
        store.set_tags(run_id, run_facts.tags(self.run_dir))
        self._state.artifacts.update(signatures)
        self._state.save(self._state_path)

    def _send_rows(self, store: MlflowStore, run_id: str) -> int:
        """Send all rows after the offset, in batches; advance the state only after the store has accepted a batch."""
        path, state, total = self.run_dir / METRICS_FILE, self._state, 0
        if not path.exists():
            return 0
        if path.stat().st_size < state.offset:
            logger.warning("%s is shorter than the part already sent: sending it again from its first row", path)
            state.offset = 0
        for batch in _batches(path, state.offset):
            for event in batch.events:
                if event.get("event") in ("start", "resume"):
                    store.set_tags(run_id, run_facts.event_tags(event))
                elif event.get("event") == "rollback":  # the run's next attempt, in the same process
                    attempt: Row = {name: value for name, value in event.items() if name in ("attempt", "rollbacks")}
                    store.set_tags(run_id, run_facts.event_tags(attempt))
            if batch.metrics:
                store.log_metrics(run_id, batch.metrics)
            for event in batch.events:
                self._note_event(event)
            total += len(batch.metrics)
            state.offset = batch.end_offset
            state.save(self._state_path)
        return total

    def _note_event(self, row: Row) -> None:
        """Update the run's status by a start, resume, signal or end event."""
        state, event = self._state, row.get("event")
        if event in ("start", "resume"):
            state.status, state.end_ms, state.signalled = RUNNING, None, False
        elif event == "signal":
            state.signalled = True
        elif event == "end":
            by_code = _EXIT_STATUS.get(row.get("exit_code", 0), FAILED)
            state.status = _END_STATUS.get(str(row.get("status")), by_code)
            state.end_ms = _milliseconds(row)
            # In full precision: an attempt may end in the millisecond in which the next one begins.
            self.run_has_ended = _seconds(row) >= self._since

    def _send_artifacts(self, store: MlflowStore, run_id: str) -> int:
        """Upload the files that are new or have changed since they were sent."""
        count = 0
        for name in run_facts.artifact_names(self.run_dir):
            mark = run_facts.signature(self.run_dir / name)
            if mark is None or self._state.artifacts.get(name) == mark:
                continue
            folder = Path(name).parent.as_posix()
            store.upload(run_id, self.run_dir / name, None if folder == "." else folder)
            self._state.artifacts[name] = mark
            self._state.save(self._state_path)
            count += 1
        return count


@dataclass
class _Batch:
    metrics: list[MetricValue] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    end_offset: int = 0


def _batches(path: Path, offset: int) -> Iterator[_Batch]:
    """Yield complete rows from an offset on, in batches of at most as many metrics as one request allows."""
    batch = _Batch()
    for row, end_offset in read_rows(path, offset):
        values = metrics_of(row)
        if len(batch.metrics) + len(values) > _BATCH_METRICS:
            yield batch
            batch = _Batch()
        batch.metrics += values
        if row["kind"] == "event":
            batch.events.append(row)
        batch.end_offset = end_offset
    if batch.end_offset:
        yield batch


def metrics_of(row: Row) -> list[MetricValue]:
    """Return a row's numbers as series: `train/loss`, `eval/loss`, `event/skip/...`, at the row's step and time.

    A named validation set (one of several) has its own series: `eval/NAME/loss`.
    """
    prefix = str(row["kind"])
    if prefix == "event":
        prefix += f"/{row.get('event')}"
    elif prefix == "eval" and row.get("dataset") not in (None, "validation"):
        prefix += f"/{Path(str(row['dataset'])).name}"
    step = row["step"] if isinstance(row.get("step"), int) else 0
    left_out = _NO_SERIES_OF_EVENTS if row["kind"] == "event" else _NO_SERIES
    return [
        MetricValue(run_facts.clean_name(f"{prefix}/{name}"), float(value), step, _milliseconds(row))
        for name, value in row.items()
        if name not in left_out and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _seconds(row: Row) -> float:
    moment = row.get("time", 0.0)
    return float(moment) if isinstance(moment, (int, float)) and math.isfinite(moment) else 0.0


def _milliseconds(row: Row) -> int:
    return int(_seconds(row) * 1000)
