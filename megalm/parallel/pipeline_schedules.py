"""What each rank of a pipeline computes, in which order: schedules as lists of actions, without torch.

    schedule = PipelineSchedule("interleaved_1f1b", ranks=4, virtual_stages=2, micro_batches=16)
    schedule.stage_ranks    # (0, 1, 2, 3, 0, 1, 2, 3): the rank of each stage
    schedule.stages_of(1)   # (1, 5)
    schedule.actions(1)     # (Action("F", 1, 0), Action("F", 1, 1), ...)

A stage is a run of neighbouring layers; stages count from the first layers to the last, over all ranks. A rank runs its
actions in their order, and each as soon as what it needs is there: F the output of the stage before, B and I the
gradient of the stage behind, W the I of its own stage. Sending is no action: output and gradient leave when they are
computed; between two stages of one rank nothing is sent. Every schedule is legal for any number of micro-batches, and
so are its F alone in the same order, for a validation: cost_model/pipeline_simulation.py proves it, and gives start
times and memory.

| name | virtual stages | source |
|---|---|---|
| 1f1b | 1 | one forward, one backward: PipeDream-Flush, Narayanan et al. 2021, section 2.2.1; also DeepSpeed's |
| interleaved_1f1b | 2 or more | Narayanan et al. 2021, section 2.2.2; of Megatron-LM |
| zb_v | 2 | zero bubble in the shape of a V: Qi et al. 2023 (arXiv:2401.10241), section 6; greedy here |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Literal, NamedTuple

from megalm.topology import PipelineScheduleName

ActionKind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """A stage's work on one micro-batch.

    Attributes:
        kind: F forward, B whole backward, I the gradient of the input, W the gradients of the weights; I and W are B.
        stage: from 0, over all ranks.
        micro_batch: from 0.
    """

    kind: ActionKind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class PipelineSchedule:
    """A step of a pipeline.

    Args:
        ranks: of the pipeline.
        virtual_stages: stages of each rank; legal are those of `virtual_stages_of`.
        micro_batches: of a step, any number.
    """

    name: PipelineScheduleName
    ranks: int
    virtual_stages: int
    micro_batches: int

    def __post_init__(self) -> None:
        assert min(self.ranks, self.micro_batches) > 0, self
        assert self.virtual_stages in virtual_stages_of(self.name), self

    @property
    def stages(self) -> int:
        """Number of stages of all ranks."""
        return self.ranks * self.virtual_stages

    @property
    def stage_ranks(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return stage_ranks(self.name, self.ranks, self.virtual_stages)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in their order."""
        return tuple(stage for stage, owner in enumerate(self.stage_ranks) if owner == rank)

    @property
    def divides_backward(self) -> bool:
        """Whether a backward pass is I and W instead of B."""
        return self.name == "zb_v"

    def actions(self, rank: int) -> tuple[Action, ...]:
        """The actions of a rank, in their order."""
        return _zb_v(self)[rank] if self.divides_backward else _one_forward_one_backward(self, rank)

    @property
    def bubble_share(self) -> float:
        """The share of a step that each rank waits if F, I and W of all stages take equal time and sending takes none.

        Of `1f1b` and `interleaved_1f1b` the ratio of F to I and W does not matter.
        """
        waits = _WAITS[self.name](self.ranks, self.virtual_stages, self.micro_batches)
        return waits / (3 * self.virtual_stages * self.micro_batches + waits)


def virtual_stages_of(name: PipelineScheduleName) -> range:
    """The legal numbers of stages a rank."""
    return {"1f1b": range(1, 2), "interleaved_1f1b": range(2, sys.maxsize), "zb_v": range(2, 3)}[name]


