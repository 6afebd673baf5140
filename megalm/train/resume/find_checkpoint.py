"""Find the checkpoint to resume from: clean up interrupted saves, choose a checkpoint and verify its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import Entry, ResumedFrom, resume_candidates
from megalm.checkpoint.manifest import Manifest, hashed_blocks, without_advice
from megalm.checkpoint.retention import tidy
from megalm.communicator import Communicator
from megalm.errors import CheckpointError
from megalm.runs.run_folder import RunFolder
from megalm.utils.progress import ProgressBar


@dataclass(frozen=True)
class ResumeCheckpoint:
    """The checkpoint that a run resumes from.

    Attributes:
        warnings: skipped damaged checkpoints, or that this one is suspect.
    """

    reader: CheckpointReader
    warnings: tuple[str, ...]


def clean_up_interrupted_saves(folder: RunFolder, comm: Communicator, keep_best: bool = False) -> list[Path]:
    """Clean up the unfinished saves of a killed job; the holder of the run's lock calls it before anything else.

    Args:
        keep_best: write `checkpoints/best` also if it is missing.
    """

    def work() -> list[Path]:
        shutil.rmtree(folder.preflight, ignore_errors=True)
        return tidy(folder.checkpoints, keep_best)

    return comm.once(work)


def find_checkpoint(
    folder: RunFolder,
    wanted: str,
    comm: Communicator,
    origin: ResumedFrom | None = None,
    info: Callable[[str], None] = lambda _: None,
    require: Callable[[Path, Manifest], None] = lambda path, manifest: None,
) -> ResumeCheckpoint | None:
    """Return the checkpoint that `--resume wanted` refers to; None: start at step 0.

    Needs no engine, so that a checkpoint that cannot be resumed is refused before a model is built or the run folder's
    files change. `auto` skips damaged checkpoints; a named one must be complete.

    Args:
        origin: the checkpoint that the last attempt resumed from.
        info: called with progress lines while large files are verified.
        require: raises CheckpointError for a manifest that lacks something.

    Raises:
        CheckpointError: the checkpoint is missing, or a file is damaged.
    """
    entries = comm.once(lambda: resume_candidates(folder.checkpoints, wanted, origin))
    damaged: list[str] = []
    for entry in entries:
        reader, problem = open_verified(entry, comm, info, require)
        if reader is not None:
            return ResumeCheckpoint(
                reader, (*(f"skipped a damaged checkpoint: {words}" for words in damaged), *_suspicion(entry))
            )
        if wanted != "auto":
            raise CheckpointError(problem)
        damaged.append(without_advice(problem, entry.path))
    if damaged:
        raise CheckpointError(f"no checkpoint of {folder.path} can be used: {'; '.join(damaged)}")
    return None


def open_verified(
    entry: Entry,
    comm: Communicator,
    info: Callable[[str], None] = lambda _: None,
    require: Callable[[Path, Manifest], None] = lambda path, manifest: None,
) -> tuple[CheckpointReader | None, str]:
    """Return the checkpoint, or the problem with it. Collective: each rank hashes its share of the files."""
    reader, problem = None, entry.problem
    if entry.manifest is not None:
        try:
            reader = CheckpointReader(entry.path)
            require(entry.path, reader.manifest)
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
    return [f"resuming from {entry.path}, which is marked suspect ({entry.manifest.status_reason})"]
