"""The facts about a run that go to a tracking store, read from its folder: address, parameters, tags, artifacts."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from megalm.runs.metrics_log import METRICS_FILE, Row, read_rows
from megalm.runs.run_folder import CONFIG_FILE, DEEPSPEED_FILE, ENVIRONMENT_FILE, read_deepspeed_settings, read_mapping
from megalm.tracking.mlflow_mirror.sync_state import MirrorState
from megalm.utils.formatting import flatten_to_text

URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_DIR_TAG = "megalm.run_dir"  # the folder that an MLflow run belongs to
SWEEP_TAG = "megalm.sweep"  # the folder of the sweep of the run, or of a sweep's own MLflow run
FACT_FILES = (CONFIG_FILE, DEEPSPEED_FILE, ENVIRONMENT_FILE)

_ARTIFACTS = (*FACT_FILES, "deepspeed.json", "report.html")
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
    """Return `tracking.experiment` of the run, or the default."""
    section = read_mapping(run_dir / CONFIG_FILE).get("tracking")
    name = section.get("experiment") if isinstance(section, dict) else None
    return str(name or "megalm")


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
    """Return the settings within MLflow's limits."""
    return _within_limits(settings(run_dir), _LONGEST_PARAMETER)


def tags(run_dir: Path) -> dict[str, str]:
    """Return tags from environment.json: its plain values, git facts and fingerprints, without package versions."""
    environment = flatten_to_text(read_mapping(run_dir / ENVIRONMENT_FILE))
    found = {
        name: value for name, value in environment.items() if "." not in name or "git" in name or "fingerprint" in name
    }
    found |= {RUN_DIR_TAG: str(run_dir.resolve())}
    section = read_mapping(run_dir / CONFIG_FILE).get("tracking")
    if isinstance(section, dict) and section.get("sweep") is not None:
        found |= {SWEEP_TAG: str(run_dir.resolve().parent / "sweeps" / str(section["sweep"]))}
    commit = next((found[name] for name in ("git_commit", "git.commit", "commit") if found.get(name)), None)
    if commit:
        found["mlflow.source.git.commit"] = commit  # shown by MLflow in its own column
    return _within_limits(found, _LONGEST_TAG)


def event_tags(row: Row) -> dict[str, str]:
    """Return the fields of a start or resume event as tags: fingerprints, host, world size. The last attempt's win."""
    fields = {name: value for name, value in row.items() if name not in ("kind", "time", "event", "step")}
    return _within_limits(flatten_to_text(fields), _LONGEST_TAG)


def artifact_names(run_dir: Path) -> list[str]:
    """Return the files to upload, relative to the run folder: configuration, environment, report, all samples."""
    samples = sorted(path for path in (run_dir / "samples").rglob("*") if path.is_file())
    names = [name for name in _ARTIFACTS if (run_dir / name).is_file()]
    return names + [path.relative_to(run_dir).as_posix() for path in samples]


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
