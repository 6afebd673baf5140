"""The numbers of a run before it starts: parameters, tokens, FLOPs, memory, learning rates. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import get_args

from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.cost_model.memory import MemoryCase, MemoryPlan, checkpoint_bytes, estimate_stages
from megalm.cost_model.pipeline_balance import balanced_by_parameters, parameter_costs
from megalm.cost_model.pipeline_simulation import ActionCosts, simulate
from megalm.model.model_config import (
    ModelConfig,
    build_model_config,
    costs_of_passes,
    float8_share,
    flops_per_token,
    recomputed_flops_per_token,
)
from megalm.model.parameter_groups import Algorithm, frozen_parameters, group_keys, group_settings, optimizer_groups
from megalm.parallel.pipeline_schedules import PipelineSchedule, virtual_stages_of
from megalm.planning.batch_size import TrainingStage
from megalm.planning.lr_schedule import ScheduleSegment, rate_at
from megalm.planning.memory_fit import MemoryFit
from megalm.planning.resolve import ResolvedRun
from megalm.topology import PipelineScheduleName
from megalm.utils.plotting import new_plot, save_plot


@dataclass(frozen=True)
class Rate:
    """The speed of a rank: a share of its device's data-sheet peak, or operations per second.

    Attributes:
        share: MFU; of an assumed rate before bubble, recomputation and offload, which lower it.
        origin: where the number is from, for a sentence.
        is_assumed: it is neither measured nor given.
        flops: operations per second of a rank on a device without a data sheet; takes precedence.
    """

    share: float
    origin: str
    is_assumed: bool = False
    flops: float | None = None


# The share of the peak that a tuned run of a large model reaches; a first run on many nodes may reach half of it.
ASSUMED_RATE = Rate(0.4, "assumed", is_assumed=True)

# Of a rank, for offload beside an assumed rate, as if nothing overlapped: bytes a second over PCIe 3.0 x16 and of an
# NVMe disk, and parameters a second that Adam updates on the CPU.
_PCIE_BYTES, _DISK_BYTES, _CPU_ADAM = 12e9, 3e9, 0.5e9


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters with the same settings of the optimizer.

    Attributes:
        algorithm: that updates them; frozen: they do not train, and no setting acts on them.
        match: the pattern of train.parameter_groups; None: no pattern matches them.
        hidden: matrices of the blocks, whose learning rate follows the width.
        learning_rate_scale: the group's rate is this times the schedule's.
    """

    algorithm: Algorithm
    match: str | None
    hidden: bool
    tensors: int
    parameters: int
    learning_rate_scale: float
    weight_decay: float

    @property
    def frozen(self) -> bool:
        return self.algorithm == "frozen"


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule for the run's pipeline.

    Attributes:
        waits: the share of a step that ranks wait, with the products of the stages' own blocks and head.
        activations: bytes on the rank that keeps most.
    """

    schedule: PipelineSchedule
    waits: float
    activations: int
    fit: MemoryFit

    @property
    def messages(self) -> int:
        """From rank to rank each way, for a micro-batch."""
        return sum(one != other for one, other in pairwise(self.schedule.stage_ranks))


_ALIKE = 0.01  # of a step: for less a schedule of more stages is not worth its messages


@dataclass(frozen=True)
class Plan:
    """A resolved run in numbers.

    Attributes:
        parameters: part of the model -> parameters; their sum is the model's count.
        memory_by_stage: bytes per rank, for each kind of pipeline stage.
        schedules: successive schedules of the learning rate.
        rate: the speed that the hours follow from.
    """

    resolved: ResolvedRun
    shape: ModelConfig
    case: MemoryCase
    parameters: dict[str, int]
    memory_by_stage: tuple[MemoryPlan, ...]
    schedules: tuple[ScheduleSegment, ...]
    rate: Rate = ASSUMED_RATE

    @property
    def learning_rates(self) -> tuple[tuple[int, float], ...]:
        """(step, rate) at each turn of the schedules and each tenth of the run; steps count from 1."""
        last = self.schedules[-1].last_step
        return _rates(self.schedules, (round(last * tenth / 10) for tenth in range(1, 11)))

    @property
    def memory(self) -> MemoryPlan:
        """Bytes on the fullest rank."""
        return max(self.memory_by_stage, key=lambda stage: stage.peak)

    @cached_property
    def schedule_choices(self) -> tuple[ScheduleChoice, ...]:
        """The run's schedule and others for its pipeline and micro-batches, those of fewer stages first."""
        own, tiles = self.resolved.pipeline, self.resolved.config.train.mlp_chunk_tokens is not None
        counts = {2, 4, own.virtual_stages}
        kinds = {(name, count) for name in get_args(PipelineScheduleName) for count in {1, *counts}}
        return tuple(
            self._choice(replace(own, name=name, virtual_stages=count))
            for name, count in sorted(kinds, key=lambda kind: (kind[1], kind[0]))
            if count in virtual_stages_of(name)
            and own.ranks * count <= self.shape.num_hidden_layers
            and not (tiles and name == "zb_v")  # which is refused
        )

    def _choice(self, schedule: PipelineSchedule) -> ScheduleChoice:
        case = replace(self.case, schedule_name=schedule.name, virtual_stages=schedule.virtual_stages)
        blocks = balanced_by_parameters(self.shape, schedule.stage_ranks)
        costs = replace(parameter_costs(self.shape), embedding=0)  # rows are looked up
        weights = replace(costs, head=0).of_stages(blocks)
        recomputed = case.recompute, case.checkpoint_activations_every
        in_forward, of_input = costs_of_passes(self.shape, case.sequence_length, *recomputed)
        # The head's gradients are computed in the forward pass, too.
        forward = replace(costs, block=in_forward * costs.block, head=3 * costs.head).of_stages(blocks)
        inputs = tuple(of_input * cost for cost in weights)
        ranks = [schedule.actions(rank) for rank in range(schedule.ranks)]
        shares = simulate(ranks, schedule.stage_ranks, ActionCosts(forward, inputs, weights)).bubble_shares
        memory = list(estimate_stages(case))
        fit = MemoryFit.of(max(memory, key=lambda stage: stage.peak), self.resolved.device)
        return ScheduleChoice(schedule, sum(shares) / len(shares), max(it.activations for it in memory), fit)

    @property
    def recommended_schedule(self) -> ScheduleChoice:
        """Of those that fit, the one of fewest stages that waits hardly longer than any; if none fits the smallest.

        None that would keep the run's blocks from being compiled.
        """
        compiled = self.resolved.compiled
        choices = [it for it in self.schedule_choices if not (compiled and it.schedule.divides_backward)]
        fitting = [choice for choice in choices if choice.fit.level == "fits"]
        if not fitting:
            return min(choices, key=lambda choice: choice.fit.needed)
        shortest = min(choice.waits for choice in fitting)
        return next(choice for choice in fitting if choice.waits <= shortest + _ALIKE)

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())

    @property
    def optimizer_groups(self) -> list[OptimizerGroup]:
        """The groups of the whole model, in the optimizer's order; the frozen ones are none of the optimizer's."""
        train, shapes, optimizer = self.resolved.config.train, self.shape.parameters(), self.resolved.optimizer
        multiplier = self.shape.width_multiplier
        scales = optimizer.rate_scales(self.resolved.schedule.peak_learning_rate, multiplier)
        rules, dimensions = train.parameter_groups, {name: len(size) for name, size in shapes.items()}
        uses_muon = optimizer.muon is not None
        keys = group_keys(dimensions, rules, train.embedding_weight_decay, uses_muon, multiplier)
        return [
            OptimizerGroup(
                algorithm=key.algorithm,
                match=rules[key.rule].match if key.rule >= 0 else None,
                hidden=key.hidden,
                tensors=len(names),
                parameters=sum(math.prod(shapes[name]) for name in names),
                **group_settings(key, rules, optimizer.weight_decay, scales),
            )
            for key, names in optimizer_groups(keys).items()
        ]

    @property
    def checkpoint_bytes(self) -> int:
        case = self.case
        return checkpoint_bytes(self.shape, case.parameter_groups, case.muon, case.ema)

    @property
    def trained_parameters(self) -> int:
        return sum(group.parameters for group in self.optimizer_groups if not group.frozen)

    @property
    def total_tokens(self) -> int:
        return self.resolved.stages.tokens(self.resolved.config.train.steps)

    @property
    def tokens_per_parameter(self) -> float:
        return self.total_tokens / self.parameter_count

    @property
    def flops_per_token(self) -> int:
        """Of the run's mean token."""
        return round(mean_flops_per_token(self.resolved, self.shape))

    @property
    def recomputed_flops_per_token(self) -> int:
        """Of the backward pass, beside `flops_per_token`, at the longest sequence length."""
        return self._recomputed(self.case.sequence_length)

    def _recomputed(self, length: int) -> int:
        case = self.case
        return recomputed_flops_per_token(
            self.shape,
            length,
            case.recompute,
            case.checkpoint_activations_every,
            case.frozen,
            case.mlp_chunk_tokens is not None,
        )

    @property
    def float8_share(self) -> float:
        """Of all operations."""
        config = self.resolved.config
        return float8_share(self.shape, config.data.sample_length, config.precision.float8, self.case.frozen)

    @property
    def fit(self) -> MemoryFit:
        return MemoryFit.of(self.memory, self.resolved.device)

    @property
    def mfu(self) -> float:
        """The share of the peak that the model's operations take, without those of a recomputed block's second pass."""
        # Of the whole run: steps of a larger batch take more of the time, and less of it is lost.
        spans = list(self.resolved.stages.spans(self.resolved.config.train.steps))
        work = [
            (count * stage.tokens * flops_per_token(self.shape, stage.sequence_length, self.case.frozen), stage)
            for stage, count in spans
        ]
        return sum(flops for flops, _ in work) / sum(flops / self.mfu_of(stage) for flops, stage in work)

    def mfu_of(self, stage: TrainingStage) -> float:
        """The share in the steps of one stage."""
        run = self.resolved
        if not self.rate.is_assumed:
            return self.rate.share
        batch = run.batch.of(stage.sequences)
        busy = 1 - replace(run.pipeline, micro_batches=batch.accumulation).bubble_share
        flops = flops_per_token(self.shape, stage.sequence_length, self.case.frozen)
        share = self.rate.share * busy / (1 + self._recomputed(stage.sequence_length) / flops)
        if self._peak is None:
            return share
        computes = flops * stage.tokens / (self._peak * run.topology.world_size * share)
        return share * computes / (computes + self.offload_seconds(batch.accumulation))

    def offload_seconds(self, accumulation: int) -> float:
        """What offload adds to a step at least, by assumed speeds of PCIe, CPU and disk."""
        case, own = self.case, self.parameter_count / self.resolved.topology.world_size
        seconds = 0.0
        if case.offloads_optimizer:  # accumulated gradients come back for each micro-batch
            moved = 2 * case.gradient_bytes * accumulation + case.element_bytes
            seconds += own * (moved / _PCIE_BYTES + 1 / _CPU_ADAM)
        if case.swaps:
            seconds += own * 2 * 12 / _DISK_BYTES
        if case.offloads_parameters:  # forward and backward
            seconds += own * 2 * case.element_bytes * accumulation / _PCIE_BYTES
        return seconds

    @property
    def _peak(self) -> float | None:
        """Of a rank, in operations per second."""
        run = self.resolved
        peak = data_sheet_peak(run.device.name or "", run.precision != "fp32", self.float8_share)
        return None if peak is None else peak[0]

    @property
    def hours(self) -> float | None:
        """None: the GPU's peak is not known."""
        spans = self.resolved.stages.spans(self.resolved.config.train.steps)
        hours = [self.hours_of(stage, count) for stage, count in spans]
        return None if None in hours else sum(filter(None, hours))

    def hours_of(self, stage: TrainingStage, steps: int) -> float | None:
        """The hours of a stage's steps; None: the GPU's peak is not known."""
        speed = self.rate.flops  # of a rank
        if speed is None and self._peak is not None:
            speed = self._peak * self.mfu_of(stage)
        flops = flops_per_token(self.shape, stage.sequence_length, self.case.frozen) * stage.tokens * steps
        return None if speed is None else flops / (speed * self.resolved.topology.world_size) / 3600

    @property
    def total_flops(self) -> int:
        return total_flops(self.resolved, self.shape)


