"""Global batch, micro-batch and accumulation, and the batch and the sequence length of each step of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import zip_longest
from typing import Any

from megalm.config.deepspeed.json_reader import DeepSpeedConfig
from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.config.loading import LoadedConfig
from megalm.config.schema import BatchStage, RunConfig
from megalm.errors import ConfigError
from megalm.planning.memory_fit import USABLE_MEMORY
from megalm.topology import Topology, divisors

_CHOICE = f"the largest that divides the batch and fits into {USABLE_MEMORY:.0%} of the memory by the estimate"
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch` = `micro_batch` x `accumulation` x `data_parallel`, in sequences per step."""

    global_batch: int
    micro_batch: int
    accumulation: int
    data_parallel: int

    def __post_init__(self) -> None:
        assert self.global_batch == self.micro_batch * self.accumulation * self.data_parallel, self

    @staticmethod
    def of_json(settings: Mapping[str, Any]) -> BatchPlan | None:
        """Return the batch of a DeepSpeed JSON that has all three sizes; None: it has not."""
        sizes = [size for size in map(settings.get, _SIZES) if isinstance(size, int) and size > 0]
        if len(sizes) < len(_SIZES):
            return None
        total, micro, accumulation = sizes
        ranks, rest = divmod(total, micro * accumulation)
        return None if rest else BatchPlan(total, micro, accumulation, ranks)

    def of(self, sequences: int) -> BatchPlan:
        """Return the plan of another global batch, which differs in its accumulation alone."""
        accumulation = sequences // (self.micro_batch * self.data_parallel)
        return replace(self, global_batch=sequences, accumulation=accumulation)


def chooses_micro_batch(settings: DeepSpeedSettings) -> bool:
    """Return whether the micro-batch depends on the device's memory."""
    return not isinstance(settings.train_micro_batch_size_per_gpu, int) and settings.gradient_accumulation_steps is None


@dataclass(frozen=True)
class RunBatch:
    """The batch of the run configuration: `batch.global_sequences`, or `schedule.batch` if that begins at step 1.

    Attributes:
        source: the source of its value.
        by_user: the user set it: it applies if the JSON has no train_batch_size.
        asked_for: the JSON's train_batch_size is "auto": it applies if it divides.
        key: the key that sets it.
        later: the later stages of `schedule.batch`.
        largest_micro_batch: that the run takes where the device's memory decides; None: any.
    """

    sequences: int | None = None
    source: str = ""
    by_user: bool = False
    asked_for: bool = False
    key: str = "batch.global_sequences"
    later: tuple[BatchStage, ...] = ()
    largest_micro_batch: int | None = None

    @staticmethod
    def of(loaded: LoadedConfig, ds: DeepSpeedConfig) -> RunBatch:
        """Return the value for a run with this JSON."""
        key, stages = "batch.global_sequences", loaded.config.schedule.batch
        auto = any(outcome.key == "train_batch_size" and outcome.value == "auto" for outcome in ds.outcomes)
        most = ds.largest_micro_batch
        if stages and stages[0].from_step <= 1:
            key = "schedule.batch"
            return RunBatch(stages[0].sequences, loaded.sources[key], True, auto, key, stages[1:], most)
        sequences = loaded.config.batch.global_sequences
        return RunBatch(sequences, loaded.sources[key], key in loaded.explicit_keys, auto, key, stages, most)


