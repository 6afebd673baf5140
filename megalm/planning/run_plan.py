"""The numbers of a run before it starts: parameters, tokens, FLOPs, memory, learning rates. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.cost_model.gpu_specs import data_sheet_peak
from megalm.cost_model.memory import MemoryCase, MemoryPlan, estimate_stages
from megalm.model.model_config import (
    ModelConfig,
    build_model_config,
    float8_share,
    flops_per_token,
    recomputed_flops_per_token,
)
from megalm.planning.lr_schedule import ScheduleSegment, rate_at
from megalm.planning.memory_fit import MemoryFit
from megalm.planning.resolve import ResolvedRun, memory_case
from megalm.topology import bubble_share
from megalm.utils.plotting import new_plot, save_plot

# The share of the peak that a tuned run of a large model reaches; a first run on many nodes may reach half of it.
ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Plan:
    """A resolved run in numbers.

    Attributes:
        parameters: part of the model -> parameters; their sum is the model's count.
        memory_by_stage: bytes per rank, for each kind of pipeline stage.
        schedules: successive schedules of the learning rate.
    """

    resolved: ResolvedRun
    shape: ModelConfig
    case: MemoryCase
    parameters: dict[str, int]
    memory_by_stage: tuple[MemoryPlan, ...]
    schedules: tuple[ScheduleSegment, ...]

    @property
    def learning_rates(self) -> tuple[tuple[int, float], ...]:
        """(step, rate) at each turn of the schedules and each tenth of the run; steps count from 1."""
        last = self.schedules[-1].last_step
        return _rates(self.schedules, (round(last * tenth / 10) for tenth in range(1, 11)))

    @property
    def memory(self) -> MemoryPlan:
        """Bytes on the fullest rank."""
        return max(self.memory_by_stage, key=lambda stage: stage.peak)

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
    def recomputed_flops_per_token(self) -> int:
        """Of the backward pass, beside `flops_per_token`."""
        case = self.case
        return recomputed_flops_per_token(
            self.shape, case.sequence_length, case.recompute, case.checkpoint_activations_every
        )

    @property
    def float8_share(self) -> float:
        """Of all operations."""
        config = self.resolved.config
        return float8_share(self.shape, config.data.sequence_length, config.precision.float8)

    @property
    def fit(self) -> MemoryFit:
        return MemoryFit.of(self.memory, self.resolved.device)

    @property
    def hours(self) -> float | None:
        """At `ASSUMED_MFU` of the peak of all ranks, less a pipeline's bubble; None: the GPU's peak is not known."""
        run = self.resolved
        peak = data_sheet_peak(run.device.name or "", run.precision != "fp32", self.float8_share)
        if peak is None:
            return None
        busy = 1 - bubble_share(run.topology.pipeline, run.batch.accumulation)
        return self.total_flops / (peak[0] * run.topology.world_size * ASSUMED_MFU * busy) / 3600

    @property
    def total_flops(self) -> int:
        return self.flops_per_token * self.total_tokens


def make_plan(resolved: ResolvedRun, vocab_size: int, schedules: Sequence[ScheduleSegment] = ()) -> Plan:
    """Compute the numbers of a resolved run.

    Args:
        vocab_size: the tokenizer's; `model.vocab_size` takes precedence.
        schedules: all schedules of a resumed run; none: the run's own.
    """
    config = resolved.config
    shape = build_model_config(config.model, vocab_size, config.data.sequence_length)
    case = memory_case(
        config,
        resolved.deepspeed_source,
        shape,
        resolved.topology,
        resolved.precision,
        resolved.device,
        resolved.batch,
        resolved.whole_gradients,
        resolved.recompute,
    )
    return Plan(
        resolved=resolved,
        shape=shape,
        case=case,
        parameters=parameters_by_part(shape),
        memory_by_stage=tuple(estimate_stages(case)),
        schedules=tuple(schedules) or (ScheduleSegment(1, 0, resolved.schedule),),
    )


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
