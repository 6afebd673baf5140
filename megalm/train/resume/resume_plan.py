"""From `--resume` and related options to a plan: the checkpoint, schedule and data with which the run continues.

Like setup.py this module knows the concrete classes; the rules about what may change are in compatibility.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import Beginning, Manifest, require_training_state, shape_of
from megalm.checkpoint.shard_spec import WEIGHTS
from megalm.communicator import Communicator, SingleProcessCommunicator
from megalm.data.sampling.mixture import BlendedSamples
from megalm.errors import ConfigError
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.resolve import ResolvedRun
from megalm.runs.run_folder import RunFolder, weights_only_error
from megalm.train.datasets import DataPlaces, RunData, find_data, open_data, rebuild_data, validation_fingerprint
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
from megalm.train.resume.training_progress import RunSchedule, TrainingProgress


@dataclass(frozen=True)
class ResumePlan:
    """A run as it will be trained.

    Attributes:
        reader: the checkpoint that it resumes from; with `weights_only`, only its model is used.
        resume: the resume options, possibly repeated from the last attempt.
        notes, warnings: lines to show to the user.
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
    folder: RunFolder, resume: ResumeOptions, comm: Communicator, info: Callable[[str], None] = lambda _: None
) -> tuple[ResumeCheckpoint | None, ResumeOptions]:
    """Return the checkpoint to resume from, and the resume options.

    If `auto` finds the checkpoint that the last attempt resumed from, that attempt's options apply again.

    Args:
        info: called with progress lines while a large checkpoint is verified.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: there is no checkpoint to extend, the run would restart from its own weights, or a checkpoint with
            weights only is given as a complete training state.
    """
    wanted = resume.wanted
    if wanted is None:
        return None, resume
    before, requeued = comm.once(lambda: read_last_attempt(folder, wanted))
    if requeued:
        resume = ResumeOptions("auto")
    origin = before.origin if before else None
    found = find_checkpoint(folder, "auto" if requeued else wanted, comm, origin, info, _require_state)
    if found is not None and before is not None and resume.wanted == "auto":
        resume = before.repeat(resume, found.reader)
    if found is None and (resume.extension or resume.skip_steps):
        raise ConfigError(f"{folder.path} has no checkpoint yet, so there is nothing to extend; leave the flag out")
    if found is not None and found.reader.holds_weights_only and not resume.weights_only:
        raise weights_only_error(found.reader.path)
    if found is not None and resume.weights_only and found.reader.path.resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(
            f"--extend-strategy weights starts at step 0, which {folder.path} has had; name a new run with run.name"
        )
    return found, resume


def _require_state(path: Path, manifest: Manifest) -> None:
    if manifest.holds == WEIGHTS:
        shape_of(path, manifest)
    else:
        require_training_state(path, manifest)


def plan_resume(
    run: ResolvedRun,
    folder: RunFolder,
    options: ResumeOptions,
    comm: Communicator,
    info: Callable[[str], None],
) -> ResumePlan:
    """Decide what the run trains on and where it continues; refuse what cannot be resumed. Collective.

    Args:
        info: called with lines for the user.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another model, dataset, tokenizer or order.
        ConfigError, DataError: data is missing, or cannot continue with another sequence length.
    """
    found, options = find_resume_checkpoint(folder, options, comm, info)
    run, schedule = _with_schedule(run, found, options)
    places = comm.once_per_node(lambda: find_data(run.config.data, info))
    comm.once(lambda: rebuild_data(run.config.data, places, len(os.sched_getaffinity(0)), info))
    plan = _plan_start(run, schedule, places, found, options)
    if found is None:
        return plan
    return _plan_from_weights(plan, found) if options.weights_only else _plan_continuation(plan, places, found)


def _with_schedule(
    run: ResolvedRun, found: ResumeCheckpoint | None, options: ResumeOptions
) -> tuple[ResolvedRun, RunSchedule]:
    """Return the run with its final last step, and its schedule."""
    manifest = found.reader.manifest if found is not None and not options.weights_only else None
    schedule = with_schedule(run, manifest, options.extension.steps if manifest and options.extension else None)
    return with_last_step(run, schedule), schedule


def _plan_start(
    run: ResolvedRun,
    schedule: RunSchedule,
    places: DataPlaces,
    found: ResumeCheckpoint | None,
    options: ResumeOptions,
) -> ResumePlan:
    """Return a plan from step 0, with the model and data stages that the checkpoint, if any, requires."""
    manifest = found.reader.manifest if found is not None else None
    data = open_data(run, places, first_sample_of(None if options.weights_only else manifest, run))
    then = manifest.model["max_position_embeddings"] if manifest is not None else 0
    # A trained position table may be longer than the samples are now; keep it.
    longest = max(run.config.data.sequence_length, then)
    shape = build_model_config(run.config.model, data.tokenizer.vocab_size, longest)
    identity = DataIdentity(data.train, data.tokenizer.fingerprint, validation_fingerprint(run, data))
    options = replace(options, allow=(*options.allow, *run.config.resume.allow)) if found is not None else options
    reader, warnings = (None, ()) if found is None else (found.reader, found.warnings)
    position = TrainingProgress(schedule=schedule)
    return ResumePlan(run, data, shape, identity, position, reader, options, (), warnings)


