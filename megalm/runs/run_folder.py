"""The run folder: its paths, how to find or create it, and the files written into it before training starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.discovery import BEST, LATEST, complete_checkpoints, list_checkpoints
from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.shard_spec import WEIGHTS
from megalm.config.deepspeed.json_reader import open_deepspeed_json, parse_deepspeed_json
from megalm.config.schema import RunConfig, RunSection
from megalm.config.validation import parse_yaml
from megalm.errors import ConfigError
from megalm.planning.batch_size import BatchPlan
from megalm.planning.resolve import ResolvedRun
from megalm.rank_environment import job_and_restarts, submit_options
from megalm.runs.elastic import EarlierStarts
from megalm.runs.metrics_log import METRICS_FILE, read_newest_first
from megalm.utils.addresses import hide_credentials_in_word
from megalm.utils.atomic_files import is_stranger, write_bytes_atomically, write_json
from megalm.utils.formatting import flatten_mapping

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
DEEPSPEED_GIVEN_FILE = "deepspeed.json"
DEEPSPEED_FILE = "deepspeed.resolved.json"
ENVIRONMENT_FILE = "environment.json"
PROFILE_FOLDER = "profile"

ERROR_OPENING = "megalm: error: "  # of a message for a person
_FAILURE_FILE = re.compile(r"attempt-(\d+)\.txt")
_STEM = "run"  # of runs without a name and a preset
_PACKAGES = ("torch", "deepspeed", "numpy", "sentencepiece", "tokenizers", "safetensors", "mlflow", "megalm")


def parameter_count(run_dir: Path) -> int | None:
    """Return the model's parameter count from environment.json or a checkpoint; None if neither has it."""
    counts = [read_mapping(run_dir / ENVIRONMENT_FILE).get("parameters")]
    if counts == [None]:
        counts = [entry.manifest.parameters for entry in list_checkpoints(run_dir / "checkpoints") if entry.manifest]
    return next((count for count in counts if isinstance(count, int)), None)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping; return {} if there is no such file.

    Raises:
        ConfigError: the file exists and is not a mapping.
    """
    if is_stranger(path):
        raise ConfigError(f"{path} is not a file; move it away")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else parse_yaml(text, str(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); fix it") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a mapping of names to values; fix it")
    return content


def read_deepspeed_settings(folder: Path) -> dict[str, Any]:
    """Return dotted key -> value of the DeepSpeed JSON of a run or checkpoint: as resolved, else as the user wrote it.

    Raises:
        ConfigError: a file is not readable.
    """
    given = folder / DEEPSPEED_GIVEN_FILE
    written = {} if is_stranger(given) or not given.exists() else parse_deepspeed_json(given)
    return flatten_mapping(written) | flatten_mapping(read_mapping(folder / DEEPSPEED_FILE))


def failure_line(path: Path) -> str | None:
    """Return a failure report in a line: its first one, and of a traceback its last one too; None: there is no report.

    The file's very first line is the exit code.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError:
        return None
    told = [line.removeprefix(ERROR_OPENING).strip() for line in lines if line.strip()]
    if told and told[0].endswith(":"):
        return " ".join([told[0], *told[1:][-1:]])
    return told[0] if told else "no report"