def make_plan(resolved: ResolvedRun, vocab_size: int, schedules: Sequence[ScheduleSegment] = ()) -> Plan:
    """Compute the numbers of a resolved run.

    Args:
        vocab_size: the tokenizer's; `model.vocab_size` takes precedence.
        schedules: all schedules of a resumed run; none: the run's own.
    """
    config = resolved.config
    shape = build_model_config(config.model, vocab_size, config.data.sample_length)
    case = resolved.memory_case(shape)
    return Plan(
        resolved=resolved,
        shape=shape,
        case=case,
        parameters=parameters_by_part(shape),
        memory_by_stage=tuple(estimate_stages(case)),
        schedules=tuple(schedules) or (ScheduleSegment(1, 0, resolved.schedule),),
    )


def total_flops(run: ResolvedRun, shape: ModelConfig) -> int:
    """Return the operations of all steps of a run; those of a token depend on its sequence's length."""
    spans = run.stages.spans(run.config.train.steps)
    frozen = frozen_parameters(shape, run.config.train.parameter_groups)
    return sum(flops_per_token(shape, stage.sequence_length, frozen) * stage.tokens * count for stage, count in spans)


def mean_flops_per_token(run: ResolvedRun, shape: ModelConfig) -> float:
    return total_flops(run, shape) / run.stages.tokens(run.config.train.steps)