def _plan_from_weights(plan: ResumePlan, found: ResumeCheckpoint) -> ResumePlan:
    """Return the plan from a checkpoint's weights alone; only model and tokenizer must be the same."""
    path, differences = (
        found.reader.path,
        incompatibilities(found.reader.manifest, identity_of(plan.run, plan.shape, plan.identity, 0)),
    )
    of_model = {thing: words for thing, words in differences.items() if thing in ("model", "tokenizer")}
    refuse_incompatible(path, of_model, plan.resume.allow)
    return replace(plan, notes=(f"starts from the weights of {path}, at step 0 and the data's beginning",))


def _plan_continuation(plan: ResumePlan, places: DataPlaces, found: ResumeCheckpoint) -> ResumePlan:
    """Return the plan from the checkpoint's step, with the data that follows."""
    run, manifest, resume = plan.run, found.reader.manifest, plan.resume
    order = _order_so_far(plan, places, manifest)
    consumed = manifest.data_position.segments[-1].next_sample
    so_far = identity_of(run, plan.shape, replace(plan.identity, samples=order), consumed)
    differences = incompatibilities(manifest, so_far)
    refuse_incompatible(found.reader.path, differences, resume.allow)
    continuation = continuation_kind(run, manifest, differences)
    order, notes = _order_from_here(order, run, places, manifest, continuation)
    identity = replace(plan.identity, samples=order)
    position = progress_from(manifest, run, continuation)
    position.schedule = plan.position.schedule
    to_come = (run.config.train.steps - position.step) * run.batch.global_batch
    data = replace(plan.data, train=order, samples=position.samples + max(0, to_come))
    if position.best_loss is not None and manifest.validation not in (None, identity.validation):
        position.best_loss, position.stale_evaluations = None, 0
        notes += ("validation is on other data: the lowest loss so far is not compared with",)
    if resume.skip_steps:
        samples = resume.skip_steps * run.batch.global_batch
        here = identity.at(position.samples)["order"]
        position.pass_over(samples, here, run.config.data.sequence_length, run.batch.global_batch)
        notes += (f"the data of {resume.skip_steps} steps, {samples:,} samples, is passed over",)
    notes = (*change_notes(position, manifest, run), *notes)
    return replace(plan, data=data, identity=identity, position=position, notes=notes)


def _order_so_far(plan: ResumePlan, places: DataPlaces, manifest: Manifest) -> BlendedSamples:
    """Return the samples in the checkpoint's order, rebuilt from the run's present data settings."""
    run, lengths = plan.run, lengths_of_order(manifest)
    order = plan.data.train
    if len(lengths) > 1 or lengths[0][0] != run.config.data.sequence_length:
        section = run.config.data.model_copy(update={"sequence_length": lengths[0][0]})
        earlier = replace(run, config=run.config.model_copy(update={"data": section}))
        order = open_data(earlier, places, first_sample_of(manifest, run)).train
    for (_, end), (length, _) in pairwise(lengths):
        order = order.recut(end, length)
    return order


def _order_from_here(
    order: BlendedSamples, run: ResolvedRun, places: DataPlaces, manifest: Manifest, continuation: Beginning
) -> tuple[BlendedSamples, tuple[str, ...]]:
    """Return the samples from here on, and warnings about them."""
    if continuation == "recut":
        length = run.config.data.sequence_length
        order = order.recut(lengths_of_order(manifest)[-1][1], length)
        skipped, repeated = order.recut_tokens
        return order, (
            f"what is left of this pass over the data is cut into samples of {length} tokens: "
            f"{skipped:,} tokens are skipped, {repeated:,} read twice",
        )
    if continuation == "anew":  # stages count the run's steps, but the order starts after the steps already done
        done, batch = manifest.step, run.batch.global_batch
        order = open_data(run, places, lambda step: (step - 1 - done) * batch).train
    return order, ()


def planned_start(run: ResolvedRun, resume: ResumeOptions) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """For `--dry-run` with `--resume`: return the run with its final last step, and all segments of its schedule.

    Needs no process group. Hashes the checkpoint's files like a real start.

    Raises:
        CheckpointError, ConfigError: as at a real start.
    """
    section = run.config.run
    folder = RunFolder(Path(section.root).expanduser() / (section.name or "-"))
    found, resume = find_resume_checkpoint(folder, resume, SingleProcessCommunicator())
    run, schedule = _with_schedule(run, found, resume)
    return run, schedule.segments
