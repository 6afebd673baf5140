"""What a run was last set to go on from, until checkpoints of its own stand for that.

`--resume 1500` in a folder that has step 2000 leaves an attempt behind. If the job is killed before its first save,
nothing in the checkpoints says so: `runs/NAME/resume.json` does, and `--resume auto` asks for the same again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import ResumedFrom
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.runs.run_folder import RunFolder
from megalm.runs.saved_config import ConfigFiles, read_settings
from megalm.train.resume.compatibility import Extension
from megalm.utils.atomic_files import read_json, write_json


@dataclass(frozen=True)
class Arguments:
    """What a person may say on the command line of launch/pretrain.py.

    Attributes:
        deepspeed_config: None: the run's own where one goes on, else zero2.json.
    """

    deepspeed_config: str | None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    extend_steps: int | None = None
    extend_strategy: Literal["schedule", "weights"] = "schedule"
    skip_steps: int = 0

    def read(self, ranks: int) -> tuple[ResumeOptions, ConfigFiles]:
        """What is asked for, and both configurations of a run on so many ranks.

        Raises:
            ConfigError: flags that say nothing without others, or what is wrong in a configuration by itself.
        """
        options = ResumeOptions.stated(self.resume, self.extend_steps, self.extend_strategy, self.skip_steps)
        words = (*self.overrides, *options.overrides)
        return options, read_settings(self.config, words, self.deepspeed_config, self.resume is not None, ranks)


@dataclass(frozen=True)
class ResumeOptions:
    """What is asked for.

    Attributes:
        wanted: auto, a step or a path; None: a new run.
        skip_steps: pass over the data of so many steps first.
        allow: things of `resume.allow` beside what the configuration says.
    """

    wanted: str | None = None
    extension: Extension | None = None
    skip_steps: int = 0
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.wanted is None and (self.extension or self.skip_steps):
            raise ConfigError("--extend-steps and --skip-steps go on from a checkpoint: say which with --resume")

    @staticmethod
    def stated(
        wanted: str | None, extend_steps: int | None, extend_strategy: Literal["schedule", "weights"], skip_steps: int
    ) -> ResumeOptions:
        """What the flags of a command line say together.

        Raises:
            ConfigError: flags that say nothing without others.
        """
        if extend_steps is None and extend_strategy == "weights":
            raise ConfigError("--extend-strategy weights starts a run of so many steps: say how many, --extend-steps N")
        extension = None if extend_steps is None else Extension(extend_steps, extend_strategy)
        return ResumeOptions(wanted, extension, skip_steps)

    @property
    def overrides(self) -> tuple[str, ...]:
        """What they say of the run's configuration: weights alone start a run of its own, from step 0."""
        return (f"train.steps={self.extension.steps}",) if self.extension and self.weights_only else ()

    @property
    def weights_only(self) -> bool:
        return self.extension is not None and self.extension.strategy == "weights"


class SlurmJob(BaseModel):
    """A job of Slurm and how often it was started again: the words of a requeued job are those of its first start."""

    model_config = ConfigDict(frozen=True)

    job: str | None = None
    restarts: int = 0

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> SlurmJob:
        return SlurmJob(job=environment.get("SLURM_JOB_ID"), restarts=int(environment.get("SLURM_RESTART_COUNT") or 0))

    def is_after(self, earlier: SlurmJob) -> bool:
        """Whether it is the job of `earlier`, started again."""
        return self.job is not None and self.job == earlier.job and self.restarts > earlier.restarts


class LastAttempt(BaseModel):
    """An attempt that went on from a checkpoint, and how.

    Attributes:
        next_sample: where the checkpoint's data stood; after a rollback to it, it stands further.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempt: int
    path: Path
    next_sample: int
    extend_steps: int | None = None
    extend_strategy: Literal["schedule", "weights"] = "schedule"
    skip_steps: int = 0
    allow: tuple[str, ...] = ()
    job: SlurmJob = SlurmJob()

    @property
    def origin(self) -> ResumedFrom:
        return ResumedFrom(self.path, self.attempt)

    def repeat(self, resume: ResumeOptions, found: CheckpointReader) -> ResumeOptions:
        """What is asked for by a `resume` that said auto; the same as last time, where that checkpoint was found."""
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


def describe_attempt(found: CheckpointReader, resume: ResumeOptions, attempt: int) -> LastAttempt:
    """What this attempt is, to be read by the next one."""
    extension = resume.extension
    return LastAttempt(
        attempt=attempt,
        path=found.path.resolve(),
        next_sample=_next_sample(found),
        extend_steps=extension.steps if extension else None,
        extend_strategy=extension.strategy if extension else "schedule",
        skip_steps=resume.skip_steps,
        allow=tuple(sorted(set(resume.allow))),
        job=SlurmJob.from_environment(os.environ),
    )


def attempt_after_rollback(before: LastAttempt | None, found: CheckpointReader, attempt: int) -> LastAttempt:
    """The attempt that a rollback begins: an extension is in every checkpoint but the one that it started from."""
    if before is not None and before.origin.is_at(found.path):
        return before.model_copy(update={"attempt": attempt})
    job = before.job if before is not None else SlurmJob()
    return LastAttempt(attempt=attempt, path=found.path.resolve(), next_sample=_next_sample(found), job=job)


def read_last_attempt(folder: RunFolder, wanted: str) -> tuple[LastAttempt | None, bool]:
    """What the last attempt was, and whether this is its job of Slurm, started again: then that goes on.

    Raises:
        CheckpointError: it cannot be read, and `wanted` is auto.
    """
    try:
        before = _read(folder)
    except CheckpointError:
        if wanted == "auto":
            raise
        return None, False
    return before, before is not None and SlurmJob.from_environment(os.environ).is_after(before.job)


def _read(folder: RunFolder) -> LastAttempt | None:
    if not folder.request.exists():
        return None
    try:
        found = LastAttempt.model_validate(read_json(folder.request))
    except (DataError, ValidationError) as error:
        raise CheckpointError(
            f"{folder.request} is damaged ({' '.join(str(error).split())[:80]}); say what to go on from: --resume STEP "
            "or PATH"
        ) from None
    return found.model_copy(update={"path": folder.path.resolve() / found.path})


def write_attempt(folder: RunFolder, request: LastAttempt) -> None:
    """Keep it for the next attempt, on disk; a path in the run folder moves with it."""
    own = folder.path.resolve()
    path = request.path.relative_to(own) if request.path.is_relative_to(own) else request.path
    write_json(folder.request, request.model_copy(update={"path": path}).model_dump(mode="json"))


def _next_sample(found: CheckpointReader) -> int:
    segments = found.manifest.data_position.segments
    return 0 if found.holds_weights_only else segments[-1].next_sample
