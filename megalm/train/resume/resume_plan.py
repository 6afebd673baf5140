"""From `--resume` and related options to a plan: the checkpoint, schedule and data with which the run continues.

Two stages of a start, between which the data is opened: find the checkpoint, then check that the run can continue it.
The rules about what may change are in compatibility.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.discovery import Entry, ResumedFrom, resume_candidates
from megalm.checkpoint.manifest import (
    Beginning,
    Manifest,
    hashed_blocks,
    require_training_state,
    shape_of,
    without_advice,
)
from megalm.checkpoint.retention import tidy
from megalm.communicator import Communicator, SingleProcessCommunicator
from megalm.data.sampling.mixture import BlendedSamples
from megalm.errors import CheckpointError, ConfigError
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.planning.resolve import ResolvedRun
from megalm.runs.run_folder import RunFolder, weights_only_error
from megalm.runs.run_settings import ResumeOptions
from megalm.train.datasets import RunData, open_data
from megalm.train.resume.compatibility import (
    DataIdentity,
    begin_notes,
    change_notes,
    continuation_kind,
    first_sample_of,
    grid_notes,
    identity_of,
    incompatibilities,
    lengths_of_order,
    progress_from,
    refuse_incompatible,
    refuse_other_moments,
    state_notes,
    with_last_step,
    with_schedule,
)
from megalm.train.resume.resume_request import read_last_attempt
from megalm.train.resume.training_progress import RunSchedule, TrainingProgress
from megalm.utils.progress import ProgressBar


@dataclass(frozen=True)
class ResumeCheckpoint:
    """The checkpoint that a run resumes from.

    Attributes:
        warnings: skipped damaged checkpoints, or that this one is suspect.
    """

    reader: CheckpointReader
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint from which a run resumes, before its data is open.

    Attributes:
        run: with the last step of `schedule`.
        found: None: the run starts at step 0.
        options: the resume options, possibly repeated from the last attempt.
    """

    run: ResolvedRun
    schedule: RunSchedule
    found: ResumeCheckpoint | None
    options: ResumeOptions

    def first_sample_of(self, step: int) -> int:
        """Return the number of the first sample of `step`, or 0 if it is before the current order."""
        return first_sample_of(_continued(self.found, self.options), self.run)(step)


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


# --- find the checkpoint ----------------------------------------------------------------------------------------------


def clean_up_interrupted_saves(folder: RunFolder, comm: Communicator, keep_best: bool = False) -> list[Path]:
    """Clean up the unfinished saves of a killed job; the holder of the run's lock calls it before anything else.

    Args:
        keep_best: write `checkpoints/best` also if it is missing.
    """

    def work() -> list[Path]:
        shutil.rmtree(folder.preflight, ignore_errors=True)
        return tidy(folder.checkpoints, keep_best)

    return comm.once(work)


def find_resume_checkpoint(
    run: ResolvedRun,
    folder: RunFolder,
    options: ResumeOptions,
    comm: Communicator,
    info: Callable[[str], None] = lambda _: None,
) -> ResumePoint:
    """Find and verify the checkpoint to resume from, and continue its schedule. Collective.

    If `auto` finds the checkpoint that the last attempt resumed from, that attempt's options apply again.

    Args:
        info: called with progress lines while a large checkpoint is verified.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or lacks moments of the run's optimizer.
        ConfigError: there is no checkpoint to extend, the run would restart from its own weights, or a checkpoint with
            weights only is given as a complete training state.
    """
    found = None
    if options.wanted is not None:
        found, options = _find(folder, options.wanted, options, comm, info)
    manifest = _continued(found, options)
    if found is not None and manifest is not None:
        refuse_other_moments(found.reader.path, manifest, run)
    schedule = with_schedule(run, manifest, options.extension.steps if manifest and options.extension else None)
    return ResumePoint(with_last_step(run, schedule), schedule, found, options)


