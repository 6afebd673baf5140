"""The facts about a run that go to a tracking store, read from its folder: address, parameters, tags, artifacts."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.schema import TRACKERS, TrackingSection
from megalm.data.indexed.metadata import read_sidecar
from megalm.errors import ConfigError, DataError
from megalm.runs.metrics_log import METRICS_FILE, Row, read_rows
from megalm.runs.run_folder import (
    CONFIG_FILE,
    DEEPSPEED_FILE,
    ENVIRONMENT_FILE,
    PROFILE_FOLDER,
    read_deepspeed_settings,
    read_mapping,
)
from megalm.tracking.mlflow_mirror.sync_state import STATE_FILE, MirrorState
from megalm.utils.addresses import public_address
from megalm.utils.formatting import flatten_to_text

URI_VARIABLE = "MLFLOW_TRACKING_URI"
# Of MLflow and of the trackers' integrations of other trainers, with the same meaning.
_EXPERIMENT_VARIABLE, _RUN_VARIABLE = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"
_TAGS_VARIABLE, _NESTED_VARIABLE = "MLFLOW_TAGS", "MLFLOW_NESTED_RUN"
RUN_DIR_TAG = "megalm.run_dir"  # the folder that an MLflow run belongs to
KEY_TAG = "megalm.key"  # of a run to create, so that a lost response creates no second one
NAME_TAG, PARENT_TAG, NOTE_TAG = "mlflow.runName", "mlflow.parentRunId", "mlflow.note.content"
SWEEP_TAG = "megalm.sweep"  # the folder of the sweep of the run, or of a sweep's own MLflow run
FACT_FILES = (CONFIG_FILE, DEEPSPEED_FILE, ENVIRONMENT_FILE)

_ARTIFACTS = (*FACT_FILES, "deepspeed.json", "report.html")
_ARTIFACTS_OF_FAILURES = ("log.txt", "failures", "incidents", "stacks")
# Settings that name the run or its tracker, or that are the same for every run.
_NOT_PARAMETERS = ("run.", "tracking.", "deepspeed.steps_per_print", "deepspeed.timers.")
_UNSET = ("null", "[]", "{}")
# environment.json -> parameter: what a run is, beside its settings.
_PARAMETERS_OF_ENVIRONMENT = {
    "parameters": "model.parameters",
    "unigram_entropy": "data.unigram_entropy",
    "world_size": "world_size",
    "precision": "precision",
    "device": "device",
    "compiled": "compiled",
}
# What is a parameter, a dataset or the description, or says nothing to a reader.
_NOT_TAGS = (
    *_PARAMETERS_OF_ENVIRONMENT,
    "zero_stage",
    "planned_steps",
    "training_stages",
    "datasets",
    "device_kind",
    "threads_per_rank",
)
_NOT_TAGS_OF_EVENTS = ("kind", "time", "event", "step", "startup_seconds", *_PARAMETERS_OF_ENVIRONMENT)
# MLflow's limits: names of 250 characters, values of 6000 (parameters) and 8000 (tags).
_LONGEST_NAME = 250
_LONGEST_PARAMETER = 6000
_LONGEST_TAG = 8000


def tracking_uri(run_dir: Path, state: MirrorState) -> tuple[str, bool]:
    """Return where this run is tracked, and whether that is the default store beside the run folder.

    MLFLOW_TRACKING_URI takes precedence. Without it, a run stays where it was first sent, and a new one uses
    SQLite in the run root's present location.
    """
    address = os.environ.get(URI_VARIABLE)
    if address:
        return address, False
    if state.tracking_uri and not state.default_store:
        return state.tracking_uri, False
    return f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}", True


def experiment(run_dir: Path) -> str:
    """Return MLFLOW_EXPERIMENT_NAME, else `tracking.experiment` of the run, or the default."""
    return str(os.environ.get(_EXPERIMENT_VARIABLE) or _section(run_dir, "tracking").get("experiment") or "megalm")


@dataclass(frozen=True)
class GivenRun:
    """MLFLOW_RUN_ID: the MLflow run to fill, or with MLFLOW_NESTED_RUN the parent of the one to create."""

    run_id: str
    is_parent: bool

    @staticmethod
    def of_environment() -> GivenRun | None:
        run_id = os.environ.get(_RUN_VARIABLE)
        nested = os.environ.get(_NESTED_VARIABLE, "").lower() in ("1", "true", "yes")
        return GivenRun(run_id, nested) if run_id else None


def given_tags() -> dict[str, str]:
    """Return the tags in MLFLOW_TAGS, a JSON object.

    Raises:
        ConfigError: it is none.
    """
    text = os.environ.get(_TAGS_VARIABLE)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f'{_TAGS_VARIABLE} is no JSON object; write it as \'{{"team": "one"}}\'')
    return _within_limits(flatten_to_text(found), _LONGEST_TAG)


def where_to_look(run_dir: Path) -> list[str]:
    """Return what opens a run in MLflow: the command that starts a page, if one is needed, and the address."""
    try:
        state = MirrorState.load(run_dir / STATE_FILE)
    except ConfigError:
        state = MirrorState()
    uri = public_address(os.environ.get(URI_VARIABLE, "")) or state.tracking_uri
    if not uri or (state.default_store and not os.environ.get(URI_VARIABLE)):
        uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    served = uri.startswith("http")
    rows = [] if served else [f"mlflow ui --backend-store-uri {shlex.quote(uri)}"]
    if state.run_id and state.experiment_id:
        server = uri.rstrip("/") if served else "http://127.0.0.1:5000"
        # Without the query MLflow opens the experiment as one of generative AI, which has traces and no runs.
        rows.append(f"{server}/#/experiments/{state.experiment_id}/runs?workflowType=machine_learning")
    elif served:
        rows.append(uri)
    return rows


def trackers(run_dir: Path) -> tuple[str, ...]:
    """Return the trackers that a run's settings ask for."""
    wanted = TrackingSection().model_dump() | _section(run_dir, "tracking")
    return tuple(name for name in TRACKERS if wanted[name])


