"""Read a run folder for its page; every part of it is optional."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.discovery import BEST, LATEST, list_checkpoints, read_pointer, step_folders
from megalm.checkpoint.manifest import Manifest, wrong_file
from megalm.config.loading import load_run_config
from megalm.config.schema import RunConfig
from megalm.errors import ConfigError, MegalmError
from megalm.runs.evaluations import RecordedEvaluation, read_evaluations
from megalm.runs.metrics_history import History, read_history
from megalm.runs.metrics_log import ReadBatches, Row, read_batches
from megalm.runs.run_folder import RunFolder, parameter_count, read_mapping
from megalm.runs.run_lock import is_held
from megalm.tracking.compare_runs import Results, RunRecord, results
from megalm.utils.formatting import flatten_to_text

_STEP = re.compile(r"step-(\d+)")
# Settings that only name a run.
_OF_THE_NAME = ("run.name", "preset")


@dataclass(frozen=True)
class Checkpoint:
    """A row of the checkpoint table; `problem` describes its damage."""

    name: str
    status: str
    pointers: str
    step: int | None = None
    manifest: Manifest | None = None
    problem: str = ""

    @property
    def validation(self) -> tuple[float | None, int | None]:
        """Loss and tokens of the last validation, or of the one over all samples if it was done."""
        saved = self.manifest
        if saved is None:
            return None, None
        if saved.whole_validation_loss is not None:
            return saved.whole_validation_loss, saved.whole_validation_tokens
        return saved.validation_loss, saved.validation_tokens


@dataclass(frozen=True)
class Setting:
    """A value of config.yaml, and the differing value of the preset or the default (None: the same)."""

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
class ReportData:
    """All data of one run's page.

    Attributes:
        preset: the preset that settings are compared with; None: the defaults.
        failures: in order of attempts.
        samples: files in order of steps.
        profile: the JSON of the newest profile; empty without one.
        evaluations: by `megalm evaluate`.
        is_held: whether a process holds the run's lock, so the run is being trained.
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
    profile: Mapping[str, Any]
    evaluations: list[RecordedEvaluation]
    is_held: bool

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    def events(self, *names: str) -> list[Row]:
        return [row for row in self.history.events if row.get("event") in names]

    def setting(self, name: str) -> str | None:
        return next((setting.value for setting in self.settings if setting.name == name), None)

    @property
    def datasets(self) -> list[tuple[str, str]]:
        """The prefix of each training dataset, and what is planned to be read of it; "" where that is not known."""
        found = []
        datasets = self.environment.get("datasets")
        for part in datasets if isinstance(datasets, list) else ():
            epochs, tokens = part.get("epochs"), part.get("tokens_per_epoch")
            known = isinstance(epochs, (int, float)) and isinstance(tokens, int)
            found.append((str(part.get("prefix")), f"{epochs:.2f} epochs of {tokens:,} tokens" if known else ""))
        return found

    @property
    def planned_steps(self) -> int | None:
        planned = self.setting("train.steps")
        return int(planned) if planned is not None and planned.isdecimal() else None


def read_run(run_dir: Path, now: float, read: ReadBatches = read_batches) -> ReportData:
    """Read a run folder, also of a run that has not started to train.

    Raises:
        ConfigError: it is not a run folder, or a configuration file in it is damaged.
        DataError: a line of metrics.jsonl before the last is damaged.
    """
    files = RunFolder(run_dir)
    if not any(path.exists() for path in (files.metrics, files.config_yaml, files.failures, files.checkpoints)):
        missing = f"{files.metrics.name} and no {files.config_yaml.name}"
        raise ConfigError(f"{run_dir}: is not a run folder (it has no {missing}); name one under run.root")
    history = read_history(read(files.metrics) if files.metrics.exists() else [])
    environment = read_mapping(files.environment_json)
    settings, preset = _settings(files.config_yaml)
    return ReportData(
        run_dir=run_dir,
        history=history,
        results=results(RunRecord(run_dir.name, {}, history, parameter_count(run_dir), environment)),
        environment=environment,
        settings=settings,
        preset=preset,
        deepspeed=read_mapping(files.resolved_deepspeed_json),
        checkpoints=_checkpoints(files.checkpoints),
        failures=_failures(files.failures),
        samples=sorted(path for path in files.samples.glob("step-*.txt") if _STEP.match(path.name)),
        profile=_newest_profile(files.profile),
        evaluations=read_evaluations(run_dir),
        is_held=is_held(run_dir, now),
    )


def text_of(path: Path, longest: int) -> tuple[str, int]:
    """Return the first `longest` bytes of a text file, and the number of bytes left out; marks invalid UTF-8."""
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
        except MegalmError:  # of another version, or a file that is gone: compare with the defaults
            preset = None
    expected = flatten_to_text(base.model_dump(mode="json", by_alias=True))
    found = [
        Setting(name, value, expected.get(name, "unknown") if value != expected.get(name) else None)
        for name, value in flatten_to_text(config).items()
    ]
    return [setting for setting in found if setting.name not in _OF_THE_NAME], preset


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints in order of steps, including incomplete ones."""
    entries = {entry.path: entry for entry in list_checkpoints(folder)}
    marks = {LATEST: read_pointer(folder, LATEST), BEST: read_pointer(folder, BEST)}
    found = []
    for path in step_folders(folder):
        pointers = ", ".join(word for word, name in marks.items() if name == path.name)
        entry = entries.get(path)
        if entry is None:
            found.append(Checkpoint(path.name, "incomplete", pointers))
            continue
        manifest, problem = entry.manifest, entry.problem
        if manifest is not None:
            problem = wrong_file(path, manifest)
        status = "damaged" if manifest is None or problem else manifest.status
        reason = problem or (manifest and manifest.status_reason) or ""
        found.append(Checkpoint(path.name, status, pointers, entry.step, manifest, reason))
    return found


def _failures(folder: Path) -> list[Failure]:
    found = []
    for path in folder.glob("attempt-*.txt"):
        number = path.stem.rpartition("-")[2]
        if number.isdecimal():
            found.append(Failure(int(number), path.read_text(encoding="utf-8", errors="replace")))
    return sorted(found, key=lambda failure: failure.attempt)


def _newest_profile(folder: Path) -> Mapping[str, Any]:
    """Return the content of the JSON written last; of another version's, which has no times, nothing."""
    newest = max(folder.glob("step*.json"), key=lambda path: path.stat().st_mtime_ns, default=None)
    content = {} if newest is None else read_mapping(newest)
    return content if "times" in content else {}
