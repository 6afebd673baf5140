"""Slurm by its own commands: submit a script, read the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalm.errors import ConfigError

# A controller under load takes its time; one that is down never answers.
_TIMEOUT_SECONDS = 30.0
_SEPARATOR = "\x1f"
# Of squeue: number of the job, of the array's task, state, reason, expected or real start, nodes, working folder, name.
_FIELDS = ("%A", "%i", "%T", "%r", "%S", "%N", "%Z", "%j")
# States of a job that holds its nodes.
_ON_NODES = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True)
class QueuedJob:
    """A job that squeue shows: it waits or runs.

    Attributes:
        number: the job's own; each task of an array that runs has one.
        task: as people name it: 12, or 12_3 in an array, 12_[4-9] for tasks that wait.
        state: Slurm's, such as PENDING or RUNNING.
        reason: why it waits.
        start: when it started or is expected to, as Slurm writes it; "" if that is open.
        nodes: as Slurm writes them, such as gpu[1-4].
    """

    number: str
    task: str
    state: str
    reason: str
    start: str
    nodes: str
    folder: str
    name: str

    @property
    def whole(self) -> str:
        """The number that stands for the whole array, or for the job."""
        return self.task.partition("_")[0]

    @property
    def on_nodes(self) -> bool:
        return self.state in _ON_NODES


def require_slurm(command: str = "sbatch") -> None:
    """Raise ConfigError if Slurm's command is not installed."""
    if shutil.which(command) is None:
        raise ConfigError(f"no {command} here; use a machine from which Slurm jobs start (megalm doctor)")


def run_slurm(words: Sequence[str], environment: Mapping[str, str] | None = None, script: str | None = None) -> str:
    """Run a command of Slurm and return what it prints.

    Raises:
        ConfigError: it is not installed, does not answer or refuses, with its words.
    """
    require_slurm(words[0])
    try:
        done = subprocess.run(
            words,
            input=script,
            stdin=subprocess.DEVNULL if script is None else None,
            env=None if environment is None else dict(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_SECONDS if script is None else None,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{words[0]}: Slurm does not answer within {_TIMEOUT_SECONDS:.0f} s; try again later"
        ) from None
    if done.returncode:
        said = [line.removeprefix(f"{words[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise ConfigError(f"{words[0]}: {'; '.join(filter(None, said)) or f'exit code {done.returncode}'}")
    return done.stdout


def submit(script: str, environment: Mapping[str, str]) -> str:
    """Submit a batch script from the working folder; return the job's number.

    Raises:
        ConfigError: Slurm refuses it.
    """
    return run_slurm(["sbatch", "--parsable"], environment, script).strip().partition(";")[0]


def refusal(script: str, environment: Mapping[str, str]) -> str | None:
    """Return why Slurm would refuse a batch script; None: it would take it. Submits nothing."""
    try:
        run_slurm(["sbatch", "--test-only"], environment, script)
    except ConfigError as error:
        return str(error)
    return None


def own_jobs() -> list[QueuedJob]:
    """Return this user's jobs that wait or run; the tasks of an array that wait are one.

    Raises:
        ConfigError: Slurm does not answer.
    """
    words = ["squeue", "--noheader", f"--user={os.getuid()}", f"--format={_SEPARATOR.join(_FIELDS)}"]
    return parse_queue(run_slurm(words))


def parse_queue(text: str) -> list[QueuedJob]:
    """Read the lines of squeue."""
    rows = (line.split(_SEPARATOR) for line in text.splitlines() if line.strip())
    known = ([value if value not in ("N/A", "(null)") else "" for value in row] for row in rows)
    return [QueuedJob(*row) for row in known if len(row) == len(_FIELDS)]


def gpus_of_nodes(partition: str | None) -> bool:
    """Return whether nodes of a partition (None: of any) have GPUs."""
    words = ["sinfo", "--noheader", "--format=%G", *([f"--partition={partition}"] if partition else [])]
    return "gpu" in run_slurm(words)
