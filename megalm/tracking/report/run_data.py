"""A run folder, read for its page: everything that is there, and nothing that has to be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.discovery import BEST, LATEST, list_checkpoints, read_pointer, step_folders
from megalm.checkpoint.manifest import wrong_file
from megalm.config.loading import load_run_config
from megalm.config.schema import RunConfig
from megalm.errors import ConfigError, MegalmError
from megalm.runs.metrics_history import History, read_history
from megalm.runs.metrics_log import METRICS_FILE, ReadRows, Row, read_metrics
from megalm.runs.run_folder import CONFIG_FILE, DEEPSPEED_FILE, ENVIRONMENT_FILE, parameter_count, read_mapping
from megalm.tracking.compare_runs import Results, RunRecord, results
from megalm.utils.formatting import flatten_to_text

_STEP = re.compile(r"step-(\d+)")
_LOCK_FILE = "lock"
# A run counts in its lock every five seconds; a network file system may show that late.
_ALIVE_SECONDS = 40.0
# Settings that name a run and say nothing about it.
_OF_THE_NAME = ("run.name", "preset")


@dataclass(frozen=True)
class Checkpoint:
    """A line of the table; `problem`: what is wrong with its files."""

    name: str
    step: int | None
    tokens: int | None
    bytes: int | None
    loss: float | None
    over: int | None
    status: str
    marks: str
    problem: str = ""


@dataclass(frozen=True)
class Setting:
    """A value of config.yaml, and what the preset or the default has instead (None: the same)."""

    name: str
    value: str
    base: str | None


@dataclass(frozen=True)
class Failure:
    attempt: int
    text: str

    @property
    def last_line(self) -> str:
        return next((line.strip() for line in reversed(self.text.splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class RunData:
    """Everything about one run.

    Attributes:
        preset: that the settings are compared with; None: with the defaults.
        failures: in the order of attempts.
        samples: files in the order of steps.
        is_held: a process counts in the run's lock: it is being trained.
    """

    run_dir: Path
    history: History
    results: Results
    environment: Mapping[str, Any]
    settings: list[Setting]
    preset: str | None
    deepspeed: Mapping[str, Any]
    checkpoints: list[Checkpoint]
    failures: list[Failure]
    samples: list[Path]
    is_held: bool

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    def events(self, *names: str) -> list[Row]:
        return [row for row in self.history.events if row.get("event") in names]

    def setting(self, name: str) -> str | None:
        return next((setting.value for setting in self.settings if setting.name == name), None)

    @property
    def planned_steps(self) -> int | None:
        stated = self.setting("train.steps")
        return int(stated) if stated is not None and stated.isdecimal() else None


def read_run(run_dir: Path, now: float, read: ReadRows = read_metrics) -> RunData:
    """Read a run folder; a run that has not begun to train has an account too.

    Raises:
        ConfigError: it is no run folder, or a configuration file in it is damaged.
        DataError: a line of metrics.jsonl before the last is damaged.
    """
    metrics = run_dir / METRICS_FILE
    known = (metrics, run_dir / CONFIG_FILE, run_dir / "failures", run_dir / "checkpoints")
    if not any(path.exists() for path in known):
        raise ConfigError(f"{run_dir}: no run folder (no {METRICS_FILE}, no {CONFIG_FILE}); name one under run.root")
    history = read_history(read(metrics) if metrics.exists() else [])
    settings, preset = _settings(run_dir / CONFIG_FILE)
    return RunData(
        run_dir=run_dir,
        history=history,
        results=results(RunRecord(run_dir.name, {}, history, parameter_count(run_dir))),
        environment=read_mapping(run_dir / ENVIRONMENT_FILE),
        settings=settings,
        preset=preset,
        deepspeed=read_mapping(run_dir / DEEPSPEED_FILE),
        checkpoints=_checkpoints(run_dir / "checkpoints"),
        failures=_failures(run_dir / "failures"),
        samples=sorted(path for path in (run_dir / "samples").glob("step-*.txt") if _STEP.match(path.name)),
        is_held=_is_held(run_dir / _LOCK_FILE, now),
    )


def text_of(path: Path, longest: int) -> tuple[str, int]:
    """The beginning of a text file, and how many bytes of it are left out; what is no UTF-8 is shown as such."""
    try:
        with path.open("rb") as file:
            content = file.read(longest)
        return content.decode("utf-8", errors="replace"), max(0, path.stat().st_size - longest)
    except OSError as error:
        return f"cannot be read: {error.strerror}", 0


def step_of_file(path: Path) -> int:
    match = _STEP.match(path.name)
    return int(match[1]) if match else 0


def _settings(path: Path) -> tuple[list[Setting], str | None]:
    config = read_mapping(path)
    preset = config.get("preset")
    base: RunConfig = RunConfig()
    if preset is not None:
        try:
            base = load_run_config(str(preset), []).config
        except MegalmError:  # made by another version, or from a file that is gone: held against the defaults
            preset = None
    expected = flatten_to_text(base.model_dump(mode="json", by_alias=True))
    found = [
        Setting(name, value, expected.get(name, "not known") if value != expected.get(name) else None)
        for name, value in flatten_to_text(config).items()
    ]
    return [setting for setting in found if setting.name not in _OF_THE_NAME], preset


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """In the order of steps, with those that are not complete."""
    entries = {entry.path: entry for entry in list_checkpoints(folder)}
    marks = {LATEST: read_pointer(folder, LATEST), BEST: read_pointer(folder, BEST)}
    found = []
    for path in step_folders(folder):
        pointers = ", ".join(word for word, name in marks.items() if name == path.name)
        entry = entries.get(path)
        if entry is None:
            found.append(Checkpoint(path.name, None, None, None, None, None, "incomplete", pointers))
            continue
        manifest = entry.manifest
        if manifest is None:
            found.append(Checkpoint(path.name, entry.step, None, None, None, None, "damaged", pointers, entry.problem))
            continue
        problem, whole = wrong_file(path, manifest), manifest.whole_validation_loss
        found.append(
            Checkpoint(
                name=path.name,
                step=entry.step,
                tokens=manifest.tokens,
                bytes=manifest.bytes,
                loss=manifest.validation_loss if whole is None else whole,
                over=manifest.validation_tokens if whole is None else manifest.whole_validation_tokens,
                status="damaged" if problem else manifest.status,
                marks=pointers,
                problem=problem or manifest.status_reason or "",
            )
        )
    return found


def _failures(folder: Path) -> list[Failure]:
    found = []
    for path in folder.glob("attempt-*.txt"):
        number = path.stem.rpartition("-")[2]
        if number.isdecimal():
            found.append(Failure(int(number), path.read_text(encoding="utf-8", errors="replace")))
    return sorted(found, key=lambda failure: failure.attempt)


def _is_held(lock: Path, now: float) -> bool:
    """Whoever trains counts in there, and empties it when it leaves."""
    try:
        status = lock.stat()
    except OSError:
        return False
    return status.st_size > 0 and now - status.st_mtime < _ALIVE_SECONDS
