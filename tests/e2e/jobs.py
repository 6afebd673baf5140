"""The commands as people start them: real launchers, real processes, an end that is looked at closely.

Where the launcher and the start of Python prove nothing, `forked` runs the same script without the time of imports.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megalm.runs.metrics_log import read_metrics
from tests.e2e.forked import ForkedRanks

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"
MEGALM = Path(sys.executable).with_name("megalm")
DS_CONFIGS = ROOT / "ds_configs"

# A model and a batch that a CPU steps through in hundredths of a second.
SMALL = (
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "data.sequence_length=64",
    "schedule.warmup_steps=2",
    "train.rehearse=false",
    "evaluate.interval_steps=null",
    "checkpoint.interval_steps=null",
    "sample.prompts=['def ']",
    "sample.max_new_tokens=4",
    "tracking.mlflow=false",
)
_LAUNCHER_LINE = re.compile(r"\[(launch|runner)\.py:|^\*+$|^Setting OMP_NUM_THREADS|torch/distributed/run")
_MARK = "MEGALM_E2E_JOB"
_FORKED = "forked:"  # and a number of ranks, in place of a launcher
_SHELL_SETTINGS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN", "MLFLOW_TAGS"),
)


def launcher(name: str, ranks: int = 1) -> list[str]:
    """The words before launch/pretrain.py: `forked`, `python`, `deepspeed` (no flag for one rank) or `torchrun`."""
    if name == "forked":
        return [f"{_FORKED}{ranks}"]
    if name == "python":
        assert ranks == 1
        return [sys.executable]
    if name == "deepspeed":
        flags = ["--num_gpus", str(ranks)] if ranks > 1 else []
        return [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(_free_port()), *flags]
    assert name == "torchrun", name
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


@dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str
    seconds: float
    left: list[str]  # command lines of what was still alive a moment later

    def explain(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.stdout}\n--- stderr\n{self.stderr}"


@dataclass
class Job:
    """A started command; all its processes carry a mark in their environment, wherever they move to."""

    process: subprocess.Popen[str] | ForkedRanks
    mark: str
    folder: Path
    started: float = field(default_factory=time.monotonic)

    def processes(self) -> list[psutil.Process]:
        """Everything alive of this job: launchers, ranks, mirrors."""
        # What is forked shows the fork server's environment; it leads a session of its own.
        sessions = self.process.pids if isinstance(self.process, ForkedRanks) else ()
        return [
            process
            for process in psutil.process_iter()
            if _environment(process).get(_MARK) == self.mark or (sessions and _session(process) in sessions)
        ]

    def rank(self, rank: int) -> psutil.Process:
        """The training process of a rank."""
        if isinstance(self.process, ForkedRanks):
            return psutil.Process(self.process.pids[rank])
        for process in self.processes():
            words = process.cmdline()
            is_rank = any(word == str(PRETRAIN) for word in words[1:3])
            if is_rank and _environment(process).get("RANK", "0") == str(rank):
                return process
        raise AssertionError(f"rank {rank} is not alive")

    def wait(self, timeout_seconds: float = 300.0, patience_seconds: float = 0.0) -> Finished:
        """The end of the command, and of all it started within `patience_seconds` more."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            stdout, stderr = self.process.communicate(timeout=30)
            raise AssertionError(f"still alive after {timeout_seconds} s\n{stdout}\n--- stderr\n{stderr}") from None
        seconds = time.monotonic() - self.started
        # psutil sees a process for a moment longer than its parent has waited for it.
        until(lambda: not self.processes(), max(patience_seconds, 1.0), must=False)
        left = [" ".join(process.cmdline()) for process in self.processes()]
        return Finished(self.process.returncode, stdout, stderr, seconds, left)

    def wait_for_step(self, step: int, timeout_seconds: float = 300.0) -> None:
        """Until metrics.jsonl of the job's only run has this step."""

        def reached() -> bool:
            assert self.process.poll() is None, self.wait().explain()
            return any(row["step"] >= step for row in train_rows(self.folder))

        until(reached, timeout_seconds)

    def kill(self) -> None:
        if isinstance(self.process, ForkedRanks):
            self.process.kill()  # at once: looking for all else of the job takes a moment
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@contextmanager
def job(folder: Path, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Iterator[Job]:
    """Start `command` in `folder`, in a session of its own; at the end nothing of it is left."""
    mark = uuid.uuid4().hex
    env = {name: value for name, value in os.environ.items() if name not in _SHELL_SETTINGS}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["DS_ACCELERATOR"] = "cpu"  # the same numbers on a machine with a GPU, and more ranks than it has GPUs
    started = Job(
        _start([str(word) for word in command], folder, {**env, **(environment or {}), _MARK: mark}), mark, folder
    )
    try:
        yield started
    finally:
        started.kill()
        if started.process.poll() is None:
            started.process.communicate(timeout=30)
        if isinstance(started.process, ForkedRanks):
            started.process.close()


def _start(command: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[str] | ForkedRanks:
    if command[0].startswith(_FORKED):
        return ForkedRanks(command[1:], int(command[0].removeprefix(_FORKED)), folder, environment)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(
    folder: Path,
    command: Sequence[str | Path],
    timeout_seconds: float = 400.0,
    patience_seconds: float = 0.0,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command to its end, and what it started in the background for `patience_seconds` more."""
    with job(folder, command, environment) as started:
        return started.wait(timeout_seconds, patience_seconds)


def pretrain(
    *words: str, using: str = "forked", ranks: int = 1, json_file: str | Path = "fp32.json"
) -> list[str | Path]:
    """The command; `json_file` is a shipped one's name or a path."""
    return [*launcher(using, ranks), PRETRAIN, "--deepspeed_config", DS_CONFIGS / json_file, *words]


def megalm(*words: object, using: str = "forked") -> list[str | Path]:
    """The `megalm` command."""
    return [*launcher(using), MEGALM, *map(str, words)]


def write_json(path: Path, base: str = "fp32.json", **changes: Any) -> Path:
    """A shipped DeepSpeed JSON with other top-level values (None removes one)."""
    content = json.loads((DS_CONFIGS / base).read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def run_folder(folder: Path) -> Path:
    """The only run under `folder`/runs."""
    (found,) = (path for path in (folder / "runs").iterdir() if path.is_dir() and path.name != "mlartifacts")
    return found


def train_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if row["kind"] == "train"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the only run under `folder`/runs; nothing where there is none yet."""
    files = list(folder.glob("runs/*/metrics.jsonl"))
    assert len(files) <= 1, files
    return list(read_metrics(files[0])) if files else []


def losses(folder: Path) -> dict[int, float]:
    """Step -> training loss, the newest row of each step."""
    return {row["step"]: row["loss"] for row in train_rows(folder)}


def own_lines(stderr: str) -> list[str]:
    """What megalm itself and its libraries wrote there: without the launchers' words about themselves."""
    return [line for line in stderr.splitlines() if line.strip() and not _LAUNCHER_LINE.search(line)]


def until(true: Callable[[], bool], timeout_seconds: float, must: bool = True) -> bool:
    """Wait for `true()`; whether it came."""
    deadline = time.monotonic() + timeout_seconds
    while not true():
        if time.monotonic() > deadline:
            assert not must, f"not so within {timeout_seconds} s"
            return False
        time.sleep(0.05)
    return True


def interrupt_group(started: Job) -> None:
    """What a terminal does at Ctrl-C."""
    os.killpg(started.process.pid, signal.SIGINT)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return {}
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _session(process: psutil.Process) -> int:
    try:
        return 0 if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.Error, OSError):
        return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
