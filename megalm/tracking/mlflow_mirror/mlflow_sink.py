"""MLflow as a sink: parameters, tags, metrics, artifacts and status of a run folder, in one MLflow run.

RUN_DIR/mlflow.json records the progress after each batch, so that a pass can fail anywhere and be repeated. After a
crash between a batch and its record, the batch is sent again with the same keys, steps and times, which MLflow stores
once.

MLflow cannot delete metrics. When a resume or a rollback takes back rows that MLflow has, a new MLflow run gets all
rows that count and becomes this folder's; the one before it stays as its child.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from megalm.errors import ConfigError, MegalmError
from megalm.runs.metrics_log import LOSS_OF, METRICS_FILE, Row, plain, read_metrics
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sink import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    Sink,
    TakeBack,
    group_of,
    milliseconds,
    numbers_of,
)
from megalm.tracking.mlflow_mirror.sync_state import STATE_FILE, MetricValue, MirrorState, Owner
from megalm.tracking.mlflow_mirror.system_metrics import node_files, samples_after
from megalm.tracking.report.headline import numbers, outcome
from megalm.tracking.report.page import REPORT_FILE, next_commands, write_report
from megalm.tracking.report.run_data import ReportData, read_run
from megalm.utils.addresses import public_address

if TYPE_CHECKING:  # the training process imports this module and must not load MLflow
    from megalm.tracking.mlflow_mirror.client import MlflowStore

# MLflow's limit of entities in one request.
_BATCH_METRICS = 1000
# Fields that locate or identify a row and are not measurements.
_NO_SERIES = {
    "train": ("kind", "time", "step", "attempt", "samples"),
    "eval": ("kind", "time", "step", "attempt", "tokens", "targets"),
    "task": ("kind", "time", "step", "attempt", "tokens", "questions", "cut_contexts"),
}
# MLflow orders sections by name, and the charts in each: loss, then the optimizer, then speed.
_SECTIONS = {"loss": "train", "tokens": "train"}
_SECTIONS |= dict.fromkeys(("lr", "grad_norm", "loss_scale"), "train/optimizer")
_SECTIONS |= dict.fromkeys(
    ("expert_load_max", "expert_load_min", "dropped_tokens", "router_entropy", "router_aux_loss", "router_z_loss"),
    "train/experts",
)
_SECTION_OF_THE_REST = "train/speed"
_EVENTS = "events.jsonl"

logger = logging.getLogger(__name__)


class MlflowSink(Sink):
    """One run folder at its store.

    Attributes:
        metrics, artifacts: the numbers and files sent so far, for messages.
    """

    state: MirrorState

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.metrics = self.artifacts = 0
        self._state_path = run_dir / STATE_FILE
        self.state = MirrorState.load(self._state_path)
        self._opened: MlflowStore | None = None
        self._copied_from: Path | None = None
        self._address, is_default = run_facts.tracking_uri(run_dir, self.state)
        uri = public_address(self._address)  # for the state file and messages
        both_default = is_default and self.state.default_store  # a moved run root takes its store along
        before = public_address(self.state.tracking_uri)  # version 0.1.0 kept user names
        if before not in ("", uri) and not both_default:
            logger.warning("%s is now tracked at %s: sending it to a new MLflow run from its first row", run_dir, uri)
            self.state = MirrorState()
        self._given = run_facts.GivenRun.of_environment()
        if self._given is not None and not self._given.is_parent:
            known = (None, self.state.run_id, self.state.given_run, *self.state.earlier_runs)
            if self.state.run_id is not None and self._given.run_id not in known:
                logger.warning("%s is now MLflow run %s: sending all rows to it", run_dir, self._given.run_id)
                self.state = MirrorState()
        self.state.tracking_uri, self.state.default_store = uri, is_default

    @property
    def name(self) -> str:
        return f"MLflow at {self.state.tracking_uri}"

    def remedy(self, run_dir: Path) -> str:
        return (
            f"run `megalm track sync {run_dir}` when it is reachable, or name another store in {run_facts.URI_VARIABLE}"
        )

    @property
    def outcome(self) -> str:
        files, state = f"{self.metrics} metric values and {self.artifacts} files", self.state
        return f"{files} to {state.tracking_uri}, run {state.run_id}, {state.status}"

    def save(self) -> None:
        self.state.save(self._state_path)

    def start(self) -> None:
        store, run_id = self._open()
        self._send_facts(store, run_id)

    def send(self, rows: Sequence[Row]) -> None:
        store, run_id = self._open()
        for row in rows:
            if row.get("event") in ("start", "resume"):
                store.set_tags(run_id, run_facts.event_tags(row))
            elif row.get("event") == "rollback":  # the run's next attempt, in the same process
                attempt: Row = {name: value for name, value in row.items() if name in ("attempt", "rollbacks")}
                store.set_tags(run_id, run_facts.event_tags(attempt))
        self._send_metrics(store, run_id, rows)

    def take_back(self, back: TakeBack) -> None:
        """Leave the MLflow run to the attempts so far, and continue in a new one with their tags."""
        store, run_id = self._open()
        state, suffix = self.state, _suffix(back)
        state.name = (store.run_tags(run_id) or {}).get(run_facts.NAME_TAG, self._name).removesuffix(suffix)
        store.rename(run_id, state.name + suffix)
        if state.status == RUNNING:
            store.set_status(run_id, KILLED, state.end_ms)
        state.earlier_runs.append(run_id)
        state.run_id, state.artifacts, state.system = None, {}, {}
        state.begin_again()
        self.save()
        self.start()

    def send_superseded(self, rows: Sequence[Row], back: TakeBack) -> None:
        store, run_id = self._open()
        state, key = self.state, f"{self.state.key}-before-{back.offset}"
        child = store.create_run(state.experiment_id, self._name + _suffix(back), key, milliseconds(rows[0]))
        if child not in state.earlier_runs:
            store.set_tags(child, {run_facts.PARENT_TAG: run_id, run_facts.RUN_DIR_TAG: str(self.run_dir.resolve())})
            store.set_status(child, KILLED, milliseconds(rows[-1]))
            state.earlier_runs.append(child)
        self._send_metrics(store, child, rows)

    def finish(self) -> None:
        store, run_id = self._open()
        state = self.state
        self._send_system_metrics(store, run_id)
        self._send_artifacts(store, run_id)
        if state.status != RUNNING:
            self._send_account(store, run_id)
        if state.status != state.status_sent:
            store.set_status(run_id, state.status, state.end_ms)
            state.status_sent = state.status

    @property
    def _name(self) -> str:
        return self.state.name or self.run_dir.resolve().name

    def _send_metrics(self, store: MlflowStore, run_id: str, rows: Iterable[Row]) -> None:
        for batch in _batches(map(metrics_of, rows)):
            store.log_metrics(run_id, batch)
            self.metrics += len(batch)

    def _open(self) -> tuple[MlflowStore, str]:
        if self._opened is None:
            from megalm.tracking.mlflow_mirror.client import MlflowStore

            store = MlflowStore(self._address, self.run_dir.resolve().parent)
            if self.state.run_id:
                self._claim(store, self.state.run_id)
            if self.state.run_id and not self.state.experiment_id:  # of an older version
                self.state.experiment_id = store.experiment_of(self.state.run_id)
            self.state.owner = Owner.of(self.run_dir)
            self._opened = store
        state = self.state
        if state.run_id is None:
            run_id = self._given_run(self._opened)  # first: it names the experiment
            state.save(self._state_path)  # the key first: a lost response must not create a second run
            state.run_id = run_id or self._create_run(self._opened)
            state.status_sent = RUNNING
            state.save(self._state_path)
        return self._opened, state.run_id

    def _given_run(self, store: MlflowStore) -> str | None:
        """Find the experiment, and the run in it that MLFLOW_RUN_ID gives this folder, if it does.

        Raises:
            ConfigError: there is no such run, or it is another folder's.
        """
        state, given = self.state, self._given
        if given is None:
            state.experiment = state.experiment or run_facts.experiment(self.run_dir)
            state.experiment_id = state.experiment_id or store.experiment_id(state.experiment)
            return None
        tags = store.run_tags(given.run_id)
        if tags is None:
            raise ConfigError(f"MLFLOW_RUN_ID={given.run_id}: there is no such run at {state.tracking_uri}; unset it")
        state.experiment_id = store.experiment_of(given.run_id)
        if given.is_parent or state.earlier_runs:
            return None
        owner = tags.get(run_facts.RUN_DIR_TAG, str(self.run_dir.resolve()))
        if owner != str(self.run_dir.resolve()):
            raise ConfigError(
                f"MLFLOW_RUN_ID={given.run_id} is the run of {owner}; unset it, or set MLFLOW_NESTED_RUN=1"
            )
        state.given_run = given.run_id
        return given.run_id

    def _create_run(self, store: MlflowStore) -> str:
        state = self.state
        key = f"{state.key}-{len(state.earlier_runs)}" if state.earlier_runs else state.key
        run_id = store.create_run(state.experiment_id, self._name, key, run_facts.start_ms(self.run_dir))
        if self._copied_from is not None:
            store.set_tags(run_id, {"megalm.copied_from": str(self._copied_from)})
        if state.earlier_runs:  # the last of them is the one that this run takes the place of
            tags = store.run_tags(state.earlier_runs[-1]) or {}
            kept = {name: value for name, value in tags.items() if _outlives_a_run(name) and value != run_id}
            store.set_tags(run_id, kept)
        elif self._given is not None and self._given.is_parent:
            store.set_tags(run_id, {run_facts.PARENT_TAG: self._given.run_id})
        for earlier in state.earlier_runs:
            store.set_tags(earlier, {run_facts.PARENT_TAG: run_id})
        return run_id

    def _claim(self, store: MlflowStore, run_id: str) -> None:
        """Claim the recorded MLflow run for this folder; start a new one where it is gone or another folder's."""
        tags, state, here = store.run_tags(run_id), self.state, str(self.run_dir.resolve())
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
        self.state = MirrorState(tracking_uri=state.tracking_uri, default_store=state.default_store)

    def _send_facts(self, store: MlflowStore, run_id: str) -> None:
        """Send parameters and tags, again whenever one of their files has changed (a resume)."""
        signatures = {
            f"facts:{name}": mark
            for name in run_facts.FACT_FILES
            if (mark := run_facts.signature(self.run_dir / name)) is not None
        }
        if not any(self.state.artifacts.get(name) != mark for name, mark in signatures.items()):
            return
        store.set_parameters(run_id, run_facts.parameters(self.run_dir))
        store.set_tags(run_id, run_facts.tags(self.run_dir))
        store.set_datasets(run_id, list(run_facts.datasets(self.run_dir)))
        self._send_description(store, run_id)
        self.state.artifacts.update(signatures)
        self.save()

    def _send_description(self, store: MlflowStore, run_id: str) -> None:
        state = self.state
        if (store.run_tags(run_id) or {}).get(run_facts.NOTE_TAG, "") not in ("", state.description):
            return  # a person has written another one
        try:
            text = description(self.run_dir, state.status)
        except MegalmError as error:
            logger.warning("the run has no description: %s", error)
            return
        store.set_tags(run_id, {run_facts.NOTE_TAG: text})
        state.description = text

    def _send_system_metrics(self, store: MlflowStore, run_id: str) -> None:
        for prefix, path in node_files(self.run_dir).items():
            offset, count = self.state.system.get(path.name, [0, 0])
            samples = list(samples_after(path, offset, count, prefix))
            for batch in _batches(metrics for metrics, _ in samples):
                store.log_metrics(run_id, batch)
            if samples:
                self.state.system[path.name] = [samples[-1][1], count + len(samples)]
                self.save()

    def _send_artifacts(self, store: MlflowStore, run_id: str) -> None:
        """Upload the files that are new or have changed since they were sent."""
        for name in run_facts.artifact_names(self.run_dir, self.state.status in (FAILED, KILLED)):
            mark = run_facts.signature(self.run_dir / name)
            if mark is None or self.state.artifacts.get(name) == mark:
                continue
            folder = Path(name).parent.as_posix()
            store.upload(run_id, self.run_dir / name, None if folder == "." else folder)
            self.state.artifacts[name] = mark
            self.save()
            self.artifacts += 1

    def _send_account(self, store: MlflowStore, run_id: str) -> None:
        """Send what an attempt leaves when it ends: its events, the result as description, the page of a failed run.

        Again if a file that tells of the end was written after it.
        """
        state, ends = self.state, (self.run_dir / METRICS_FILE, *(self.run_dir / "failures").glob("*"))
        mark = [number for path in ends for number in run_facts.signature(path) or ()]
        if state.artifacts.get(_EVENTS) == mark:
            return
        self._send_description(store, run_id)
        with tempfile.TemporaryDirectory() as folder:
            events = Path(folder, _EVENTS)
            rows = read_metrics(self.run_dir / METRICS_FILE)
            events.write_bytes(b"".join(orjson.dumps(plain(row)) + b"\n" for row in rows if row["kind"] == "event"))
            store.upload(run_id, events, None)
            if state.status != FINISHED:
                try:
                    store.upload(run_id, write_report(self.run_dir, Path(folder, REPORT_FILE)), None)
                except MegalmError as error:
                    logger.warning("the run has no page: %s", error)
        state.artifacts[_EVENTS] = mark
        self.save()


