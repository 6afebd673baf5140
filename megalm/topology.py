"""Which rank does what, and which part of a dimension it holds, as pure integers: no torch, no process group.

Axes from the outermost to the innermost, by what they send: pipeline, data, context, tensor. Tensor-parallel neighbours
are consecutive ranks, so they share a node when the degree divides the ranks of a node; those of a context group lie
next to them. Pipeline stages are farthest apart, because they communicate least.

Experts divide no samples: an expert group is `expert` neighbours of the data x context ranks, which hold the same of
all other weights. So it takes whole context groups, or parts of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from megalm.errors import ConfigError

Axis = Literal["pipeline", "data", "context", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
# What overlaps the axes: data x context, which an expert group is a part of; and what holds the same experts.
Overlay = Literal["data_context", "expert", "expert_data"]

PipelineScheduleName = Literal["1f1b", "interleaved_1f1b", "zb_v"]


@dataclass(frozen=True)
class Coordinate:
    """A rank's place on each axis."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """`world_size` ranks as a grid of pipeline x data x context x tensor, with experts over data x context.

    Raises:
        ConfigError: a degree below 1, tensor x context x pipeline does not divide the world size, or expert does not
            divide data x context.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if min(self.world_size, self.tensor, self.pipeline, self.context, self.expert) < 1:
            raise ConfigError("topology: the world size and every parallel degree must be at least 1")
        if self.world_size % self.copy_ranks:
            context = f" x parallel.context={self.context}" if self.context > 1 else ""
            below = self.world_size // self.copy_ranks * self.copy_ranks
            near = f"{below} or {below + self.copy_ranks}" if below else str(self.copy_ranks)
            raise ConfigError(
                f"parallel.tensor={self.tensor}{context} x parallel.pipeline={self.pipeline} does not divide "
                f"{self.world_size} ranks; start a multiple of {self.copy_ranks} ranks, {near}"
            )
        if self.data_context % self.expert:
            ranks = self.data_context
            use = " or ".join(map(str, nearest(self.expert, divisors(ranks))))
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide the {ranks} rank(s) that hold the same layers (data x "
                f"context); use {use}"
            )

    @property
    def copy_ranks(self) -> int:
        """Number of ranks that train one copy of the model on the same samples: tensor x context x pipeline."""
        return self.tensor * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel degree: the number of model copies, which train on different samples."""
        return self.world_size // self.copy_ranks

    @property
    def data_context(self) -> int:
        """Number of ranks that hold the same weights, over which gradients are summed and ZeRO divides its states."""
        return self.data * self.context

    @property
    def expert_data(self) -> int:
        """Number of ranks that hold the same experts: data x context / expert."""
        return self.data_context // self.expert

    def __str__(self) -> str:
        grid = " x ".join(f"{axis} {self.size(axis)}" for axis in AXES if axis != "context" or self.context > 1)
        return grid + f", expert {self.expert}" * (self.expert > 1)

    def size(self, axis: Axis | Overlay) -> int:
        """The number of ranks of a group along an axis: its parallel degree."""
        degree: int = getattr(self, axis)
        return degree

    def coordinate(self, rank: int) -> Coordinate:
        """The place of a rank."""
        assert 0 <= rank < self.world_size, (rank, self.world_size)
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, context=context, tensor=tensor)

    def rank(self, coordinate: Coordinate) -> int:
        """The inverse of `coordinate`."""
        rank = 0
        for axis in AXES:
            rank = rank * self.size(axis) + int(getattr(coordinate, axis))
        return rank

    def stride(self, axis: Axis | Overlay) -> int:
        """Distance in ranks between neighbours along an axis."""
        if axis in {"data_context", "expert"}:
            return self.tensor
        if axis == "expert_data":
            return self.tensor * self.expert
        return math.prod(self.size(inner) for inner in AXES[AXES.index(axis) + 1 :])

    def groups(self, axis: Axis | Overlay) -> list[tuple[int, ...]]:
        """The groups along an axis, by first rank: ranks that differ only in this coordinate, in its order."""
        stride, span = self.stride(axis), self.stride(axis) * self.size(axis)
        return [
            tuple(range(first, first + span, stride))
            for block in range(0, self.world_size, span)
            for first in range(block, block + stride)
        ]

    def stays_in_a_node(self, axis: Axis | Overlay, ranks_per_node: int) -> bool:
        """Whether each group along an axis lies in one node; nodes hold consecutive ranks."""
        if self.size(axis) == 1:
            return True
        return all(group[0] // ranks_per_node == group[-1] // ranks_per_node for group in self.groups(axis))


def divisors(value: int) -> list[int]:
    """Return the divisors of a number, the smallest first."""
    small = [size for size in range(1, int(value**0.5) + 1) if value % size == 0]
    return sorted({*small, *(value // size for size in small)})


def nearest(degree: int, legal: Iterable[int]) -> list[int]:
    """The nearest legal degrees below and above."""
    degrees = sorted(legal)
    return [n for n in degrees if n < degree][-1:] + [n for n in degrees if n > degree][:1]


@dataclass(frozen=True)
class DimRange:
    """Elements [first, last) of a dimension. `sharers` neighbouring ranks hold it, and this is number `sharer`."""

    first: int
    last: int
    sharer: int = 0
    sharers: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.last - self.first


def whole_parts(features: int, parts: int, ranks: int, index: int) -> DimRange:
    """The share of rank `index` in `features` that consist of equal `parts` (heads), none of which is cut.

    With fewer parts than ranks (key/value heads) neighbours hold the same part, the one that their query heads need.
    """
    assert features % parts == 0, (features, parts)
    assert parts % ranks == 0 or ranks % parts == 0, (parts, ranks)  # planning/parallel_checks.py refuses the others
    sharers = max(1, ranks // parts)
    part, sharer = divmod(index, sharers)
    size = features // min(parts, ranks)
    return DimRange(part * size, (part + 1) * size, sharer, sharers)


def vocabulary_rows(total: int, ranks: int, index: int) -> DimRange:
    """The share of rank `index` in the `total` rows of a vocabulary; shares differ by at most one row.

    Unequal shares need no padding rows, which losses, norms and checkpoints would have to leave out.
    """
    assert total >= ranks, (total, ranks)
    size, longer = divmod(total, ranks)
    first = index * size + min(index, longer)
    return DimRange(first, first + size + (index < longer))
