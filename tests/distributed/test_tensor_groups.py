"""Process groups connect the ranks of an axis and no others, for every grid of four ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.process_groups import make_groups
from megalm.topology import Topology
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4))  # tensor, pipeline
AXES = ("tensor", "data", "pipeline", "model")


def _sums(comm: Any, device: torch.device) -> dict[Any, Any]:
    """Per grid and axis: the group's ranks, this rank's place, and a sum in which each rank has a digit."""
    found = {}
    for tensor, pipeline in GRIDS:
        groups = make_groups(Topology(comm.size, tensor, pipeline), comm.rank, comm.timeout)
        for axis in AXES:
            group = getattr(groups, axis)
            digits = torch.tensor([10.0**comm.rank])
            dist.all_reduce(digits, group=group.process_group)
            assert dist.get_rank(group.process_group) == group.index
            found[tensor, pipeline, axis] = group.ranks, group.index, int(digits)
    return found


def test_groups_reach_their_ranks() -> None:
    ranks = run_ranks(4, _sums)
    for rank, found in enumerate(ranks):
        for tensor, pipeline, axis in found:
            topology = Topology(4, tensor, pipeline)
            here = topology.coordinate(rank)
            same = {"tensor": ("data", "pipeline"), "data": ("tensor", "pipeline"), "pipeline": ("tensor", "data")}
            expected = tuple(
                other
                for other in range(4)
                if all(
                    getattr(topology.coordinate(other), name) == getattr(here, name)
                    for name in same.get(axis, ("data",))
                )
            )
            members, index, digits = found[tensor, pipeline, axis]
            assert members == expected
            assert index == expected.index(rank)
            assert digits == sum(10**other for other in expected)