def plan_batch(
    settings: DeepSpeedSettings,
    topology: Topology,
    where: str,
    fits: Callable[[BatchPlan], bool],
    run_batch: RunBatch = RunBatch(),
) -> tuple[BatchPlan, list[str]]:
    """Return the three batch sizes of the first step on these ranks, and a notice of each decision.

    The micro-batch is one that divides the later batches too: a batch grows by more micro-batches.

    Two of the three sizes give the third, as in DeepSpeed. With `train_batch_size` alone the device's memory decides
    the micro-batch, as with "auto"; DeepSpeed would take the whole batch at once. Without a batch in the JSON the run
    configuration's applies.

    Args:
        where: the JSON's name, for messages.
        fits: whether a batch fits the device's memory, asked for the largest one.

    Raises:
        ConfigError: sizes that contradict each other or do not divide.
    """
    total, micro, steps = (
        settings.train_batch_size,
        settings.train_micro_batch_size_per_gpu,
        settings.gradient_accumulation_steps,
    )
    ranks, notices, named = topology.data, list[str](), "train_batch_size"
    if total is None and takes_run_batch(settings, ranks, run_batch):
        total, named = run_batch.sequences, run_batch.key
        notices = [f"{where} has no train_batch_size: {named}={total} ({run_batch.source})"]
        if total is not None and steps and not run_batch.by_user and total % (steps * ranks):
            total = (total // (steps * ranks) + 1) * steps * ranks  # a preset's batch gives way
            notices[0] += f", raised to {total} for gradient_accumulation_steps={steps} on {ranks} ranks"
    if total is None:
        if not isinstance(micro, int):
            raise ConfigError(
                f"{where}: train_batch_size is missing; add it, the sequences of one optimizer step, or set "
                "batch.global_sequences in the run configuration"
            )
        total = micro * (steps or 1) * ranks
        notices = [f"train_batch_size is missing: {total}, by the number of ranks; a resumed run keeps it"]
    for name, size in ((f"{where}: {named}", total), *_later_batches(run_batch.later)):
        if size % ranks:
            raise ConfigError(
                f"{name}={size} does not divide over {ranks} data-parallel ranks; "
                f"use {nearest_multiples(size, ranks)}, or {_words(divisors(size))} ranks"
            )
    per_rank, later = total // ranks, [stage.sequences for stage in run_batch.later]
    if not isinstance(micro, int):
        if chooses_micro_batch(settings):
            given = "missing" if micro is None else '"auto"'
            micro, chosen = _largest_that_fits([total, *later], ranks, fits, given, run_batch.largest_micro_batch)
            notices += chosen
        else:
            micro = max(1, per_rank // (steps or 1))
    steps = steps or per_rank // micro or 1
    if micro * steps != per_rank:
        explicit = settings.gradient_accumulation_steps is not None
        raise ConfigError(f"{where}: {_contradiction(named, total, micro, steps, topology, explicit)}")
    for name, size in _later_batches(run_batch.later):
        if size % (micro * ranks):
            raise ConfigError(
                f"{name}={size} is not a multiple of train_micro_batch_size_per_gpu={micro} x {ranks} data-parallel "
                f"ranks = {micro * ranks}; use {nearest_multiples(size, micro * ranks)}, or a micro-batch of "
                f"{_words(divisors(math.gcd(per_rank, *(batch // ranks for batch in later))))}"
            )
    return BatchPlan(total, micro, steps, ranks), notices


def _later_batches(stages: Sequence[BatchStage]) -> list[tuple[str, int]]:
    return [(f"schedule.batch, from_step {stage.from_step}: sequences", stage.sequences) for stage in stages]


def takes_run_batch(settings: DeepSpeedSettings, ranks: int, run_batch: RunBatch) -> bool:
    """Return whether the run configuration's batch applies to a JSON without train_batch_size."""
    micro, steps = settings.train_micro_batch_size_per_gpu, settings.gradient_accumulation_steps
    if run_batch.sequences is None or run_batch.by_user or not isinstance(micro, int):
        return run_batch.sequences is not None
    return run_batch.asked_for and steps is None and run_batch.sequences % (micro * ranks) == 0


def _largest_that_fits(
    batches: Sequence[int], ranks: int, fits: Callable[[BatchPlan], bool], given: str, limit: int | None
) -> tuple[int, list[str]]:
    most, common = max(batches), math.gcd(*(batch // ranks for batch in batches))
    sizes = [size for size in reversed(divisors(common)) if size <= (limit or size)]
    plans = (BatchPlan(most, micro, most // ranks // micro, ranks) for micro in sizes)
    micro = next((plan.micro_batch for plan in plans if fits(plan)), None)
    if micro is None:
        return 1, [
            f"train_micro_batch_size_per_gpu ({given}): 1; even that needs more than {USABLE_MEMORY:.0%} of the memory"
        ]
    no_more = "" if limit is None else f"; a resumed run takes no more than before, {limit}"
    return micro, [f"train_micro_batch_size_per_gpu ({given}): {micro}, {_CHOICE}{no_more}"]


def _contradiction(named: str, total: int, micro: int, steps: int, topology: Topology, explicit_steps: bool) -> str:
    ranks = topology.data
    fitting, remainder = divmod(total, micro * (steps if explicit_steps else 1))
    if explicit_steps:
        world = fitting * topology.world_size // ranks
        fits = f"use {fitting} data-parallel ranks ({world} ranks in all), or " if not remainder else ""
        also = "" if total % (micro * ranks) == 0 else ' and write train_micro_batch_size_per_gpu "auto"'
        return (
            f"{named}={total} is not train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={steps} x {ranks} data-parallel ranks = {micro * steps * ranks}; "
            f"{fits}remove gradient_accumulation_steps{also}"
        )
    near = sorted(sorted(divisors(total // ranks), key=lambda size: abs(size - micro))[:2])
    fits = f", or {_words(divisors(fitting))} data-parallel ranks" if not remainder else ""
    return (
        f"{named}={total} is not a multiple of train_micro_batch_size_per_gpu={micro} x {ranks} data-parallel "
        f"ranks = {micro * ranks}; use a batch of {nearest_multiples(total, micro * ranks)}, "
        f"a micro-batch of {_words(near)}{fits}"
    )


def nearest_multiples(value: int, step: int) -> str:
    """Return the multiples of `step` below and above a value, in words."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def _words(values: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 or 4"."""
    *rest, last = [str(value) for value in values]
    return f"{', '.join(rest)} or {last}" if rest else last


@dataclass(frozen=True)
class TrainingStage:
    """From `first_step` on, each step reads `sequences` sequences of `sequence_length` tokens.

    Attributes:
        parts: sequences that a sample is cut into.
    """

    first_step: int
    sequences: int
    sequence_length: int
    parts: int = 1

    @property
    def samples(self) -> int:
        """Of one step."""
        return self.sequences // self.parts

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.sequences * self.sequence_length


@dataclass(frozen=True)
class TrainingStages:
    """The stages of a run in order, the first one from step 1 on; the last one does not end."""

    stages: tuple[TrainingStage, ...]

    @staticmethod
    def of(config: RunConfig, sequences: int) -> TrainingStages:
        """Return the stages of a run whose first step has a batch of `sequences`."""
        data, batch, length = config.data, sequences, config.data.sequence_length
        batches = {max(1, stage.from_step): stage.sequences for stage in config.schedule.batch}
        lengths = {stage.from_step: stage.sequence_length for stage in data.stages if stage.sequence_length}
        found: list[TrainingStage] = []
        for step in sorted({1, *batches, *lengths}):
            batch, length = batches.get(step, batch), lengths.get(step, length)
            if not found or (batch, length) != (found[-1].sequences, found[-1].sequence_length):
                found.append(TrainingStage(step, batch, length, data.sample_length // length))
        return TrainingStages(tuple(found))

    @staticmethod
    def from_json(value: object) -> TrainingStages | None:
        """Return what `as_json` gave; None: it is not that."""
        try:
            stages = tuple(TrainingStage(*map(int, stage)) for stage in value)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            return None
        is_whole = bool(stages) and all(min(astuple(stage)) > 0 for stage in stages)
        return TrainingStages(stages) if is_whole else None

    def as_json(self) -> list[list[int]]:
        """Return first step, sequences, sequence length and parts of each stage."""
        return [list(astuple(stage)) for stage in self.stages]

    @property
    def grow(self) -> bool:
        """Whether steps differ."""
        return len(self.stages) > 1

    @property
    def largest_batch(self) -> int:
        return max(stage.sequences for stage in self.stages)

    @property
    def longest(self) -> TrainingStage:
        """The stage of the longest sequences, and of several the one with the largest batch."""
        return max(self.stages, key=lambda stage: (stage.sequence_length, stage.sequences))

    def at(self, step: int) -> TrainingStage:
        """Return the stage of step `step`; of step 0, the first one."""
        return next((stage for stage in reversed(self.stages) if stage.first_step <= step), self.stages[0])

    def spans(self, steps: int, after: int = 0) -> Iterator[tuple[TrainingStage, int]]:
        """Yield each stage that steps `after` + 1 to `steps` have a part in, and the number of these steps."""
        for stage, following in zip_longest(self.stages, self.stages[1:]):
            end = steps if following is None else min(steps, following.first_step - 1)
            count = end - max(after, stage.first_step - 1)
            if count > 0:
                yield stage, count

    def samples(self, steps: int, after: int = 0) -> int:
        """Return the number of samples of steps `after` + 1 to `steps`; 0 if there are none."""
        return sum(stage.samples * count for stage, count in self.spans(steps, after))

    def tokens(self, steps: int, after: int = 0) -> int:
        """Return the number of tokens of steps `after` + 1 to `steps`; 0 if there are none."""
        return sum(stage.tokens * count for stage, count in self.spans(steps, after))

    def steps_for(self, tokens: int) -> int:
        """Return the least number of steps, from the first one, with at least `tokens` tokens."""
        done = 0
        for stage, following in zip_longest(self.stages, self.stages[1:]):
            needed = -(-tokens // stage.tokens)
            length = needed if following is None else following.first_step - stage.first_step
            if needed <= length:
                break
            done, tokens = done + length, tokens - length * stage.tokens
        return done + needed