def parameters_by_part(shape: ModelConfig) -> dict[str, int]:
    """Return part of the model -> exact number of parameters; a tied head has none."""
    parts = {"token embeddings": 0, "position embeddings": 0, "attention": 0, "mlp": 0, "norms": 0, "head": 0}
    for name, dims in shape.parameters().items():
        parts[_part(name)] += math.prod(dims)
    return {part: count for part, count in parts.items() if count}


def _part(name: str) -> str:
    if name.startswith("embedding.tokens"):
        return "token embeddings"
    if name.startswith("embedding.positions"):
        return "position embeddings"
    if "norm" in name:
        return "norms"
    return "attention" if ".attention." in name else "mlp" if ".mlp." in name else "head"


# A picture of the learning rate over the run's steps.

_MOST_POINTS = 2000  # in a picture about 1,300 pixels wide


def points(schedules: Sequence[ScheduleSegment]) -> tuple[list[int], list[float]]:
    """Return steps and their rates: every step of a short run, about two thousand of a long one, and each turn."""
    last = schedules[-1].last_step
    found = _rates(schedules, range(1, last + 1, max(1, last // _MOST_POINTS)))
    return [step for step, _ in found], [rate for _, rate in found]


def draw_rates(schedules: Sequence[ScheduleSegment], path: Path) -> None:
    """Draw the rate of every step, and a line where a schedule replaces another.

    Raises:
        ConfigError: the file's suffix names no picture format, or the file cannot be written.
    """
    figure, axes = new_plot("step", "learning rate")
    axes.plot(*points(schedules))
    for segment in schedules[1:]:
        axes.axvline(segment.first_step, color="grey", linestyle="--", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title("\n".join(map(str, schedules)), fontsize="medium", loc="left")
    save_plot(figure, path)


def _rates(schedules: Sequence[ScheduleSegment], steps: Iterable[int]) -> tuple[tuple[int, float], ...]:
    """Return (step, rate) of these steps, and of those at which a schedule begins, turns or ends."""
    last, wanted = schedules[-1].last_step, set(steps)
    for segment in schedules:
        turns = {segment.offset_steps + step for step in segment.schedule.turns}
        wanted |= {segment.first_step - 1, segment.first_step} | {it for it in turns if it >= segment.first_step}
    return tuple((step, rate_at(schedules, step)) for step in sorted(wanted) if 1 <= step <= last)
