"""Taking the run folder for this job: which one it is, that no other job has it, and a place to tell failures in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalm.communicator import Communicator
from megalm.config.loading import config_to_yaml
from megalm.errors import ConfigError
from megalm.planning.resolve import ResolvedRun
from megalm.runs.run_folder import RunFolder, open_run_folder
from megalm.runs.run_lock import RunLock
from megalm.train.console import RunConsole
from megalm.train.lifecycle.shutdown import FailureClaim, RankSupervisor
from megalm.train.resume.find_checkpoint import clean_up_interrupted_saves


@dataclass(frozen=True)
class OpenRun:
    """Attributes: attempt: 1 for a new run; lock: held."""

    folder: RunFolder
    lock: RunLock
    attempt: int
    reporter: RunConsole


def open_run(run: ResolvedRun, resume: bool, comm: Communicator, guard: RankSupervisor) -> OpenRun:
    """Make or take the folder and put it in order; from here on `guard` tells failures there.

    Raises:
        ConfigError: the ranks mean different runs, the folder is not to be had, or another job has it.
    """
    _refuse_different_configurations(run, comm)
    folder = comm.once(lambda: open_run_folder(Path(run.config.run.root), run.config.run.name, run.preset, resume))
    is_new = comm.is_main and folder.is_empty
    lock = RunLock(folder.path)
    comm.once(lock.take)
    if is_new:  # not before the lock: another job may have begun in it meanwhile
        guard.on_refusal = folder.remove_if_unused
    attempt = comm.once(folder.next_attempt)
    guard.share(FailureClaim(folder.failure(attempt)))
    reporter = RunConsole(comm.is_main, folder.log)
    reporter.info(f"megalm run {folder.path}")
    for notice in run.notices:
        reporter.info(f"  note: {notice}")
    for path in clean_up_interrupted_saves(folder, comm):
        reporter.info(f"  note: an earlier job was killed while it saved or deleted; put in order: {path}")
    return OpenRun(folder, lock, attempt, reporter)


def _refuse_different_configurations(run: ResolvedRun, comm: Communicator) -> None:
    """Each rank has read the run's own configuration: a machine that saw another file would train another model."""
    if len(set(comm.gather((config_to_yaml(run.config), str(run.deepspeed))))) > 1:
        raise ConfigError(
            f"the ranks read different configurations of run {run.config.run.name}; put run.root and the files that "
            "you name on a file system that all machines share, and start again"
        )
