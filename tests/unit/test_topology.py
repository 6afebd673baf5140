"""The rank arithmetic on every grid of up to 4,096 ranks."""

from __future__ import annotations

import time
from itertools import combinations
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.errors import ConfigError
from megalm.topology import AXES, Coordinate, Overlay, Topology
from tests.messages import assert_names

MOST_RANKS = 4096
OVERLAYS: tuple[Overlay, ...] = get_args(Overlay)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tensor = draw(st.integers(1, 64))
    context = draw(st.integers(1, min(64, MOST_RANKS // tensor)))
    pipeline = draw(st.integers(1, MOST_RANKS // (tensor * context)))
    data = draw(st.integers(1, MOST_RANKS // (tensor * context * pipeline)))
    expert = draw(st.sampled_from([degree for degree in range(1, data * context + 1) if data * context % degree == 0]))
    return Topology(tensor * context * pipeline * data, tensor, pipeline, context, expert)


@given(topologies())
@settings(max_examples=60)
def test_coordinates_round_trip(topology: Topology) -> None:
    places = [topology.coordinate(rank) for rank in range(topology.world_size)]
    assert [topology.rank(place) for place in places] == list(range(topology.world_size))
    for place in places:
        assert all(0 <= getattr(place, axis) < topology.size(axis) for axis in AXES)


@given(topologies())
@settings(max_examples=60)
def test_groups_of_an_axis_partition_the_world(topology: Topology) -> None:
    place = [topology.coordinate(rank) for rank in range(topology.world_size)]
    for axis in AXES:
        groups = topology.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)
        others = [other for other in AXES if other != axis]
        for group in groups:
            places = [place[rank] for rank in group]
            assert [getattr(place, axis) for place in places] == list(range(topology.size(axis)))
            assert all(len({getattr(place, other) for place in places}) == 1 for other in others)


@given(topologies())
@settings(max_examples=60)
def test_groups_of_two_axes_meet_in_one_rank_at_most(topology: Topology) -> None:
    home = {axis: {rank: index for index, group in enumerate(topology.groups(axis)) for rank in group} for axis in AXES}
    for one, other in combinations(AXES, 2):
        pairs = {(home[one][rank], home[other][rank]) for rank in range(topology.world_size)}
        assert len(pairs) == topology.world_size


@given(topologies())
@settings(max_examples=60)
def test_data_and_context_together_are_one_axis_of_a_grid_without_context(topology: Topology) -> None:
    """As DeepSpeed's pipelines see them, which know no context axis."""
    without = Topology(topology.world_size, topology.tensor, topology.pipeline)
    assert without.data == topology.data_context
    for rank in range(topology.world_size):
        place = topology.coordinate(rank)
        together = place.data * topology.context + place.context
        assert without.coordinate(rank) == Coordinate(place.pipeline, together, 0, place.tensor)


@given(topologies())
@settings(max_examples=60)
def test_expert_groups_are_neighbours_of_those_that_hold_the_same_other_weights(topology: Topology) -> None:
    place = [topology.coordinate(rank) for rank in range(topology.world_size)]
    expert, same = [], []
    for ranks in topology.groups("data_context"):
        assert len({(place[rank].pipeline, place[rank].tensor) for rank in ranks}) == 1
        order = [place[rank].data * topology.context + place[rank].context for rank in ranks]
        assert order == list(range(topology.data_context))
        expert += [ranks[first : first + topology.expert] for first in range(0, len(ranks), topology.expert)]
        same += [ranks[index :: topology.expert] for index in range(topology.expert)]
    assert sorted(topology.groups("expert")) == sorted(expert)
    assert sorted(topology.groups("expert_data")) == sorted(same)
    assert {len(ranks) for ranks in same} == {topology.expert_data}


def test_tensor_neighbours_are_next_to_each_other_and_stages_far_apart() -> None:
    topology = Topology(16, tensor=2, pipeline=2)
    assert topology.groups("tensor")[:2] == [(0, 1), (2, 3)]
    assert topology.groups("data") == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]
    assert topology.groups("pipeline")[0] == (0, 8)


def test_context_lies_between_data_and_tensor() -> None:
    topology = Topology(16, tensor=2, pipeline=2, context=2)
    assert topology.groups("tensor")[:2] == [(0, 1), (2, 3)]
    assert topology.groups("context")[:3] == [(0, 2), (1, 3), (4, 6)]
    assert topology.groups("data") == [(0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)]
    assert (topology.data, topology.data_context, topology.copy_ranks) == (2, 4, 8)
    assert str(topology) == "pipeline 2 x data 2 x context 2 x tensor 2"


@pytest.mark.parametrize(
    ("topology", "staying"),
    [
        (Topology(16, tensor=8), {"tensor", "context", "pipeline"}),
        (Topology(16, tensor=4, pipeline=2), {"tensor", "context", "data"}),  # a stage fills a node
        (Topology(16, tensor=16), {"data", "context", "pipeline"}),
        (Topology(12, tensor=3, pipeline=2), {"context"}),  # 3 does not divide 8
        (Topology(16, tensor=2, context=4), {"tensor", "context", "pipeline"}),
        (Topology(16, tensor=4, context=4), {"tensor", "data", "pipeline"}),
    ],
)
def test_what_stays_in_a_node_of_8(topology: Topology, staying: set[str]) -> None:
    assert {axis for axis in AXES if topology.stays_in_a_node(axis, 8)} == staying


def test_experts_lie_between_context_and_data() -> None:
    topology = Topology(16, tensor=2, pipeline=2, context=2, expert=4)
    assert topology.groups("expert") == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]
    assert {len(ranks) for ranks in topology.groups("expert_data")} == {1}
    assert Topology(8, expert=2).groups("expert_data") == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert str(topology) == "pipeline 2 x data 2 x context 2 x tensor 2, expert 4"


def test_a_large_grid_is_made_at_once() -> None:
    topology = Topology(16 * MOST_RANKS, tensor=8, pipeline=16, context=4, expert=64)
    start = time.process_time()
    for axis in (*AXES, *OVERLAYS):
        topology.groups(axis)
    assert time.process_time() - start < 0.5  # takes about a millisecond


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context", "near"),
    [
        (6, 4, 1, 1, (4, 8)),
        (8, 2, 3, 1, (6, 12)),
        (8, 2, 1, 3, (6, 12)),
        (5, 2, 2, 2, (8,)),
        (0, 1, 1, 1, ()),
        (4, 0, 1, 1, ()),
        (4, 1, 1, 0, ()),
    ],
)
def test_grids_that_are_none(world: int, tensor: int, pipeline: int, context: int, near: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        Topology(world, tensor, pipeline, context)
    assert_names(error.value, *near)


def test_expert_groups_that_are_none() -> None:
    with pytest.raises(ConfigError) as error:
        Topology(24, tensor=2, expert=5)
    assert_names(error.value, "parallel.expert=5", 12, 4, 6)
