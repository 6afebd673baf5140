"""Which rank does what, as pure integers: no torch, no process group.

Axes from the outermost to the innermost: pipeline, data, tensor. Tensor-parallel neighbours are consecutive
ranks, so they share a node when the degree divides the ranks of a node; pipeline stages are farthest apart,
because they talk least. Context parallelism (slices of long sequences) and expert parallelism (experts of a layer)
would each take a place between data and tensor; neither is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megalm.errors import ConfigError

Axis = Literal["pipeline", "data", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Coordinate:
    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """`world_size` ranks as a grid of pipeline x data x tensor.

    Raises:
        ConfigError: where tensor x pipeline does not divide the world size.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if min(self.world_size, self.tensor, self.pipeline) < 1:
            raise ConfigError("topology: the world size and every parallel degree are at least 1")
        if self.world_size % (self.tensor * self.pipeline):
            raise ConfigError(
                f"parallel.tensor={self.tensor} x parallel.pipeline={self.pipeline} does not divide "
                f"{self.world_size} ranks; start a multiple of {self.tensor * self.pipeline} ranks"
            )

    @property
    def data(self) -> int:
        """Data-parallel degree: how many copies of the model train on different samples."""
        return self.world_size // (self.tensor * self.pipeline)

    def size(self, axis: Axis) -> int:
        return {"pipeline": self.pipeline, "data": self.data, "tensor": self.tensor}[axis]

    def coordinate(self, rank: int) -> Coordinate:
        assert 0 <= rank < self.world_size, (rank, self.world_size)
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, tensor=tensor)

    def rank(self, coordinate: Coordinate) -> int:
        return (coordinate.pipeline * self.data + coordinate.data) * self.tensor + coordinate.tensor

    def stride(self, axis: Axis) -> int:
        """Distance in ranks between neighbours along an axis."""
        return {"pipeline": self.data * self.tensor, "data": self.tensor, "tensor": 1}[axis]

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """The groups along an axis, by their first rank: ranks that differ in this coordinate only, in its order."""
        stride, span = self.stride(axis), self.stride(axis) * self.size(axis)
        return [
            tuple(range(first, first + span, stride))
            for block in range(0, self.world_size, span)
            for first in range(block, block + stride)
        ]

    def stays_in_a_node(self, axis: Axis, ranks_per_node: int) -> bool:
        """Whether no group along an axis leaves its node, where nodes hold consecutive ranks."""
        if self.size(axis) == 1:
            return True
        return all(group[0] // ranks_per_node == group[-1] // ranks_per_node for group in self.groups(axis))


def bubble_share(stages: int, micro_batches: int) -> float:
    """The part of a step that each pipeline stage waits, under one-forward-one-backward with equal stages."""
    return (stages - 1) / (micro_batches + stages - 1)