class _Entry:
    """A file or folder of a run folder, by its name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/NAME`."""

    path: Path

    config_yaml = _Entry(CONFIG_FILE)
    deepspeed_json = _Entry(DEEPSPEED_GIVEN_FILE)  # as given
    resolved_deepspeed_json = _Entry(DEEPSPEED_FILE)  # as DeepSpeed gets it, and the optimizer
    environment_json = _Entry(ENVIRONMENT_FILE)
    metrics = _Entry(METRICS_FILE)
    log = _Entry("log.txt")
    checkpoints = _Entry("checkpoints")
    samples = _Entry("samples")
    incidents = _Entry("incidents")
    profile = _Entry(PROFILE_FOLDER)  # of steps that the run was asked to measure
    node_check = _Entry("node_check.json")  # of all nodes, at the last start on more than one
    bad_nodes = _Entry("bad_nodes.json")  # found by these checks
    request = _Entry("resume.json")  # the last attempt that resumed from a checkpoint
    preflight = _Entry("rehearsal")  # the checkpoint of the preflight, removed before step 1
    failures = _Entry("failures")

    @property
    def name(self) -> str:
        return self.path.name

    def stacks(self, rank: int) -> Path:
        """The file for a rank's stacks when it hangs."""
        return self.path / "stacks" / f"rank-{rank}.txt"

    @property
    def config_files(self) -> tuple[Path, ...]:
        """The files that each checkpoint has a copy of."""
        return self.config_yaml, self.deepspeed_json, self.resolved_deepspeed_json

    @property
    def small_files(self) -> tuple[Path, ...]:
        """The files that copies of the run's checkpoints come with; without resume.json, which names local paths."""
        return *self.config_files, self.environment_json, self.metrics, self.log

    @property
    def records(self) -> tuple[Path, ...]:
        """The files and folders that the run itself writes and commands read."""
        files = (*self.config_files, self.environment_json, self.metrics, self.log, self.request, self.bad_nodes)
        return *files, self.checkpoints, self.samples, self.incidents, self.failures

    def failure(self, attempt: int) -> Path:
        return self.failures / f"attempt-{attempt}.txt"

    def next_attempt(self) -> int:
        """Return 1 for a new run, else the number after the last attempt.

        Checkpoints are ordered by their attempt, so no number may be used twice, whichever file of the folder was
        deleted: every file that records an attempt counts.
        """
        return 1 + max(self._recorded_attempts(), default=0)

    def _recorded_attempts(self) -> Iterator[int]:
        rows = read_newest_first(self.metrics) if self.metrics.exists() else ()
        newest = next((row for row in rows if row.get("attempt") is not None), {})  # numbers grow from row to row
        recorded = [newest.get("attempt"), *(entry.attempt for entry in list_checkpoints(self.checkpoints))]
        for path in (self.request, *self.path.glob("environment*.json")):
            with contextlib.suppress(ConfigError, OSError):  # whoever needs the rest of the file reports it
                recorded.append(read_mapping(path).get("attempt"))
        recorded += [int(match[1]) for path in self.failures.glob("*") if (match := _FAILURE_FILE.fullmatch(path.name))]
        return (number for number in recorded if isinstance(number, int))

    def require_files(self) -> None:
        """Refuse a folder in which something else has the name of one of the run's files or folders.

        Raises:
            ConfigError: with its path; opening a pipe, for instance, would wait forever.
        """
        files = (*self.config_files, self.environment_json, self.metrics, self.log, self.request)
        folders = (self.checkpoints, self.samples, self.incidents, self.failures)
        pointers = (self.checkpoints / LATEST, self.checkpoints / BEST)
        for path in (*files, *folders, *pointers):
            if is_stranger(path, folder=path in folders):
                kind = "folder" if path in folders else "file"
                raise ConfigError(f"{path} is not a {kind}, as run {self.path} needs it; move it away")
        for path in (self.metrics, self.log):
            if path.exists() and not os.access(path, os.W_OK):
                raise ConfigError(f"{path} cannot be written; check its owner and permissions")

    def earlier_starts(self, config: RunConfig) -> EarlierStarts:
        """Return what the folder records of the run's starts.

        Args:
            config: of its config.yaml.

        Raises:
            ConfigError: a DeepSpeed JSON of the last start is damaged.
        """
        ranks = None
        with contextlib.suppress(ConfigError):  # whoever needs the rest of the file reports it
            ranks = read_mapping(self.environment_json).get("world_size")
        last = self.resolved_deepspeed_json
        batches = [BatchPlan.of_json(read_mapping(last))]
        for path in last.parent.glob(_old_name(last, "*").name):
            with contextlib.suppress(ConfigError, OSError):
                batches.append(BatchPlan.of_json(read_mapping(path)))
        known = tuple(batch for batch in batches if batch is not None) if batches[0] is not None else ()
        given = open_deepspeed_json(self.deepspeed_json).settings if self.deepspeed_json.is_file() else None
        return EarlierStarts(config, ranks if isinstance(ranks, int) else None, known, given)

    @property
    def is_empty(self) -> bool:
        return not any(self.path.iterdir())

    def remove_if_unused(self) -> None:
        """Remove a refused run's folder; renames it first, so that no rank finds half of it."""
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
        """Whether the run never trained: it failed, or left bad nodes, before it had metrics and a checkpoint."""
        return (
            (self.failures.is_dir() or self.bad_nodes.exists())
            and not self.metrics.exists()
            and not complete_checkpoints(self.checkpoints)
        )

    @property
    def imported(self) -> Path | None:
        """The checkpoint of an imported model or an average, if the folder holds one instead of a run."""
        if self.config_yaml.exists():
            return None
        entries = list_checkpoints(self.checkpoints)
        holds = {None if entry.manifest is None else entry.manifest.holds for entry in entries}
        return entries[-1].path if holds and None not in holds else None


@dataclass(frozen=True)
class ResumeCommand:
    """The command that resumes a run; the run's own settings are in its folder.

    Attributes:
        folder: the run folder.
        ranks: on this machine; passed to `deepspeed` if more than one.
        submit: options of `megalm submit` for a job like the run's; None: no Slurm job trained it.
    """

    folder: Path
    ranks: int = 1
    submit: Sequence[str] | None = None

    @classmethod
    def by_folder(cls, folder: Path) -> ResumeCommand:
        """Return the command for a run by what its folder says of its last start."""
        words = read_mapping(folder / ENVIRONMENT_FILE).get("submit")
        return cls(folder, submit=[str(word) for word in words] if isinstance(words, list) else None)

    def shell(self, *words: str) -> str:
        """Return a shell command line that ends with `words` (`--resume auto`, `key=value`)."""
        launch = ["deepspeed", *(["--num_gpus", str(self.ranks)] if self.ranks > 1 else []), "launch/pretrain.py"]
        if self.submit is not None:
            launch = ["megalm", "submit", *self.submit, "--"]
        root = str(self.folder.parent)
        elsewhere = [] if root == RunSection().root else [f"run.root={root}"]
        return shlex.join([*launch, *elsewhere, f"run.name={self.folder.name}", *words])


