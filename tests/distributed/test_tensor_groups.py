"""Process groups connect the ranks of an axis and no others, for every grid of four ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.process_groups import make_groups
from megalm.topology import AXES, Topology
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

# tensor, pipeline, context
GRIDS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (1, 4, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 4))
# A group -> the axes along which its ranks differ.
GROUPS = {
    "tensor": {"tensor"},
    "context": {"context"},
    "pipeline": {"pipeline"},
    "data_context": {"data", "context"},
    "model": {"tensor", "pipeline"},
    "stage": {"data", "context", "tensor"},
}


def _sums(comm: Any, device: torch.device) -> dict[Any, Any]:
    """Per grid and group: its ranks, this rank's place, and a sum in which each rank has a digit."""
    found = {}
    for grid in GRIDS:
        groups = make_groups(Topology(comm.size, *grid), comm.rank, comm.timeout, with_stages=True)
        for name in GROUPS:
            group = getattr(groups, name)
            digits = torch.tensor([10.0**comm.rank])
            dist.all_reduce(digits, group=group.process_group)
            assert dist.get_rank(group.process_group) == group.index
            found[grid, name] = group.ranks, group.index, int(digits)
    return found


def test_groups_reach_their_ranks() -> None:
    ranks = run_ranks(4, _sums)
    for rank, found in enumerate(ranks):
        for (grid, name), (members, index, digits) in found.items():
            topology = Topology(4, *grid)
            here = topology.coordinate(rank)
            same = set(AXES) - GROUPS[name]
            expected = tuple(
                other
                for other in range(4)
                if all(getattr(topology.coordinate(other), axis) == getattr(here, axis) for axis in same)
            )
            assert members == expected
            assert index == expected.index(rank)
            assert digits == sum(10**other for other in expected)