def _section(run_dir: Path, name: str) -> dict[str, Any]:
    """Return a section of config.yaml as it is written; {} where there is none."""
    section = read_mapping(run_dir / CONFIG_FILE).get(name)
    return section if isinstance(section, dict) else {}


def start_ms(run_dir: Path) -> int:
    """Return when the run began, in unix milliseconds: the time of its first row, or now."""
    path = run_dir / METRICS_FILE
    first: Row = next((row for row, _ in read_rows(path)), {}) if path.exists() else {}
    moment = first.get("time")
    return int((moment if isinstance(moment, float) else time.time()) * 1000)


def settings(run_dir: Path) -> dict[str, str]:
    """Return config.yaml flattened (`train.steps`), and the DeepSpeed JSON, resolved, under `deepspeed.`."""
    config = read_mapping(run_dir / CONFIG_FILE)
    return flatten_to_text(config) | flatten_to_text(read_deepspeed_settings(run_dir), "deepspeed.")


def parameters(run_dir: Path) -> dict[str, str]:
    """Return the settings that have a value, as the run resolved them, and the facts that make a run, within limits."""
    environment = read_mapping(run_dir / ENVIRONMENT_FILE)
    resolved = environment.get("resolved")
    facts = flatten_to_text(environment)
    found = {name: facts[key] for key, name in _PARAMETERS_OF_ENVIRONMENT.items() if key in facts}
    found |= settings(run_dir) | (flatten_to_text(resolved) if isinstance(resolved, dict) else {})
    shown = {name: text for name, text in found.items() if text not in _UNSET and not name.startswith(_NOT_PARAMETERS)}
    return _within_limits(shown, _LONGEST_PARAMETER)


