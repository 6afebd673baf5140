"""The process groups of a layout, made once and passed in: each rank holds the one group of each axis that it is in."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch.distributed as dist

from megalm.topology import Coordinate, Topology


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that differ from this one along one axis only.

    Args:
        ranks: global ranks in the order of their coordinate.
        index: this rank's place in `ranks`, which is its coordinate.
        process_group: what torch.distributed takes; of one rank, too.
    """

    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the grid and its group along each axis.

    Args:
        tensor: ranks that hold shards of the same layers.
        data: ranks that hold the same shard and train on different samples.
        pipeline: ranks that hold the successive stages of one copy of the model.
        model: tensor x pipeline, all ranks that together hold one copy of the model.
    """

    topology: Topology
    coordinate: Coordinate
    tensor: AxisGroup
    data: AxisGroup
    pipeline: AxisGroup
    model: AxisGroup


def make_groups(topology: Topology, rank: int, timeout: datetime.timedelta) -> ParallelGroups:
    """Make this rank's groups; collective: every rank of the world calls it, after the default group exists.

    Only the members of a group meet to make it, so a rank makes as many groups as there are axes and not as many as
    there are ranks. All ranks go through the axes in the same order and the groups of one axis are disjoint, so no
    two ranks wait for each other.
    """
    place = topology.coordinate(rank)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group(ranks: tuple[int, ...]) -> AxisGroup:
        if ranks not in made:
            made[ranks] = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        return AxisGroup(ranks, ranks.index(rank), made[ranks])

    def at(pipeline: int, data: int, tensor: int) -> int:
        return topology.rank(Coordinate(pipeline=pipeline, data=data, tensor=tensor))

    stages, copies, shards = range(topology.pipeline), range(topology.data), range(topology.tensor)
    return ParallelGroups(
        topology=topology,
        coordinate=place,
        tensor=group(tuple(at(place.pipeline, place.data, tensor) for tensor in shards)),
        data=group(tuple(at(place.pipeline, data, place.tensor) for data in copies)),
        pipeline=group(tuple(at(pipeline, place.data, place.tensor) for pipeline in stages)),
        model=group(tuple(at(pipeline, place.data, tensor) for pipeline in stages for tensor in shards)),
    )
