"""From `--resume` and what goes with it to the run as it will really be: its checkpoint, its data, where it goes on.

Like setup.py this knows the concrete classes; what may change and what follows from it is in continuing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from megalm.checkpoint.load import CheckpointReader
from megalm.config.resolve import ResolvedRun
from megalm.data.blend import BlendedSamples
from megalm.engine.protocol import Comm
from megalm.errors import ConfigError
from megalm.model.shape import ModelShape, model_shape
from megalm.train.checkpointing import DataIdentity, identity_of
from megalm.train.continuing import (
    beginning,
    changes,
    differences,
    first_sample_of,
    lengths_of_order,
    position_from,
    refuse_other_run,
    with_last_step,
    with_schedule,
)
from megalm.train.datasets import DataPlaces, RunData, open_data, validation_fingerprint
from megalm.train.position import Position, data_segments
from megalm.train.request import Resume, request_before
from megalm.train.run_folder import RunFolder, weights_alone
from megalm.train.saved import Found, find_saved


@dataclass(frozen=True)
class Course:
    """A run as it will be.

    Attributes:
        reader: the checkpoint that it goes on from; `weights_only`: as nothing but a model.
        resume: what was asked for, or is asked for again.
        notes, warnings: what a person should know.
    """

    run: ResolvedRun
    data: RunData
    shape: ModelShape
    identity: DataIdentity
    position: Position
    reader: CheckpointReader | None
    resume: Resume
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def weights_only(self) -> bool:
        return self.reader is not None and self.resume.weights_only


def find_start(
    folder: RunFolder, resume: Resume, comm: Comm, say: Callable[[str], None] = lambda _: None
) -> tuple[Found | None, Resume]:
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
    before, requeued = comm.once(lambda: request_before(folder, wanted))
    if requeued:
        resume = Resume("auto")
    found = find_saved(folder, "auto" if requeued else wanted, comm, before.origin if before else None, say)
    if found is not None and before is not None and resume.wanted == "auto":
        resume = before.again(resume, found.reader)
    if found is None and (resume.extension or resume.skip_steps):
        raise ConfigError(f"{folder.path} has no checkpoint yet, so there is nothing to extend; leave the flag out")
    if found is not None and found.reader.holds_weights_only and not resume.weights_only:
        raise weights_alone(found.reader.path)
    if found is not None and resume.weights_only and found.reader.path.resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(
            f"--extend-strategy weights starts at step 0, which {folder.path} has had; name a new run with run.name"
        )
    return found, resume


def plan_steps(run: ResolvedRun, found: Found | None, resume: Resume) -> tuple[ResolvedRun, Position]:
    """The run with the last step that it will have, and a position with its schedule."""
    position = Position()
    manifest = found.reader.manifest if found is not None and not resume.weights_only else None
    with_schedule(position, run, manifest, resume.extension.steps if manifest and resume.extension else None)
    return with_last_step(run, position), position


def plan_course(
    run: ResolvedRun, scheduled: Position, places: DataPlaces, found: Found | None, resume: Resume
) -> Course:
    """Open the data as the checkpoint's position wants it, and refuse what cannot go on.

    Args:
        run, scheduled: of `plan_steps`.

    Raises:
        CheckpointError: another model, dataset, tokenizer or order than the checkpoint's, unless it is allowed.
        ConfigError: data that cannot go on with another sequence length.
    """
    manifest = found.reader.manifest if found is not None else None
    goes_on = manifest is not None and not resume.weights_only
    stages = first_sample_of(manifest if goes_on else None, run)
    data = open_data(run, places, stages)
    then = manifest["model"]["max_position_embeddings"] if manifest is not None else 0
    # A table of positions may be longer than the samples are now; it stays the one that was trained.
    longest = max(run.config.data.sequence_length, then)
    shape = model_shape(run.config.model, data.tokenizer.vocab_size, longest)
    identity = DataIdentity(data.train, data.tokenizer.fingerprint, validation_fingerprint(run, data))
    if found is None or manifest is None:
        return Course(run, data, shape, identity, scheduled, None, resume, (), ())
    resume = replace(resume, allow=(*resume.allow, *run.config.resume.allow))
    if resume.weights_only:
        other = differences(manifest, identity_of(run, shape, identity, 0))
        refuse_other_run(
            found.reader.path, {k: v for k, v in other.items() if k in ("model", "tokenizer")}, resume.allow
        )
        notes: tuple[str, ...] = (
            f"starts from the weights of {found.reader.path}, at step 0 and the data's beginning",
        )
        return Course(run, data, shape, identity, scheduled, found.reader, resume, notes, found.warnings)
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
    consumed = data_segments(manifest)[-1].next_sample
    other = differences(manifest, identity_of(run, shape, replace(identity, samples=order), consumed))
    refuse_other_run(found.reader.path, other, resume.allow)
    begins = beginning(run, manifest, other)
    notes = ()
    if begins == "recut":
        order = order.recut(lengths[-1][1], run.config.data.sequence_length)
        skipped, repeated = order.recut_tokens
        notes = (
            f"what is left of this pass over the data is cut into samples of {run.config.data.sequence_length} tokens: "
            f"{skipped:,} tokens are skipped, {repeated:,} read twice",
        )
    elif begins == "anew":  # stages are stated by the run's steps, the order starts after those that are done
        done, batch = int(manifest["step"]), run.batch.global_batch
        data = open_data(run, places, lambda step: (step - 1 - done) * batch)
        order = data.train
    identity = replace(identity, samples=order)
    position = position_from(manifest, run, begins)
    position.schedule, position.stated = scheduled.schedule, scheduled.stated
    to_come = (run.config.train.steps - position.step) * run.batch.global_batch
    data = replace(data, train=order, samples=position.samples + max(0, to_come))
    if position.best_loss is not None and manifest.get("validation", identity.validation) != identity.validation:
        position.best_loss, position.stale_evaluations = None, 0
        notes += ("validation is on other data: the lowest loss so far is not compared with",)
    if resume.skip_steps:
        samples = resume.skip_steps * run.batch.global_batch
        here = identity.at(position.samples)["order"]
        position.pass_over(samples, here, run.config.data.sequence_length, run.batch.global_batch)
        notes += (f"the data of {resume.skip_steps} steps, {samples:,} samples, is passed over",)
    notes = (*changes(position, manifest, run), *notes)
    return Course(run, data, shape, identity, position, found.reader, resume, notes, found.warnings)


def _order_so_far(lengths: list[tuple[int, int]], open_with: Callable[[int], BlendedSamples]) -> BlendedSamples:
    order = open_with(lengths[0][0])
    for (_, end), (length, _) in pairwise(lengths):
        order = order.recut(end, length)
    return order