def stage_ranks(name: PipelineScheduleName, ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """The rank of each stage: around the ranks again and again, or (`zb_v`) up and down again."""
    around = tuple(range(ranks))
    return around + around[::-1] if name == "zb_v" else around * virtual_stages


# Times of one F that a rank waits in a step; ranks, virtual stages and micro-batches.
_WAITS: dict[PipelineScheduleName, Callable[[int, int, int], int]] = {
    "1f1b": lambda ranks, _, __: 3 * (ranks - 1),
    # Fewer micro-batches than ranks come around again only when the first one does.
    "interleaved_1f1b": lambda ranks, stages, count: 3 * (ranks - 1 + (stages - 1) * max(0, ranks - count)),
    "zb_v": lambda ranks, _, count: max(ranks - 1, 4 * ranks - 2 - 3 * count) if ranks > 1 else 0,
}


@lru_cache(maxsize=256)
def _one_forward_one_backward(schedule: PipelineSchedule, rank: int) -> tuple[Action, ...]:
    """Forward passes that fill the pipeline, then one backward pass after each forward pass, then the rest.

    Micro-batches go around the ranks in groups: the rank's first stage takes a whole group, then its second stage. A
    group has as many as there are ranks, so that a micro-batch comes around when its group is through; one more in the
    first groups if their number does not divide the micro-batches.
    """
    ranks, count = schedule.ranks, schedule.micro_batches
    groups = max(1, count // ranks)
    size, larger = divmod(count, groups)
    own = schedule.stages_of(rank)
    forward: list[Action] = []
    backward: list[Action] = []
    first = 0
    for group in range(groups):
        members = range(first, first + size + (group < larger))
        forward += [Action("F", stage, member) for stage in own for member in members]
        backward += [Action("B", stage, member) for stage in reversed(own) for member in members]
        first = members.stop
    # A rank is one F and, where micro-batches come around, one B farther from the first gradient than the next rank.
    away = (ranks - 1 - rank) * (2 if len(own) > 1 else 1)
    warm_up = (len(own) - 1) * (size + (larger > 0)) + away
    pairs = zip_longest(forward[warm_up:], backward)
    return (*forward[:warm_up], *(action for pair in pairs for action in pair if action is not None))


# What a rank does first of what it can do; 0 and 1 are its stages down and up the V.
_V_ORDER: Sequence[tuple[ActionKind, int]] = (("F", 1), ("I", 0), ("W", 0), ("I", 1), ("F", 0), ("W", 1))


@lru_cache(maxsize=8)
def _zb_v(schedule: PipelineSchedule) -> tuple[tuple[Action, ...], ...]:
    """Slot by slot, in each of which a rank does one of F, I and W, by `_V_ORDER`.

    A rank keeps the activations of at most 2 x ranks stages and micro-batches: those of the first rank under 1f1b.
    Of the orders of six, this one waits the least for F = I = W, and little more where I takes longer than W.
    """
    ranks, stages, count = schedule.ranks, schedule.stages, schedule.micro_batches
    done = {kind: [0] * stages for kind in ("F", "I", "W")}  # of each stage, micro-batches
    forward, input_gradient, weight_gradient = done["F"], done["I"], done["W"]
    actions: list[list[Action]] = [[] for _ in range(ranks)]

    def can(kind: ActionKind, rank: int, stage: int) -> bool:
        if kind == "W":
            return weight_gradient[stage] < input_gradient[stage]
        if kind == "I":
            member = input_gradient[stage]
            return member < forward[stage] and (stage == stages - 1 or member < input_gradient[stage + 1])
        mirror = stages - 1 - stage
        kept = sum(forward[own] - weight_gradient[own] for own in (stage, mirror))
        member = forward[stage]
        return member < count and kept < 2 * ranks and (stage == 0 or member < forward[stage - 1])

    own = [(rank, stages - 1 - rank) for rank in range(ranks)]
    left = 3 * stages * count
    while left:
        slot = []
        for rank in range(ranks):
            for kind, way in _V_ORDER:
                if can(kind, rank, own[rank][way]):
                    slot.append((rank, kind, own[rank][way]))
                    break
        assert slot, schedule
        for rank, kind, stage in slot:
            actions[rank].append(Action(kind, stage, done[kind][stage]))
            done[kind][stage] += 1
        left -= len(slot)
    return tuple(map(tuple, actions))
