"""The copies of a run's checkpoints (checkpoint.copy_to) at its start and its end; see checkpoint/copies/."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from megalm.checkpoint.copies.copy_process import AFTER_TRAINING_SECONDS, CopyHandle, CopyRequest
from megalm.checkpoint.copies.copy_store import CopyStore
from megalm.checkpoint.copies.fetch import check_copy_place, fetch_newest, refuse_copies_of_another_run
from megalm.checkpoint.retention import Retention, tidy
from megalm.communicator import Communicator
from megalm.config.schema import RunConfig
from megalm.errors import EXIT_DONE
from megalm.runs.run_folder import RunFolder
from megalm.runs.run_settings import ResumeOptions
from megalm.train.resume.resume_request import read_last_attempt
from megalm.utils.formatting import format_duration

# How long a job that stops early waits for copies: Slurm and clouds end it soon.
_LEAVING_SECONDS = 30.0


def check_copies(config: RunConfig, options: ResumeOptions) -> None:
    """Check the place of checkpoint.copy_to for a start, where the run has one; errors as `check_copy_place`."""
    address, run = config.checkpoint.copy_to, config.run
    if address is not None:
        check_copy_place(address, Path(run.root), run.name, options.wanted is not None)


def fetch_newer_copy(
    config: RunConfig, options: ResumeOptions, folder: RunFolder, comm: Communicator, info: Callable[[str], None]
) -> bool:
    """Before `find_checkpoint` looks: with `--resume auto` download a copy that is newer than all that the folder has;
    return whether there was one. Collective: rank 0 downloads.

    Raises:
        CheckpointError: the folder has no checkpoint, and the copies cannot be read.
        ConfigError: the run is a new one, and there are copies of another one of its name.
    """
    address, is_best = config.checkpoint.copy_to, config.checkpoint.best
    assert address is not None

    def fetch() -> bool:
        if config.run.name is None:
            refuse_copies_of_another_run(CopyStore(address, folder.name))
        if options.wanted != "auto" or config.run.name is None:
            return False
        before, _ = read_last_attempt(folder, "auto")
        found = fetch_newest(folder.path, address, before.origin if before else None, info)
        if found is not None:
            tidy(folder.checkpoints, is_best)
        return found is not None

    return comm.once(fetch)


def start_run_copies(folder: RunFolder, config: RunConfig) -> CopyHandle | None:
    """Start the process that copies the run's checkpoints, if it is to have one."""
    settings = config.checkpoint
    if settings.copy_to is None:
        return None
    kept = Retention(settings.copy_keep_last, settings.keep_every_steps, settings.best)
    files = tuple(path.name for path in folder.small_files)
    return CopyHandle(CopyRequest(folder.path.resolve(), settings.copy_to, kept, files))


def finish_run_copies(handle: CopyHandle | None, config: RunConfig, code: int, say: Callable[[str], None]) -> None:
    """On rank 0, wait for the last copies, and tell which are missing; a job that stops early waits less."""
    if handle is None:
        return
    settings = config.checkpoint
    limit = settings.copy_wait_seconds if code == EXIT_DONE else min(settings.copy_wait_seconds, _LEAVING_SECONDS)
    missing = handle.finish(limit, say)
    status = handle.read(now=True)
    if missing:
        why = f" ({status.problem})" if status.problem else ""
        command = shlex.join(["megalm", "checkpoint", "copy", str(handle.request.run_dir), str(settings.copy_to)])
        say(
            f"WARNING: {', '.join(missing)} not copied after {format_duration(limit)}{why}; copying continues for "
            f"{format_duration(AFTER_TRAINING_SECONDS)} if this machine does, later run {command}"
        )
    else:
        say(f"all checkpoints to keep are copied to {status.address}")
