"""From `--resume` and what goes with it to the run as it will really be: its checkpoint, its data, where it goes on.

Like setup.py this knows the concrete classes; what may change and what follows from it is in continuing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import require_training_state
from megalm.communicator import Communicator, SingleProcessCommunicator
from megalm.data.sampling.mixture import BlendedSamples
from megalm.errors import ConfigError
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.resolve import ResolvedRun
from megalm.runs.run_folder import RunFolder, weights_alone
from megalm.train.datasets import DataPlaces, RunData, open_data, validation_fingerprint
from megalm.train.resume.compatibility import (
    DataIdentity,
    change_notes,
    continuation_kind,
    first_sample_of,
    identity_of,
    incompatibilities,
    lengths_of_order,
    progress_from,
    refuse_incompatible,
    with_last_step,
    with_schedule,
)
from megalm.train.resume.find_checkpoint import ResumeCheckpoint, find_checkpoint
from megalm.train.resume.resume_request import ResumeOptions, read_last_attempt
from megalm.train.resume.training_progress import TrainingProgress


@dataclass(frozen=True)
class ResumePlan:
    """A run as it will be.

    Attributes:
        reader: the checkpoint that it goes on from; `weights_only`: as nothing but a model.
        resume: what was asked for, or is asked for again.
        notes, warnings: what a person should know.
    """

    run: ResolvedRun
    data: RunData
    shape: ModelConfig
    identity: DataIdentity
    position: TrainingProgress
    reader: CheckpointReader | None
    resume: ResumeOptions
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def weights_only(self) -> bool:
        return self.reader is not None and self.resume.weights_only


def find_resume_checkpoint(
    folder: RunFolder, resume: ResumeOptions, comm: Communicator, say: Callable[[str], None] = lambda _: None
) -> tuple[ResumeCheckpoint | None, ResumeOptions]:
    """The checkpoint to go on from, and what is asked for: where `auto` comes upon the checkpoint that the last
    attempt went on from, the same as of that one.

    Args:
        say: told how far the check of a large checkpoint has come.

    Raises:
        CheckpointError: it is not there or damaged.
        ConfigError: there is none to extend; or the run's own weights as the start of the same run; or weights alone
            as a whole training state.
    """
    wanted = resume.wanted
    if wanted is None:
        return None, resume
    before, requeued = comm.once(lambda: read_last_attempt(folder, wanted))
    if requeued:
        resume = ResumeOptions("auto")
    found = find_checkpoint(folder, "auto" if requeued else wanted, comm, before.origin if before else None, say)
    if found is not None and not found.reader.holds_weights_only:
        require_training_state(found.reader.path, found.reader.manifest)
    if found is not None and before is not None and resume.wanted == "auto":
        resume = before.repeat(resume, found.reader)
    if found is None and (resume.extension or resume.skip_steps):
        raise ConfigError(f"{folder.path} has no checkpoint yet, so there is nothing to extend; leave the flag out")
    if found is not None and found.reader.holds_weights_only and not resume.weights_only:
        raise weights_alone(found.reader.path)
    if found is not None and resume.weights_only and found.reader.path.resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(
            f"--extend-strategy weights starts at step 0, which {folder.path} has had; name a new run with run.name"
        )
    return found, resume


def plan_last_step(
    run: ResolvedRun, found: ResumeCheckpoint | None, resume: ResumeOptions
) -> tuple[ResolvedRun, TrainingProgress]:
    """The run with the last step that it will have, and a position with its schedule."""
    position = TrainingProgress()
    manifest = found.reader.manifest if found is not None and not resume.weights_only else None
    with_schedule(position, run, manifest, resume.extension.steps if manifest and resume.extension else None)
    return with_last_step(run, position), position


def plan_resume(
    run: ResolvedRun,
    scheduled: TrainingProgress,
    places: DataPlaces,
    found: ResumeCheckpoint | None,
    resume: ResumeOptions,
) -> ResumePlan:
    """Open the data as the checkpoint's position wants it, and refuse what cannot go on.

    Args:
        run, scheduled: of `plan_last_step`.

    Raises:
        CheckpointError: another model, dataset, tokenizer or order than the checkpoint's, unless it is allowed.
        ConfigError: data that cannot go on with another sequence length.
    """
    manifest = found.reader.manifest if found is not None else None
    goes_on = manifest is not None and not resume.weights_only
    stages = first_sample_of(manifest if goes_on else None, run)
    data = open_data(run, places, stages)
    then = manifest.model["max_position_embeddings"] if manifest is not None else 0
    # A table of positions may be longer than the samples are now; it stays the one that was trained.
    longest = max(run.config.data.sequence_length, then)
    shape = build_model_config(run.config.model, data.tokenizer.vocab_size, longest)
    identity = DataIdentity(data.train, data.tokenizer.fingerprint, validation_fingerprint(run, data))
    if found is None or manifest is None:
        return ResumePlan(run, data, shape, identity, scheduled, None, resume, (), ())
    resume = replace(resume, allow=(*resume.allow, *run.config.resume.allow))
    if resume.weights_only:
        other = incompatibilities(manifest, identity_of(run, shape, identity, 0))
        refuse_incompatible(
            found.reader.path, {k: v for k, v in other.items() if k in ("model", "tokenizer")}, resume.allow
        )
        notes: tuple[str, ...] = (
            f"starts from the weights of {found.reader.path}, at step 0 and the data's beginning",
        )
        return ResumePlan(run, data, shape, identity, scheduled, found.reader, resume, notes, found.warnings)
    lengths = lengths_of_order(manifest)

    def open_with(length: int) -> BlendedSamples:
        section = run.config.data.model_copy(update={"sequence_length": length})
        other_run = replace(run, config=run.config.model_copy(update={"data": section}))
        return (
            data.train
            if len(lengths) == 1 and length == run.config.data.sequence_length
            else open_data(other_run, places, stages).train
        )

    order = _order_so_far(lengths, open_with)
    consumed = manifest.data_position.segments[-1].next_sample
    other = incompatibilities(manifest, identity_of(run, shape, replace(identity, samples=order), consumed))
    refuse_incompatible(found.reader.path, other, resume.allow)
    begins = continuation_kind(run, manifest, other)
    notes = ()
    if begins == "recut":
        order = order.recut(lengths[-1][1], run.config.data.sequence_length)
        skipped, repeated = order.recut_tokens
        notes = (
            f"what is left of this pass over the data is cut into samples of {run.config.data.sequence_length} tokens: "
            f"{skipped:,} tokens are skipped, {repeated:,} read twice",
        )
    elif begins == "anew":  # stages are stated by the run's steps, the order starts after those that are done
        done, batch = manifest.step, run.batch.global_batch
        data = open_data(run, places, lambda step: (step - 1 - done) * batch)
        order = data.train
    identity = replace(identity, samples=order)
    position = progress_from(manifest, run, begins)
    position.schedule, position.configured_schedules = scheduled.schedule, scheduled.configured_schedules
    to_come = (run.config.train.steps - position.step) * run.batch.global_batch
    data = replace(data, train=order, samples=position.samples + max(0, to_come))
    if position.best_loss is not None and manifest.validation not in (None, identity.validation):
        position.best_loss, position.stale_evaluations = None, 0
        notes += ("validation is on other data: the lowest loss so far is not compared with",)
    if resume.skip_steps:
        samples = resume.skip_steps * run.batch.global_batch
        here = identity.at(position.samples)["order"]
        position.pass_over(samples, here, run.config.data.sequence_length, run.batch.global_batch)
        notes += (f"the data of {resume.skip_steps} steps, {samples:,} samples, is passed over",)
    notes = (*change_notes(position, manifest, run), *notes)
    return ResumePlan(run, data, shape, identity, position, found.reader, resume, notes, found.warnings)


def _order_so_far(lengths: list[tuple[int, int]], open_with: Callable[[int], BlendedSamples]) -> BlendedSamples:
    order = open_with(lengths[0][0])
    for (_, end), (length, _) in pairwise(lengths):
        order = order.recut(end, length)
    return order


# Where a run would go on, and on which schedules, without a process group: for `--dry-run` beside `--resume`.


def planned_start(run: ResolvedRun, resume: ResumeOptions) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """The run with the last step that it will have, and all schedules that it then has had.

    Raises:
        CheckpointError, ConfigError: as when it is started; files are hashed as they are then.
    """
    section = run.config.run
    folder = RunFolder(Path(section.root).expanduser() / (section.name or "-"))
    found, resume = find_resume_checkpoint(folder, resume, SingleProcessCommunicator())
    run, position = plan_last_step(run, found, resume)
    return run, position.schedule
