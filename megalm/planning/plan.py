"""What a run amounts to before it is started: parameters, tokens, FLOPs, memory, learning rates. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megalm.config.resolve import ResolvedRun, memory_case
from megalm.estimate.memory import MemoryCase, MemoryPlan, checkpoint_bytes, estimate_stages
from megalm.model.flops import flops_per_token
from megalm.model.shape import ModelShape, model_shape
from megalm.train.schedule import ScheduleSegment, rate_at

__all__ = [
    "MemoryCase",
    "MemoryPlan",
    "Plan",
    "checkpoint_bytes",
    "make_plan",
    "parameters_by_part",
]


@dataclass(frozen=True)
class Plan:
    """A resolved run in numbers.

    Attributes:
        parameters: part of the model -> parameters, summing to the model's count.
        memory_by_stage: bytes per rank, of each kind of pipeline stage.
        schedules: what the learning rate follows, one schedule after the other.
    """

    resolved: ResolvedRun
    shape: ModelShape
    parameters: dict[str, int]
    memory_by_stage: tuple[MemoryPlan, ...]
    schedules: tuple[ScheduleSegment, ...]

    @property
    def learning_rates(self) -> tuple[tuple[int, float], ...]:
        """(step, rate) where the schedules turn, and at each tenth of the run; steps count from 1."""
        last = self.schedules[-1].last_step
        steps = {round(last * tenth / 10) for tenth in range(1, 11)}.union(*map(_turns, self.schedules))
        return tuple((step, rate_at(self.schedules, step)) for step in sorted(steps) if 1 <= step <= last)

    @property
    def memory(self) -> MemoryPlan:
        """Bytes on the fullest rank."""
        return max(self.memory_by_stage, key=lambda stage: stage.total)

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_tokens(self) -> int:
        return self.resolved.tokens_per_step * self.resolved.config.train.steps

    @property
    def tokens_per_parameter(self) -> float:
        return self.total_tokens / self.parameter_count

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.shape, self.resolved.config.data.sequence_length)

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens


def make_plan(resolved: ResolvedRun, vocab_size: int, schedules: Sequence[ScheduleSegment] = ()) -> Plan:
    """Put a resolved run into numbers.

    Args:
        vocab_size: the tokenizer's; `model.vocab_size` goes before it.
        schedules: of a run that goes on, all of them; else the run's own is the only one.
    """
    config = resolved.config
    shape = model_shape(config.model, vocab_size, config.data.sequence_length)
    case = memory_case(
        config,
        resolved.deepspeed_source,
        shape,
        resolved.topology,
        resolved.precision,
        resolved.device,
        resolved.batch,
    )
    return Plan(
        resolved=resolved,
        shape=shape,
        parameters=parameters_by_part(shape),
        memory_by_stage=tuple(estimate_stages(case)),
        schedules=tuple(schedules) or (ScheduleSegment(1, 0, resolved.schedule),),
    )


def parameters_by_part(shape: ModelShape) -> dict[str, int]:
    """Part of the model -> exact number of parameters; a tied head has none of its own."""
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


def _turns(segment: ScheduleSegment) -> set[int]:
    """The run's steps at which a schedule begins, turns or ends, and the one before it took over."""
    schedule, offset = segment.schedule, segment.offset_steps
    turns = {segment.first_step - 1, segment.first_step, segment.last_step}
    if schedule.warmup_steps:
        turns.add(offset + schedule.warmup_steps)
    if schedule.kind == "wsd":
        turns.add(segment.last_step - schedule.decay_steps)
    return turns
