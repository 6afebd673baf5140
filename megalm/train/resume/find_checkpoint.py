"""What was saved of a run, as the next attempt finds it: put in order, looked at byte by byte, chosen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import Entry, ResumedFrom, resume_candidates
from megalm.checkpoint.manifest import hashed_blocks, without_advice
from megalm.checkpoint.retention import tidy
from megalm.communicator import Communicator
from megalm.errors import CheckpointError
from megalm.runs.run_folder import RunFolder
from megalm.utils.progress import ProgressBar


@dataclass(frozen=True)
class ResumeCheckpoint:
    """What a run goes on from.

    Attributes:
        warnings: what a person should know of it: damaged ones that were passed over, a suspect one that was taken.
    """

    reader: CheckpointReader
    warnings: tuple[str, ...]


def clean_up_interrupted_saves(folder: RunFolder, comm: Communicator) -> list[Path]:
    """Finish what a killed job left half done; for the holder of the run's lock, before anything else."""

    def work() -> list[Path]:
        shutil.rmtree(folder.rehearsal, ignore_errors=True)
        return tidy(folder.checkpoints)

    return comm.once(work)


def find_checkpoint(
    folder: RunFolder,
    wanted: str,
    comm: Communicator,
    origin: ResumedFrom | None = None,
    info: Callable[[str], None] = lambda _: None,
) -> ResumeCheckpoint | None:
    """The checkpoint that `--resume wanted` means; None: start at step 0.

    Needs no engine, so that what cannot be resumed is refused before a model is built and the run's account is
    touched. `auto` passes over damaged ones; one that is named must be whole.

    Args:
        origin: what the last attempt went on from.
        info: told how far the check of large files has come.

    Raises:
        CheckpointError: it is not there, or a file is damaged.
    """
    entries = comm.once(lambda: resume_candidates(folder.checkpoints, wanted, origin))
    damaged: list[str] = []
    for entry in entries:
        reader, problem = open_verified(entry, comm, info)
        if reader is not None:
            return ResumeCheckpoint(reader, (*(f"passed over: {words}" for words in damaged), *_suspicion(entry)))
        if wanted != "auto":
            raise CheckpointError(problem)
        damaged.append(without_advice(problem, entry.path))
    if damaged:
        raise CheckpointError(f"no checkpoint of {folder.path} can be used: {'; '.join(damaged)}")
    return None


def open_verified(
    entry: Entry, comm: Communicator, info: Callable[[str], None] = lambda _: None
) -> tuple[CheckpointReader | None, str]:
    """The checkpoint, or what is wrong with it; each rank hashes its share of the files."""
    reader, problem = None, entry.problem
    if entry.manifest is not None:
        try:
            reader = CheckpointReader(entry.path)
            blocks = hashed_blocks(reader.manifest, comm.rank, comm.size)
            progress = ProgressBar(f"checking {entry.path.name}", blocks, say=info)
            problem = reader.verify(comm.rank, comm.size, progress.advance)
        except CheckpointError as error:
            problem = str(error)
    problem = next(filter(None, comm.gather(problem)), "")
    return (None if problem else reader), problem


def _suspicion(entry: Entry) -> list[str]:
    if entry.manifest is None or entry.status != "suspect":
        return []
    return [f"going on from {entry.path}, which is marked suspect ({entry.manifest.status_reason})"]
