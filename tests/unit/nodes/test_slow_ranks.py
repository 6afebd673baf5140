"""Which ranks are slow, and when that is reported, by stated numbers."""

from __future__ import annotations

import pytest

from megalm.nodes.straggler_watch import RankPace, SlowRank, SlowTimes, Straggler, slow_ranks
from megalm.rank_environment import RankPlace
from tests.messages import assert_names


def paces(compute: list[float | None], data: list[float] | None = None) -> list[RankPace]:
    return [RankPace(1.0, wait, own) for own, wait in zip(compute, data or [0.0] * len(compute), strict=True)]


@pytest.mark.parametrize(
    ("compute", "slow"),
    [
        ([0.5, 0.5, 0.6, 0.5], []),
        ([0.5, 0.5, 0.7, 0.5], [2]),
        ([0.8, 0.5], [0]),
        ([0.8, None, 0.5], [0]),
        ([None, None], []),
        ([0.9, 0.9, 0.5, 0.5], [0, 1]),
        ([0.5], []),
    ],
)
def test_slow_is_a_multiple_of_the_median(compute: list[float | None], slow: list[int]) -> None:
    found = slow_ranks(paces(compute), [0] * len(compute), 1.3)
    assert [(each.rank, each.quantity) for each in found] == [(rank, "compute") for rank in slow]
    assert all(each.median_seconds == 0.5 and each.own_seconds == compute[each.rank] for each in found)


def test_a_rank_is_compared_with_those_that_do_the_same_work() -> None:
    stages = [0, 0, 1, 1]
    assert slow_ranks(paces([0.5, 0.5, 0.9, 0.9]), stages, 1.3) == []
    assert [each.rank for each in slow_ranks(paces([0.5, 0.5, 0.9, 1.5]), stages, 1.3)] == [3]


def test_waits_for_data_are_compared_with_the_time_of_a_step() -> None:
    waits = [0.001, 0.004, 0.2, 0.35]  # a step takes a second
    assert slow_ranks(paces([None] * 4, waits), [0, 0, 1, 1], 1.3) == [SlowRank(3, "data", 0.35, 0.004)]


def test_a_slow_rank_is_reported_once_until_it_has_recovered() -> None:
    times, slow = SlowTimes(1.3, 100.0), [SlowRank(3, "compute", 0.9, 0.5)]
    assert [times.add(slow, 30.0) for _ in range(3)] == [[], [], []]
    assert times.add(slow, 30.0) == [(slow[0], 120.0)]
    assert times.add(slow, 30.0) == []
    assert times.add([], 30.0) == []
    assert [times.add(slow, 60.0) for _ in range(4)] == [[], [], [], [(slow[0], 240.0)]]


def test_a_break_begins_anew_and_one_long_exchange_is_not_enough() -> None:
    times, slow = SlowTimes(1.3, 100.0), [SlowRank(0, "data", 0.9, 0.0)]
    assert [times.add(found, 40.0) for found in (slow, slow, [], slow, slow, slow)] == [[]] * 6
    assert SlowTimes(1.3, 100.0).add(slow, 500.0) == []


def test_what_is_said() -> None:
    place = RankPlace(9, "n2", "cuda:1", 0, 0)
    straggler = Straggler(place, SlowRank(place.rank, "compute", 0.9, 0.5), 130.0, 87.0)
    assert_names(straggler, "rank 9", "n2", "cuda:1", "0.9 s", "0.5 s", "130 s", 87)
    assert straggler.fields().keys() >= {"rank", "host", "device", "quantity", "own_seconds", "median_seconds"}