def _suffix(back: TakeBack) -> str:
    """Return what follows the name of an MLflow run whose rows `back` took back."""
    attempt = f"attempt {back.attempt - 1}, " if back.attempt is not None and back.attempt > 1 else ""
    return f" ({attempt}taken back from step {back.step + 1} on)"


def _outlives_a_run(tag: str) -> bool:
    """Whether the next MLflow run of a folder has a tag of the one before, such as one that a person has set."""
    return tag not in (run_facts.KEY_TAG, run_facts.NAME_TAG) and not tag.startswith("changed.")


def _batches(rows: Iterable[list[MetricValue]]) -> Iterator[list[MetricValue]]:
    """Yield the numbers of rows, at most as many at once as one request allows."""
    batch: list[MetricValue] = []
    for values in rows:
        if len(batch) + len(values) > _BATCH_METRICS:
            yield batch
            batch = []
        batch += values
    if batch:
        yield batch


def metrics_of(row: Row) -> list[MetricValue]:
    """Return a row's numbers as series: `train/loss`, `train/optimizer/lr`, `eval/loss`, at the row's step and time.

    A named validation set (one of several) has its own series: `eval/NAME/loss`. Events are no series.
    """
    if row["kind"] not in _NO_SERIES:
        return []
    return [
        MetricValue(run_facts.clean_name(f"{_section(row, name)}/{name}"), value, row["step"], milliseconds(row))
        for name, value in numbers_of(row, _NO_SERIES[row["kind"]]).items()
        if (name, value) != ("loss_scale", 1.0)  # there is none in bf16 and fp32
    ]


