"""Which nodes are named, and for what, by reports with stated numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalm.nodes.node_report import RankReport, pair_rounds, partners
from megalm.nodes.node_verdict import NodeFinding, judge_nodes
from megalm.rank_environment import RankPlace
from tests.messages import assert_names

GOOD = RankReport(
    rank=0,
    node="n0",
    device="cuda:0",
    versions={"torch": "2.13.0", "driver": "570"},
    commit="abc",
    code="1",
    free_bytes=80 << 30,
    product_flops=700e12,
    copy_bytes=50e9,
    link_bytes=45e9,
    inner_link_bytes=300e9,
)


def reports(nodes: int, ranks_per_node: int = 1, **changes: dict[int, object]) -> list[RankReport]:
    """Of good nodes; each change gives a field's other values by rank."""
    found = []
    for rank in range(nodes * ranks_per_node):
        own = {field: values[rank] for field, values in changes.items() if rank in values}
        node, local = divmod(rank, ranks_per_node)
        code = {} if local == 0 else {"code": None, "commit": None}
        place = {"rank": rank, "node": f"n{node}", "device": f"cuda:{local}"}
        found.append(replace(GOOD, **{**place, **code, **own}))  # type: ignore[arg-type]
    return found


def named(nodes: int, ranks_per_node: int = 1, **changes: dict[int, object]) -> list[NodeFinding]:
    return judge_nodes(reports(nodes, ranks_per_node, **changes), slow_factor=1.3)


def test_good_nodes_are_not_named() -> None:
    assert named(4, 2, product_flops={1: 600e12, 5: 760e12}, link_bytes={0: 30e9}, clock_seconds={2: 0.4}) == []
    assert named(1) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("product_flops", 500e12),
        ("copy_bytes", 20e9),
        ("link_bytes", 20e9),
        ("inner_link_bytes", 100e9),
        ("free_bytes", 40 << 30),
        ("clock_seconds", 1.5),
        ("clock_seconds", -1.5),
    ],
)
@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_a_slow_node_is_named_but_forbids_no_run(field: str, value: float, nodes: int) -> None:
    (found,) = named(nodes, **{field: {1: value}})
    assert (found.node, found.forbids) == ("n1", False)


def test_the_figure_is_reported_against_the_median_with_rank_and_device() -> None:
    (found,) = named(3, 2, product_flops={3: 350e12, 2: 490e12})
    assert found.node == "n1"
    assert_names(found, "n1", "350 TFLOP/s", "700 TFLOP/s", "0.50", "rank 3", "cuda:1")


def test_the_slower_of_two_nodes_is_named_and_the_factor_is_a_bound() -> None:
    assert [found.node for found in named(2, product_flops={0: 700e12 / 1.4})] == ["n0"]
    assert named(2, product_flops={0: 700e12 / 1.25}) == []


@pytest.mark.parametrize(
    ("changes", "names", "forbids"),
    [
        ({"versions": {2: {"torch": "2.12.0", "driver": "570"}}}, ("torch", "2.12.0", "2.13.0"), True),
        ({"versions": {2: {"torch": "2.13.0", "driver": "560"}}}, ("driver", "560", "570"), False),
        ({"commit": {2: "def"}, "code": {2: "2"}}, ("def", "abc"), True),
        ({"code": {2: "2"}}, ("abc",), True),
        ({"folder_problem": {2: "does not see runs/mine"}}, ("runs/mine",), True),
    ],
)
def test_what_has_to_be_equal(changes: dict[str, dict[int, object]], names: tuple[str, ...], forbids: bool) -> None:
    (found,) = named(3, **changes)
    assert (found.node, found.forbids) == ("n2", forbids)
    assert_names(found, "n2", *names)


def test_links_of_cpus_may_differ_more() -> None:
    cpus = dict.fromkeys(range(3), "cpu")
    assert named(3, device=cpus, link_bytes={1: 20e9}) == []
    assert [found.node for found in named(3, device=cpus, link_bytes={1: 10e9})] == ["n1"]


def test_of_two_that_differ_rank_0_is_right_and_more_than_one_thing_may_be_wrong() -> None:
    assert [found.node for found in named(2, commit={0: "def"}, code={0: "2"})] == ["n1"]
    assert [found.node for found in named(3, commit={0: "def"}, code={0: "2"})] == ["n0"]
    both = named(4, product_flops={2: 1e12}, code={1: "2"}, clock_seconds={2: 9.0})
    assert [(found.node, found.forbids) for found in both] == [("n1", True), ("n2", False), ("n2", False)]


def test_a_commit_of_the_same_files_is_no_difference() -> None:
    assert named(3, commit={1: "def"}) == []


@pytest.mark.parametrize("count", range(8))
def test_every_place_of_a_ring_meets_its_neighbours_once(count: int) -> None:
    rounds = pair_rounds(count)
    assert all(len({place for pair in each for place in pair}) == 2 * len(each) for each in rounds)
    edges = [frozenset(pair) for each in rounds for pair in each]
    assert len(edges) == len(set(edges)) == (count if count > 2 else max(0, count - 1))
    assert len(rounds) <= 3


def test_partners_are_mutual_and_on_the_right_nodes() -> None:
    places = [RankPlace(rank, "abc"[rank // 2], "cpu", 0, 0) for rank in range(6)]
    for rank in range(6):
        between, within = partners(places, rank)
        assert len(between) == 3
        assert within == [rank ^ 1]
        for number, partner in enumerate(between):
            if partner is not None:
                assert partners(places, partner)[0][number] == rank
                assert partner % 2 == rank % 2
    uneven = [RankPlace(rank, "aab"[rank], "cpu", 0, 0) for rank in range(3)]
    assert [partners(uneven, rank) for rank in range(3)] == [([2], [1]), ([None], [0]), ([0], [None])]


def test_the_better_of_two_measurements_counts() -> None:
    one = replace(GOOD, product_flops=1.0, link_bytes=None, clock_seconds=-3.0)
    two = replace(GOOD, copy_bytes=1.0, clock_seconds=0.5)
    assert one.better_of(two) == replace(GOOD, clock_seconds=0.5)