def tags(run_dir: Path) -> dict[str, str]:
    """Return tags from environment.json, its plain values, git facts and fingerprints, and those of MLFLOW_TAGS."""
    environment = read_mapping(run_dir / ENVIRONMENT_FILE)
    if isinstance(environment.get("command"), list):
        environment["command"] = shlex.join(map(str, environment["command"]))
    found = {
        name: value
        for name, value in flatten_to_text(environment).items()
        if name not in _NOT_TAGS
        and value not in _UNSET
        and ("." not in name or name.startswith("git.") or "fingerprint" in name)
    }
    found |= {RUN_DIR_TAG: str(run_dir.resolve())}
    if (sweep := _section(run_dir, "tracking").get("sweep")) is not None:
        found |= {SWEEP_TAG: str(run_dir.resolve().parent / "sweeps" / str(sweep))}
    commit = next((found[name] for name in ("git_commit", "git.commit", "commit") if found.get(name)), None)
    if commit:
        found["mlflow.source.git.commit"] = commit  # shown by MLflow in its own column
    return _within_limits(found, _LONGEST_TAG) | given_tags()


def event_tags(row: Row) -> dict[str, str]:
    """Return the fields of an attempt's first event as tags: attempt, fingerprints, host. The last attempt's win."""
    fields = {name: value for name, value in row.items() if name not in _NOT_TAGS_OF_EVENTS}
    if "path" in fields:
        fields["resumed_from"] = fields.pop("path")
    found = {name: value for name, value in flatten_to_text(fields).items() if value not in _UNSET}
    return _within_limits(found, _LONGEST_TAG)


@dataclass(frozen=True)
class UsedDataset:
    """A dataset as MLflow lists it.

    Attributes:
        context: training or validation.
        digest: of the dataset's tokens, if known.
        profile: its numbers.
    """

    name: str
    context: str
    source: str
    digest: str
    profile: dict[str, Any]


def datasets(run_dir: Path) -> Iterator[UsedDataset]:
    """Yield the datasets that a run trains on, as environment.json has them, and those that it validates on."""
    trained = read_mapping(run_dir / ENVIRONMENT_FILE).get("datasets")
    for entry in trained if isinstance(trained, list) else ():
        if isinstance(entry, dict) and entry.get("prefix"):
            yield _dataset(str(entry["prefix"]), "training", {key: entry[key] for key in entry if key != "prefix"})
    validated = _section(run_dir, "data").get("validation")
    for prefix in validated.values() if isinstance(validated, dict) else [validated] if validated else ():
        yield _dataset(str(prefix), "validation", {})


def _dataset(prefix: str, context: str, facts: dict[str, Any]) -> UsedDataset:
    try:
        sidecar = read_sidecar(prefix) or {}
    except DataError:
        sidecar = {}
    known = {name: sidecar[name] for name in ("tokens", "documents", "text_bytes") if sidecar.get(name)}
    digest = str(sidecar.get("bin_sha256") or "unknown")[:12]
    return UsedDataset(Path(prefix).name, context, prefix, digest, known | facts)


def artifact_names(run_dir: Path, failed: bool = False) -> list[str]:
    """Return the files to upload, relative to the run folder: configuration, environment, report, samples, profiles.

    Args:
        failed: also what says why a run ended: its log, traceback, stacks and reports of spikes.
    """
    folders = ("samples", *(_ARTIFACTS_OF_FAILURES if failed else ()))
    found = [path for name in folders for path in (run_dir / name, *sorted((run_dir / name).rglob("*")))]
    found += sorted(path for path in (run_dir / PROFILE_FOLDER).glob("step*") if path.suffix in (".txt", ".json"))
    names = [name for name in _ARTIFACTS if (run_dir / name).is_file()]
    return names + [path.relative_to(run_dir).as_posix() for path in found if path.is_file()]


def signature(path: Path) -> list[int] | None:
    """Return [mtime in ns, bytes] of a file; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_mtime_ns, status.st_size]


def clean_name(name: str) -> str:
    """Return the name with only the characters and the length that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)[:_LONGEST_NAME]


def shorten(value: str, longest: int) -> str:
    return value if len(value) <= longest else value[: longest - 3] + "..."


def _within_limits(found: dict[str, str], longest: int) -> dict[str, str]:
    return {clean_name(name): shorten(value, longest) for name, value in found.items()}
