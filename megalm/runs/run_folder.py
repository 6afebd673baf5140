"""The run folder: its paths, how to find or create it, and the files written into it before training starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.discovery import complete_checkpoints, list_checkpoints
from megalm.checkpoint.shard_spec import WEIGHTS
from megalm.config.schema import RunSection
from megalm.config.yaml_reader import parse_yaml
from megalm.errors import ConfigError
from megalm.planning.resolve import ResolvedRun
from megalm.runs.metrics_log import ATTEMPT_EVENTS, read_metrics
from megalm.utils.atomic_files import write_bytes_atomically, write_json

CONFIG_FILE = "config.yaml"

DEEPSPEED_FILE = "deepspeed.resolved.json"

ENVIRONMENT_FILE = "environment.json"


def parameter_count(run_dir: Path) -> int | None:
    """Return the model's parameter count from environment.json or a checkpoint; None if neither has it."""
    noted = [read_mapping(run_dir / ENVIRONMENT_FILE).get("parameters")]
    if noted[0] is None:
        noted = [entry.manifest.parameters for entry in list_checkpoints(run_dir / "checkpoints") if entry.manifest]
    return next((count for count in noted if isinstance(count, int)), None)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping; return {} if there is no such file.

    Raises:
        ConfigError: the file exists and is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else parse_yaml(text, str(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no mapping of names to values; mend it")
    return content


log = logging.getLogger(__name__)

_FAILURE_FILE = re.compile(r"attempt-(\d+)\.txt")
_STEM = "run"  # of runs without a name and a preset
_PACKAGES = ("torch", "deepspeed", "numpy", "sentencepiece", "tokenizers", "safetensors", "mlflow", "megalm")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/NAME`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def request(self) -> Path:
        """The record of the last attempt that resumed from a checkpoint."""
        return self.path / "resume.json"

    @property
    def rehearsal(self) -> Path:
        """The folder of the preflight checkpoint, written before step 1 and removed."""
        return self.path / "rehearsal"

    @property
    def incidents(self) -> Path:
        return self.path / "incidents"

    def stacks(self, rank: int) -> Path:
        """The file for a rank's stacks when it hangs."""
        return self.path / "stacks" / f"rank-{rank}.txt"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def config_yaml(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def deepspeed_json(self) -> Path:
        """The DeepSpeed JSON as it was given."""
        return self.path / "deepspeed.json"

    @property
    def resolved_deepspeed_json(self) -> Path:
        """What DeepSpeed gets."""
        return self.path / DEEPSPEED_FILE

    @property
    def environment_json(self) -> Path:
        return self.path / ENVIRONMENT_FILE

    @property
    def config_files(self) -> tuple[Path, ...]:
        """What is kept with every checkpoint."""
        return self.config_yaml, self.deepspeed_json, self.resolved_deepspeed_json

    def failure(self, attempt: int) -> Path:
        return self._failures / f"attempt-{attempt}.txt"

    def next_attempt(self) -> int:
        """Return 1 for a new run, else the number after the last attempt.

        Checkpoints are ordered by their attempt, so no number may be used twice, whichever file of the folder was
        deleted: every file that records an attempt counts.
        """
        return 1 + max(self._recorded_attempts(), default=0)

    def _recorded_attempts(self) -> Iterator[int]:
        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        recorded = [row.get("attempt") for row in rows if row.get("event") in ATTEMPT_EVENTS]
        recorded += [entry.attempt for entry in list_checkpoints(self.checkpoints)]
        for path in (self.request, *self.path.glob("environment*.json")):
            with contextlib.suppress(ConfigError, OSError):  # whoever needs the rest of the file reports it
                recorded.append(read_mapping(path).get("attempt"))
        recorded += [
            int(match[1]) for path in self._failures.glob("*") if (match := _FAILURE_FILE.fullmatch(path.name))
        ]
        return (number for number in recorded if isinstance(number, int))

    @property
    def is_empty(self) -> bool:
        return not any(self.path.iterdir())

    def remove_if_unused(self) -> None:
        """Leave nothing of a run that was refused; at once, so that no rank finds half of it."""
        if self.config_yaml.exists() or complete_checkpoints(self.checkpoints):
            return
        gone = self.path.with_name(f".{self.name}.refused")
        try:
            self.path.rename(gone)
        except OSError as error:  # the refusal is more important
            log.debug("%s stays: %s", self.path, error)
        else:
            shutil.rmtree(gone, ignore_errors=True)

    @property
    def never_started(self) -> bool:
        """Whether the run never trained: there is a failure file, but no metrics and no checkpoint."""
        return self._failures.is_dir() and not self.metrics.exists() and not complete_checkpoints(self.checkpoints)

    @property
    def imported(self) -> Path | None:
        """The weights, where this is no run's folder but that of an imported model."""
        if self.config_yaml.exists():
            return None
        entries = list_checkpoints(self.checkpoints)
        holds = {None if entry.manifest is None else entry.manifest.holds for entry in entries}
        return entries[-1].path if holds == {WEIGHTS} else None

    @property
    def _failures(self) -> Path:
        return self.path / "failures"


@dataclass(frozen=True)
class ResumeCommand:
    """The command that resumes a run; the run's own settings are in its folder.

    Attributes:
        folder: the run folder.
        ranks: on this machine; passed to `deepspeed` if more than one.
    """

    folder: Path
    ranks: int = 1

    def shell(self, *words: str) -> str:
        """Return a shell command line that ends with `words` (`--resume auto`, `key=value`)."""
        launch = ["deepspeed", *(["--num_gpus", str(self.ranks)] if self.ranks > 1 else []), "launch/pretrain.py"]
        root = str(self.folder.parent)
        elsewhere = [] if root == RunSection().root else [f"run.root={root}"]
        return shlex.join([*launch, *elsewhere, f"run.name={self.folder.name}", *words])


def newest_run(root: Path, preset: str | None) -> str | None:
    """Return the unnamed run that `--resume` without a name refers to; None: no such run ever started."""
    numbered = _numbered(root.expanduser(), preset or _STEM)
    existing = [path for path in numbered if RunFolder(path).config_yaml.is_file()]
    return existing[-1].name if existing else None


def weights_alone(checkpoint: Path) -> ConfigError:
    """Return the error for resuming an imported model like a run."""
    return ConfigError(
        f"{checkpoint} holds weights alone, no moments, data or schedule to go on with; start a run of its own from "
        f"them: run.name=NEW --resume {checkpoint} --extend-steps N --extend-strategy weights"
    )


def open_run_folder(root: Path, name: str | None, preset: str | None, resume: bool) -> RunFolder:
    """Find or create the folder of this run; called on rank 0 only.

    Args:
        name: `run.name`; None takes the next free `PRESET-001`.
        resume: `--resume` was given, so the folder may exist.

    Raises:
        ConfigError: a named run exists without `resume`, the folder holds an imported model, or it cannot be created.
    """
    root = root.expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if name is None:
            return RunFolder(_next_free(root, preset or _STEM))
        path = root / name
        if (checkpoint := RunFolder(path).imported) is not None:
            raise weights_alone(checkpoint)
        if path.exists() and not resume and not RunFolder(path).never_started:
            hint = (
                "--resume auto goes on with it"
                if complete_checkpoints(path / "checkpoints")
                else "it has no checkpoint"
            )
            raise ConfigError(f"run {path} exists ({hint}); choose another run.name, or resume it")
        path.mkdir(exist_ok=True)
        return RunFolder(path)
    except OSError as error:
        raise ConfigError(
            f"cannot make a run folder in {root}: {error}; set run.root to a place you can write"
        ) from error


def write_facts(folder: RunFolder, run: ResolvedRun, facts: Mapping[str, Any]) -> None:
    """Write config.yaml, both DeepSpeed JSONs and environment.json; earlier ones of a resumed run are kept beside."""
    given = Path(run.deepspeed_source.path).read_bytes()  # it may be the folder's own
    for path in (*folder.config_files, folder.environment_json):
        if path.exists():  # kept where it is too: a job that is killed here goes on with it
            write_bytes_atomically(_next_old_name(path), path.read_bytes())
    folder.checkpoints.mkdir(exist_ok=True)
    folder.samples.mkdir(exist_ok=True)
    write_bytes_atomically(folder.config_yaml, run.config_yaml.encode())
    write_bytes_atomically(folder.deepspeed_json, given)
    write_json(folder.resolved_deepspeed_json, run.deepspeed)
    write_json(folder.environment_json, {**environment(), **facts})


def environment() -> dict[str, Any]:
    """Return the environment of this process: interpreter, packages, git commit of the code, host."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git(),
    }


def _numbered(root: Path, stem: str) -> list[Path]:
    pattern = re.compile(re.escape(stem) + r"-\d{3,}")
    found = [path for path in root.glob(f"{stem}-*") if path.is_dir() and pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _next_free(root: Path, stem: str) -> Path:
    existing = _numbered(root, stem)
    number = int(existing[-1].name.rsplit("-", 1)[1]) if existing else 0
    while True:  # another job may take the same number at the same time
        number += 1
        path = root / f"{stem}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _next_old_name(path: Path) -> Path:
    number = 1
    while (old := path.with_name(f"{path.stem}.attempt-{number}{path.suffix}")).exists():
        number += 1
    return old


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Return the commit of megalm's checkout and whether it has uncommitted changes; {} outside a checkout."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}
