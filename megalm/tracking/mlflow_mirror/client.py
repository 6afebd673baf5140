"""The tracking store, through MLflow's client; the only module that imports mlflow."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import logging
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megalm.tracking.mlflow_mirror.run_facts import SWEEP_TAG
from megalm.tracking.mlflow_mirror.sync_state import FINISHED, RUNNING, MetricValue
from megalm.utils.file_lock import take_lock

# Make requests to a dead server fail within seconds: the mirror's own loop does the waiting. User settings are kept.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)

import mlflow  # noqa: E402 - after the settings above, which it reads on import
from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402

# Its warnings of retries quote whole addresses, with the query that may hold a token.
logging.getLogger("urllib3").setLevel(logging.ERROR)

# MLflow's limit of parameters or tags in one request.
_BATCH_NAMES = 100
_ARTIFACTS = "mlartifacts"
_PARENT_TAG = "mlflow.parentRunId"
_KEY_OF_SWEEP = "sweep-"  # opens the key of a sweep's own run


class MlflowStore:
    """One tracking store; `root` holds the default store's artifacts and the lock of its creation.

    Any exception of a method means: try again later.
    """

    def __init__(self, tracking_uri: str, root: Path) -> None:
        self._root = root
        self._is_default = tracking_uri == f"sqlite:///{root / 'mlflow.db'}"
        if not self._is_default:
            self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
            return
        # Two runs started together would both create the tables of a new SQLite store.
        with take_lock(root / "mlflow.db.lock"):
            if not (root / "mlflow.db").exists():
                _create_store(root)
            _point_to_artifacts(root)
            self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
            self._client.search_experiments(max_results=1)

    def run_tags(self, run_id: str) -> dict[str, str] | None:
        """Return the tags of a run; None if there is no such run, or it is deleted."""
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return dict(run.data.tags) if run.info.lifecycle_stage == "active" else None

    def create_run(self, experiment: str, name: str, key: str, start_ms: int) -> str:
        """Create a run, or find the one that was created with this key; return its id."""
        experiment_id = self._experiment_id(experiment)
        found = self._client.search_runs([experiment_id], f"tags.`megalm.key` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        facts = {"megalm.key": key, "mlflow.source.name": "megalm", "mlflow.user": _user()}
        run = self._client.create_run(experiment_id, start_time=start_ms, tags=facts, run_name=name)
        return str(run.info.run_id)

    def log_metrics(self, run_id: str, metrics: list[MetricValue]) -> None:
        batch = [Metric(item.key, item.value, item.time_ms, item.step) for item in metrics]
        self._client.log_batch(run_id, metrics=batch, synchronous=True)

    def set_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        """Set parameters. MLflow's cannot change, so one that a resume changed becomes a tag `changed.NAME`."""
        known = self._client.get_run(run_id).data.params
        new = [Param(name, value) for name, value in parameters.items() if name not in known]
        for start in range(0, len(new), _BATCH_NAMES):
            self._client.log_batch(run_id, params=new[start : start + _BATCH_NAMES], synchronous=True)
        changed = {name: value for name, value in parameters.items() if known.get(name, value) != value}
        self.set_tags(run_id, {f"changed.{name}"[:250]: value for name, value in changed.items()})

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; that of a sweep makes the run a child of the sweep's run."""
        if SWEEP_TAG in tags and _PARENT_TAG not in tags:
            tags = {**tags, _PARENT_TAG: self._run_of_sweep(run_id, tags[SWEEP_TAG])}
        items = [RunTag(name, value) for name, value in tags.items()]
        for start in range(0, len(items), _BATCH_NAMES):
            self._client.log_batch(run_id, tags=items[start : start + _BATCH_NAMES], synchronous=True)

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        if not self._is_default:
            self._client.log_artifact(run_id, str(file), folder)
            return
        # The client remembers places by run id, and a copied store has the run ids of the original.
        place = self._client.get_run(run_id).info.artifact_uri
        get_artifact_repository(place).log_artifact(str(file), folder)

    def set_status(self, run_id: str, status: str, end_ms: int | None) -> None:
        if status == RUNNING:
            self._client.update_run(run_id, status=RUNNING)
        else:
            self._client.set_terminated(run_id, status, end_ms)
        self._update_sweep(run_id)

    def _run_of_sweep(self, run_id: str, sweep: str) -> str:
        """Return the run of a sweep in the experiment of one of its runs; the first of them creates it."""
        info = self._client.get_run(run_id).info
        experiment = self._client.get_experiment(info.experiment_id).name
        key = f"{_KEY_OF_SWEEP}{hashlib.sha256(sweep.encode()).hexdigest()[:32]}"
        with take_lock(self._root / "mlflow.db.lock"):  # runs of an array begin together
            parent = self.create_run(experiment, Path(sweep).name, key, info.start_time)
            self._client.set_tag(parent, SWEEP_TAG, sweep)
            self._client.update_run(parent, status=RUNNING)
        return parent

    def _update_sweep(self, run_id: str) -> None:
        """End the run of a sweep where none of its runs is training."""
        run = self._client.get_run(run_id)
        parent = run.data.tags.get(_PARENT_TAG)
        if SWEEP_TAG not in run.data.tags or parent is None:
            return
        if not self._client.get_run(parent).data.tags.get("megalm.key", "").startswith(_KEY_OF_SWEEP):
            return  # a child of another run of the sweep
        children = f"tags.`{_PARENT_TAG}` = '{parent}' and attributes.status = '{RUNNING}'"
        if self._client.search_runs([run.info.experiment_id], children, max_results=1):
            self._client.update_run(parent, status=RUNNING)
        else:
            self._client.set_terminated(parent, FINISHED)

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = (self._root / _ARTIFACTS).as_uri() if self._is_default else None
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        if found.lifecycle_stage != "active":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a numeric user id without a name, common in containers
        return str(os.getuid())


def _create_store(root: Path) -> None:
    """Create the tables in a file with another name: a mirror killed meanwhile would leave an incomplete store."""
    partial = root / "mlflow.db.partial"
    for leftover in root.glob("mlflow.db.partial*"):
        leftover.unlink()
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    partial.replace(root / "mlflow.db")


def _point_to_artifacts(root: Path) -> None:
    """Point a default store to the artifacts beside it: it names them by absolute path, wherever its root was then.

    Without this a moved root makes its old place again, and a copied one writes into the artifacts of the original.
    MLflow has no call for this.
    """
    here = (root / _ARTIFACTS).as_uri()
    with contextlib.closing(sqlite3.connect(root / "mlflow.db", timeout=20.0)) as store, store:
        found = store.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
        for experiment, place in found:
            if place == here or not str(place).startswith("file:") or not str(place).endswith(f"/{_ARTIFACTS}"):
                continue
            store.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (here, experiment))
            runs = store.execute("SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment,))
            for run, uri in runs.fetchall():
                moved = f"{here}{str(uri).removeprefix(str(place))}"
                # Files that were never moved along stay where they are.
                if str(uri).startswith(f"{place}/") and (_path_of(moved).exists() or not _path_of(uri).exists()):
                    store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (moved, run))


def _path_of(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
