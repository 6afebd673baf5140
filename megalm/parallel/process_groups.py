"""The process groups of a layout, created once: each rank holds its own group of each axis."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from megalm.model.model_config import is_stacked
from megalm.topology import Coordinate, Topology


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that differ from this one along some axes only.

    Args:
        ranks: global ranks in their order; of one axis, that of their coordinate.
        index: this rank's place in `ranks`; of one axis, its coordinate.
        process_group: for torch.distributed; exists even for a single rank.
    """

    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the grid, and its groups of ranks that communicate.

    Args:
        tensor: ranks that hold shards of the same layers.
        context: ranks that hold the same shard and divide the sequences of the same samples.
        data_context: data x context, all ranks that hold the same shard: they sum its gradients, and ZeRO divides its
            states over them.
        expert: ranks of data x context that divide the experts of each layer.
        expert_data: ranks that hold the same experts: what `data_context` is for all other weights.
        pipeline: ranks that hold the successive stages of one copy of the model.
        model: tensor x pipeline, all ranks that together hold one copy of the model.
        stage: data x context x tensor, all ranks that hold the same layers; None where nothing asks for it.
        node: neighbours of the data group that share a second copy of the weights; None where there is none.
    """

    topology: Topology
    coordinate: Coordinate
    tensor: AxisGroup
    context: AxisGroup
    data_context: AxisGroup
    expert: AxisGroup
    expert_data: AxisGroup
    pipeline: AxisGroup
    model: AxisGroup
    stage: AxisGroup | None = None
    node: AxisGroup | None = None

    def copies_of(self, name: str) -> AxisGroup:
        """The ranks that hold the same part of a parameter, given its canonical name."""
        return self.expert_data if is_stacked(name) else self.data_context


def make_groups(
    topology: Topology, rank: int, timeout: datetime.timedelta, with_stages: bool = False, node_ranks: int = 0
) -> ParallelGroups:
    """Create the groups of all ranks, in the same order on every rank; collective, after the default group exists.

    Every rank makes equally many, and all ranks make the same one or each its own of one rank: with NCCL on a bound
    device a new group is split from the communicator of the world, for which all ranks meet. Axes that share a group
    (pipeline=1: tensor and model) share its process group too.

    Args:
        node_ranks: size of the `node` groups; 0: there are none.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def own(groups: list[tuple[int, ...]]) -> AxisGroup:
        (mine,) = (ranks for ranks in groups if rank in ranks)
        for ranks in groups:
            if ranks not in made and (len(ranks) > 1 or ranks is mine):
                made[ranks] = _new_group(ranks, topology.world_size, timeout)
        return AxisGroup(mine, mine.index(rank), made[mine])

    return ParallelGroups(
        topology=topology,
        coordinate=topology.coordinate(rank),
        tensor=own(topology.groups("tensor")),
        context=own(topology.groups("context")),
        data_context=own(topology.groups("data_context")),
        expert=own(topology.groups("expert")),
        expert_data=own(topology.groups("expert_data")),
        pipeline=own(topology.groups("pipeline")),
        model=own(_groups_of(topology, lambda at: (at.data, at.context))),
        stage=own(_groups_of(topology, lambda at: (at.pipeline,))) if with_stages else None,
        node=_node_group(topology, node_ranks, rank, timeout) if node_ranks else None,
    )


def _groups_of(topology: Topology, index: Callable[[Coordinate], tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The ranks of each value of `index`, in its order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(topology.world_size):
        found.setdefault(index(topology.coordinate(rank)), []).append(rank)
    return [tuple(found[value]) for value in sorted(found)]


def _node_group(topology: Topology, size: int, rank: int, timeout: datetime.timedelta) -> AxisGroup:
    """A group of its own also where it has all ranks: DeepSpeed counts the group's ranks, and of WORLD finds no end."""
    data = topology.groups("data")
    parts = [ranks[first : first + size] for ranks in data for first in range(0, len(ranks), size)]
    made = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in parts}
    (mine,) = (ranks for ranks in parts if rank in ranks)
    return AxisGroup(mine, mine.index(rank), made[mine])


def _new_group(ranks: tuple[int, ...], world_size: int, timeout: datetime.timedelta) -> dist.ProcessGroup:
    if len(ranks) == world_size:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    # Groups of one rank are made by all ranks at once, each its own, and not one after the other; over gloo none waits.
    return dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=len(ranks) == 1)
