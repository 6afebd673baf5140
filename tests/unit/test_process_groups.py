"""Every rank makes its groups in step with the others: NCCL splits each from the world's, for which all ranks meet."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.parallel import process_groups
from megalm.parallel.process_groups import make_groups
from megalm.topology import Topology

Made = list[tuple[tuple[int, ...], bool]]  # ranks of each new group, and whether only they make it


def _made_by(topology: Topology, rank: int, node_ranks: int, patch: pytest.MonkeyPatch) -> Made:
    made: Made = []

    def new_group(ranks: list[int], timeout: Any, use_local_synchronization: bool = False) -> str:
        assert len(set(ranks)) == len(ranks)
        made.append((tuple(ranks), use_local_synchronization))
        return f"group {len(made)}"

    patch.setattr(process_groups, "dist", SimpleNamespace(new_group=new_group, group=SimpleNamespace(WORLD="world")))
    make_groups(topology, rank, datetime.timedelta(minutes=1), node_ranks=node_ranks)
    return made


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tensor, pipeline, data, context = (draw(st.integers(1, 4)) for _ in range(4))
    expert = draw(st.sampled_from([degree for degree in (1, 2, 3, 4) if data * context % degree == 0]))
    return Topology(tensor * pipeline * data * context, tensor, pipeline, context, expert)


@given(topologies(), st.sampled_from([0, 2, 3]))
@settings(max_examples=60)
def test_every_rank_makes_as_many_groups_in_the_same_order(topology: Topology, node_ranks: int) -> None:
    if node_ranks and topology.data % node_ranks:
        node_ranks = 0
    with pytest.MonkeyPatch.context() as patch:
        made = [_made_by(topology, rank, node_ranks, patch) for rank in range(topology.world_size)]
    assert len({len(groups) for groups in made}) == 1
    for at_once in zip(*made, strict=True):
        groups = {ranks for ranks, _ in at_once}
        if len(groups) > 1:  # each its own
            assert [ranks for ranks, _ in at_once] == [(rank,) for rank in range(topology.world_size)]
        assert {alone for _, alone in at_once} == {len(at_once[0][0]) == 1}


@pytest.mark.parametrize(
    ("pipeline", "data", "tensor"), [(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 1, 2), (2, 3, 2), (3, 2, 4)]
)
def test_deepspeed_s_pipeline_makes_the_same_groups_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, pipeline: int, data: int, tensor: int
) -> None:
    from deepspeed.runtime.pipe import topology

    grid = topology.PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    made: list[list[tuple[int, ...]]] = []
    for rank in range(grid.world_size()):
        groups: list[tuple[int, ...]] = []

        def new_group(ranks: list[int], groups: list[tuple[int, ...]] = groups) -> str:
            groups.append(tuple(ranks))
            return f"group {len(groups)}"

        ranks = SimpleNamespace(get_rank=lambda rank=rank: rank, get_world_size=grid.world_size, new_group=new_group)
        monkeypatch.setattr(topology, "dist", ranks)
        topology.PipelineParallelGrid(topology=grid)
        made.append(groups)
    assert made[0]
    assert made == made[:1] * grid.world_size()