def _find(
    folder: RunFolder, wanted: str, options: ResumeOptions, comm: Communicator, info: Callable[[str], None]
) -> tuple[ResumeCheckpoint | None, ResumeOptions]:
    before, requeued = comm.once(lambda: read_last_attempt(folder, wanted))
    if requeued:
        options = ResumeOptions("auto")
    origin = before.origin if before else None
    found = find_checkpoint(folder, "auto" if requeued else wanted, comm, origin, info, _require_state)
    if found is None:
        if options.extension or options.skip_steps:
            raise ConfigError(f"{folder.path} has no checkpoint yet to extend or skip from; remove the flag")
        return None, options
    reader = found.reader
    if before is not None and options.wanted == "auto":
        options = before.repeat(options, reader)
    if reader.holds_weights_only and not options.weights_only:
        raise weights_only_error(reader.path)
    if options.weights_only and reader.path.resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(
            f"--extend-strategy weights starts at step 0, and {folder.path} is past it; name a new run with run.name"
        )
    return found, options


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


def _require_state(path: Path, manifest: Manifest) -> None:
    if manifest.holds is not None:
        shape_of(path, manifest)
    else:
        require_training_state(path, manifest)


def _continued(found: ResumeCheckpoint | None, options: ResumeOptions) -> Manifest | None:
    """Return the manifest of the checkpoint whose steps the run continues; None: it starts at step 0."""
    return None if found is None or options.weights_only else found.reader.manifest


def planned_start(run: ResolvedRun, resume: ResumeOptions) -> tuple[ResolvedRun, tuple[ScheduleSegment, ...]]:
    """For `--dry-run` with `--resume`: return the run with its last step, and all segments of its schedule.

    A change of the grid is one of the run's notices. Needs no process group. Hashes the checkpoint's files like a real
    start.

    Raises:
        CheckpointError, ConfigError: as at a real start.
    """
    section = run.config.run
    folder = RunFolder(Path(section.root) / (section.name or "-"))
    point = find_resume_checkpoint(run, folder, resume, SingleProcessCommunicator())
    manifest = _continued(point.found, point.options)
    notes = () if manifest is None else tuple(grid_notes(manifest, point.run))
    return replace(point.run, notices=(*point.run.notices, *notes)), point.schedule.segments


# --- check that the run can continue it -------------------------------------------------------------------------------


def plan_resume(point: ResumePoint, data: RunData) -> ResumePlan:
    """Decide where the run continues; refuse what cannot be resumed.

    Args:
        data: opened for `point`.

    Raises:
        CheckpointError: the checkpoint is of another model, dataset, tokenizer or order.
        ConfigError, DataError: the data cannot continue with another sequence length.
    """
    run, found, options = point.run, point.found, point.options
    # A trained position table may be longer than the samples are now; keep it.
    table = found.reader.manifest.model["max_position_embeddings"] if found is not None else 0
    longest = max(run.config.data.sample_length, table)
    shape = build_model_config(run.config.model, data.tokenizer.vocab_size, longest)
    identity = DataIdentity(data.train, data.tokenizer.fingerprint, data.validation_fingerprint)
    position = TrainingProgress(run.stages.at(1), schedule=point.schedule)
    if found is None:
        return ResumePlan(run, data, shape, identity, position, None, options, (), ())
    options = replace(options, allow=(*options.allow, *run.config.resume.allow))
    plan = ResumePlan(run, data, shape, identity, position, found.reader, options, (), found.warnings)
    if options.weights_only:
        return _plan_from_weights(plan, found.reader)
    is_import = found.reader.manifest.holds is not None
    return (_plan_from_import if is_import else _plan_continuation)(plan, found.reader)


def _plan_from_weights(plan: ResumePlan, reader: CheckpointReader) -> ResumePlan:
    """Return the plan from a checkpoint's weights alone; only model and tokenizer must be the same."""
    _refuse_other_model(plan, reader)
    start = f"the run starts from the weights of {reader.path}, at step 0 and the first sample"
    return replace(plan, notes=(start, *begin_notes(reader.manifest, plan.data.tokenizer)))


def _plan_from_import(plan: ResumePlan, reader: CheckpointReader) -> ResumePlan:
    """Return the plan from another toolkit's weights, moments and step, with this run's schedule and data."""
    _refuse_other_model(plan, reader)
    run, manifest = plan.run, reader.manifest
    position = replace(plan.position, stage=run.stages.at(manifest.step + 1), step=manifest.step)
    notes = (
        f"the run continues {reader.path} with its moments at step {manifest.step:,} of the run's own schedule, and at "
        "the first sample",
        *state_notes(manifest, run, plan.shape, plan.data.tokenizer),
        *_skip_steps(plan, position, plan.identity),
    )
    to_come = run.stages.samples(run.config.train.steps, after=position.step)
    data = replace(plan.data, samples=position.samples + to_come)
    return replace(plan, data=data, position=position, notes=notes)