def _section(row: Row, name: str) -> str:
    if row["kind"] == "train":
        return "train" if name.startswith(LOSS_OF) else _SECTIONS.get(name, _SECTION_OF_THE_REST)
    return group_of(row)


def description(run_dir: Path, status: str) -> str:
    """Return Markdown about a run: what it is, its data, its result, the next command.

    Raises:
        MegalmError: a file of the run folder is damaged.
    """
    run = read_run(run_dir.resolve(), time.time())
    blocks = ["  \n".join(_what(run))]
    if status == RUNNING:
        blocks.append("**Training.**")
    else:
        blocks.append(f"**{outcome(run, time.time()).sentence}**")
        table = [f"| {one.name} | {one.value} | {one.note} |" for one in numbers(run)]
        if table:
            blocks.append("\n".join(["| | | |", "|---|---|---|", *table]))
    commands = [command for name, command in next_commands(run) if name in ("resume", "train longer", "generate")]
    blocks.append("\n".join(["Next:", "```", *commands, "```"]))
    return "\n\n".join(blocks)


def _what(run: ReportData) -> Iterator[str]:
    """Yield a line on the model, one on its training, and one for each dataset."""
    facts, setting = run.environment, run.setting
    count = run.results.parameters
    size = f": {count:,} parameters" if count is not None else ""
    layers, width = setting("model.num_hidden_layers"), setting("model.hidden_size")
    preset = f" (preset {run.preset})" if run.preset else ""
    yield f"**{setting('model.style')}, {layers} layers x {width}{size}**{preset}"
    device = facts.get("device") or "unknown device"
    yield f"{run.planned_steps or 0:,} steps in {facts.get('precision')} on {facts.get('world_size')} x {device}"
    for prefix, part in run.datasets:
        yield f"data: `{prefix}`" + (f", {part}" if part else "")
