"""resume.json, the record of the last attempt that resumed from a checkpoint.

`--resume 1500` in a folder that has step 2000 abandons later steps. If the job is killed before its first save, no
checkpoint records this, but `runs/NAME/resume.json` does: `--resume auto` then repeats the same options.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import ResumedFrom
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.rank_environment import job_and_restarts
from megalm.runs.run_folder import RunFolder
from megalm.runs.run_settings import Extension, ResumeOptions
from megalm.utils.atomic_files import read_json, write_json


class StartedJob(BaseModel):
    """The job of Slurm or torchrun that started an attempt, and its number of restarts; see `job_and_restarts`."""

    model_config = ConfigDict(frozen=True)

    job: str | None = None
    restarts: int = 0

    @staticmethod
    def of_this_process() -> StartedJob:
        job, restarts = job_and_restarts()
        return StartedJob(job=job, restarts=restarts)

    def is_after(self, earlier: StartedJob) -> bool:
        """Return whether this is the job of `earlier`, restarted."""
        return self.job is not None and self.job == earlier.job and self.restarts > earlier.restarts


class LastAttempt(BaseModel):
    """The last attempt that resumed from a checkpoint, and its options; the content of resume.json.

    Attributes:
        next_sample: the checkpoint's next sample when it was resumed; a later rollback to it increases that.
        restarts_without_progress: restarts of one job in a row that resumed from this same checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempt: int
    path: Path
    next_sample: int
    extend_steps: int | None = None
    extend_strategy: Literal["schedule", "weights"] = "schedule"
    skip_steps: int = 0
    allow: tuple[str, ...] = ()
    job: StartedJob = StartedJob()
    restarts_without_progress: int = 0

    @property
    def origin(self) -> ResumedFrom:
        return ResumedFrom(self.path, self.attempt)

    def repeat(self, resume: ResumeOptions, found: CheckpointReader) -> ResumeOptions:
        """Return the options of `--resume auto`: those of this attempt too, if `found` is its checkpoint."""
        if not self.origin.is_at(found.path):
            return resume
        extension = None if self.extend_steps is None else Extension(self.extend_steps, self.extend_strategy)
        untouched = _next_sample(found) == self.next_sample
        return replace(
            resume,
            extension=resume.extension or extension,
            skip_steps=resume.skip_steps or (self.skip_steps if untouched else 0),
            allow=(*resume.allow, *self.allow),
        )


_RESTARTS_WITHOUT_PROGRESS = 3  # then a job that starts itself again would do so for ever


def describe_attempt(
    found: CheckpointReader, resume: ResumeOptions, attempt: int, before: LastAttempt | None = None
) -> LastAttempt:
    """Return the record of this attempt for the next one to read.

    Args:
        before: the last attempt.

    Raises:
        ConfigError: this job has restarted three times in a row without a step that it could keep.
    """
    extension, job = resume.extension, StartedJob.of_this_process()
    in_vain = 0
    if before is not None and job.is_after(before.job) and before.origin.is_at(found.path):
        in_vain = before.restarts_without_progress + 1
    if in_vain >= _RESTARTS_WITHOUT_PROGRESS:
        raise ConfigError(
            f"{job.job} has started {in_vain} times in a row from {found.path.name} and kept no step of it: the run "
            "takes longer to start than it is allowed to last, or fails at the same place; its log has the reasons. "
            "Mend that, then submit it as a new job"
        )
    return LastAttempt(
        attempt=attempt,
        path=found.path.resolve(),
        next_sample=_next_sample(found),
        extend_steps=extension.steps if extension else None,
        extend_strategy=extension.strategy if extension else "schedule",
        skip_steps=resume.skip_steps,
        allow=tuple(sorted(set(resume.allow))),
        job=job,
        restarts_without_progress=in_vain,
    )


def attempt_after_rollback(before: LastAttempt | None, found: CheckpointReader, attempt: int) -> LastAttempt:
    """Return the record of the attempt that a rollback begins.

    After a rollback to the checkpoint that `before` resumed from, its options must apply again: only later checkpoints
    include its extension.
    """
    if before is not None and before.origin.is_at(found.path):
        return before.model_copy(update={"attempt": attempt})
    job = before.job if before is not None else StartedJob()
    return LastAttempt(attempt=attempt, path=found.path.resolve(), next_sample=_next_sample(found), job=job)


def read_last_attempt(folder: RunFolder, wanted: str) -> tuple[LastAttempt | None, bool]:
    """Return the last attempt, and whether this process is its job, restarted: then that attempt continues.

    Raises:
        CheckpointError: resume.json cannot be read, and `wanted` is auto.
    """
    try:
        before = _read(folder)
    except CheckpointError:
        if wanted == "auto":
            raise
        return None, False
    return before, before is not None and StartedJob.of_this_process().is_after(before.job)


def _read(folder: RunFolder) -> LastAttempt | None:
    if not folder.request.exists():
        return None
    try:
        found = LastAttempt.model_validate(read_json(folder.request))
    except (DataError, ValidationError) as error:
        raise CheckpointError(
            f"{folder.request} is damaged ({' '.join(str(error).split())[:80]}); use --resume STEP or --resume PATH"
        ) from None
    return found.model_copy(update={"path": folder.path.resolve() / found.path})


def record_attempt(folder: RunFolder, found: CheckpointReader, resume: ResumeOptions, attempt: int) -> LastAttempt:
    """Write and return the record of this attempt.

    Raises:
        ConfigError: see `describe_attempt`.
    """
    try:
        before = _read(folder)
    except CheckpointError:
        before = None
    record = describe_attempt(found, resume, attempt, before)
    write_attempt(folder, record)
    return record


def write_attempt(folder: RunFolder, request: LastAttempt) -> None:
    """Write resume.json for the next attempt; paths in the run folder are relative, so that it can be moved."""
    own = folder.path.resolve()
    path = request.path.relative_to(own) if request.path.is_relative_to(own) else request.path
    write_json(folder.request, request.model_copy(update={"path": path}).model_dump(mode="json"))


def _next_sample(found: CheckpointReader) -> int:
    segments = found.manifest.data_position.segments
    return segments[-1].next_sample if segments else 0  # an imported checkpoint has none