def _refuse_other_model(plan: ResumePlan, reader: CheckpointReader) -> None:
    """Raise CheckpointError if the checkpoint's model or tokenizer is another one."""
    differences = incompatibilities(reader.manifest, identity_of(plan.run, plan.shape, plan.identity, 0))
    of_model = {thing: words for thing, words in differences.items() if thing in ("model", "tokenizer")}
    refuse_incompatible(reader.path, of_model, plan.resume.allow)


def _skip_steps(plan: ResumePlan, position: TrainingProgress, identity: DataIdentity) -> Iterator[str]:
    """Move `position` over the data of the steps that `--skip-steps` names, and say so."""
    if steps := plan.resume.skip_steps:
        samples = plan.run.stages.samples(position.step + steps, after=position.step)
        position.skip(samples, identity.at(position.samples)["order"])
        yield f"skipping the data of {steps} steps, {samples:,} samples"


def _plan_continuation(plan: ResumePlan, reader: CheckpointReader) -> ResumePlan:
    """Return the plan from the checkpoint's step, with the data that follows."""
    run, manifest, resume = plan.run, reader.manifest, plan.resume
    order = _order_so_far(run, plan.data, manifest)
    consumed = manifest.data_position.segments[-1].next_sample
    so_far = identity_of(run, plan.shape, replace(plan.identity, samples=order), consumed)
    differences = incompatibilities(manifest, so_far)
    refuse_incompatible(reader.path, differences, resume.allow)
    continuation = continuation_kind(run, manifest, differences)
    order, notes = _order_from_here(order, run, plan.data, manifest, continuation)
    identity = replace(plan.identity, samples=order)
    position = progress_from(manifest, run, continuation)
    position.schedule = plan.position.schedule
    to_come = run.stages.samples(run.config.train.steps, after=position.step)
    data = replace(plan.data, train=order, samples=position.samples + to_come)
    if position.best_loss is not None and manifest.validation not in (None, identity.validation):
        position.best_loss, position.stale_evaluations = None, 0
        notes += ("the validation data changed: the lowest loss so far no longer counts",)
    notes += tuple(_skip_steps(plan, position, identity))
    notes = (
        *change_notes(position, manifest, run),
        *state_notes(manifest, run, plan.shape, plan.data.tokenizer),
        *notes,
    )
    return replace(plan, data=data, identity=identity, position=position, notes=notes)


def _order_so_far(run: ResolvedRun, data: RunData, manifest: Manifest) -> BlendedSamples:
    """Return the samples in the checkpoint's order, rebuilt from the run's present data settings."""
    order, lengths = data.train, lengths_of_order(manifest)
    if len(lengths) > 1 or lengths[0][0] != run.config.data.sample_length:
        section = run.config.data.with_sample_length(lengths[0][0])
        earlier = replace(run, config=run.config.model_copy(update={"data": section}))
        order = open_data(earlier, data.places, first_sample_of(manifest, run)).train
    for (_, end), (length, _) in pairwise(lengths):
        order = order.recut(end, length)
    return order


def _order_from_here(
    order: BlendedSamples, run: ResolvedRun, data: RunData, manifest: Manifest, continuation: Beginning
) -> tuple[BlendedSamples, tuple[str, ...]]:
    """Return the samples from here on, and warnings about them."""
    if continuation == "recut":
        length = run.config.data.sample_length
        order = order.recut(lengths_of_order(manifest)[-1][1], length)
        skipped, repeated = order.recut_tokens
        return order, (
            f"the rest of this pass over the data is cut into samples of {length} tokens: "
            f"{skipped:,} tokens are skipped, {repeated:,} are read twice",
        )
    if continuation == "anew":  # stages count the run's steps, but the order starts after the steps already done
        done = manifest.step
        order = open_data(run, data.places, lambda step: run.stages.samples(step - 1, after=done)).train
    return order, ()