def newest_run(root: Path, preset: str | None) -> str | None:
    """Return the unnamed run that `--resume` without a name refers to; None: no such run ever started."""
    numbered = _numbered(root.expanduser(), preset or _STEM)
    existing = [path for path in numbered if RunFolder(path).config_yaml.is_file()]
    return existing[-1].name if existing else None


def weights_only_error(checkpoint: Path) -> ConfigError:
    """Return the error for resuming an imported model like a run."""
    return ConfigError(
        f"{checkpoint} holds weights only, so no run can resume from it; start a new run with these weights: "
        f"run.name=NEW --resume {checkpoint} --extend-steps N --extend-strategy weights"
    )


def refuse_existing_run(folder: RunFolder, resume: bool) -> None:
    """Refuse to start a named run in a folder that holds something else.

    Raises:
        ConfigError: the folder has an imported model, or another run and `resume` is not set.
    """
    path = folder.path
    if (checkpoint := folder.imported) is not None:
        if read_manifest(checkpoint).holds == WEIGHTS:
            raise weights_only_error(checkpoint)
        raise ConfigError(
            f"{path} holds an imported checkpoint; start a new run from it: run.name=NEW --resume {checkpoint}"
        )
    if path.exists() and not resume and not folder.never_started:
        resumable = "resume it with --resume auto, or " if complete_checkpoints(folder.checkpoints) else ""
        raise ConfigError(f"run {path} exists; {resumable}choose another run.name")


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
        RunFolder(path).require_files()
        refuse_existing_run(RunFolder(path), resume)
        path.mkdir(exist_ok=True)
        return RunFolder(path)
    except OSError as error:
        raise ConfigError(
            f"cannot create a run folder in {root} ({error}); set run.root to a folder that you can write to"
        ) from error


def write_facts(folder: RunFolder, run: ResolvedRun, facts: Mapping[str, Any]) -> None:
    """Write config.yaml, both DeepSpeed JSONs and environment.json; keep those of earlier attempts beside them."""
    given = Path(run.deepspeed_source.path).read_bytes()  # it may be the folder's own
    current = (*folder.config_files, folder.environment_json)
    number = _next_old_number(current)
    for path in current:
        if path.exists():  # a copy, not a move: a job that is killed here resumes with it
            write_bytes_atomically(_old_name(path, number), path.read_bytes())
    folder.checkpoints.mkdir(exist_ok=True)
    folder.samples.mkdir(exist_ok=True)
    write_bytes_atomically(folder.config_yaml, run.config_yaml.encode())
    write_bytes_atomically(folder.deepspeed_json, given)
    write_json(folder.resolved_deepspeed_json, run.deepspeed | {"optimizer": run.optimizer.as_json()})
    write_json(folder.environment_json, {**environment(), **facts})


def environment() -> dict[str, Any]:
    """Return the environment of this process: interpreter, packages, git commit of the code, host."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "job": job_and_restarts()[0],
        "command": command_line(),
        "submit": submit_options(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "git": _git(),
    }


def command_line() -> list[str]:
    """Return the words of this process's command, without credentials and the rank that DeepSpeed's launcher adds."""
    address = os.environ.get("MLFLOW_TRACKING_URI")
    return [hide_credentials_in_word(word, address) for word in sys.argv if not word.startswith("--local_rank")]


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


def _old_name(path: Path, number: int | str) -> Path:
    return path.with_name(f"{path.stem}.attempt-{number}{path.suffix}")


def _next_old_number(paths: Iterable[Path]) -> int:
    """Return a number above those of all old copies: the copies of a start belong together by their number."""
    copies = [copy for path in paths for copy in path.parent.glob(_old_name(path, "*").name)]
    numbers = [copy.stem.rpartition("-")[2] for copy in copies]
    return 1 + max((int(number) for number in numbers if number.isascii() and number.isdecimal()), default=0)


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of megalm's checkout; None outside a checkout."""
    return _ask_git("rev-parse", "HEAD")


def _git() -> dict[str, Any]:
    """Return the commit of megalm's checkout and whether it has uncommitted changes; {} outside a checkout."""
    commit, changes = git_commit(), _ask_git("status", "--porcelain", "-uno")
    return {} if commit is None or changes is None else {"commit": commit, "changed": bool(changes)}


def _ask_git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
