"""Every schedule is legal for any size, waits as long as its closed formula says, and keeps no more than published."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.cost_model.pipeline_simulation import ActionCosts, SimulatedStep, most_kept, simulate
from megalm.parallel.pipeline_schedules import Action, PipelineSchedule

KINDS = [("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("zb_v", 2)]
TIMES = st.floats(0.1, 3)


def step(schedule: PipelineSchedule, *times: float, send: float = 0) -> SimulatedStep:
    ranks = [schedule.actions(rank) for rank in range(schedule.ranks)]
    return simulate(ranks, schedule.stage_ranks, ActionCosts.equal(schedule.stages, *times, send=send))


def published_bound(schedule: PipelineSchedule, rank: int) -> int:
    """Stages x micro-batches that a rank keeps at most."""
    ranks, virtual, micro_batches = schedule.ranks, schedule.virtual_stages, schedule.micro_batches
    if schedule.name == "1f1b":
        return min(micro_batches, ranks - rank)
    if schedule.name == "zb_v":
        return min(2 * micro_batches, 2 * ranks)
    # Korthikanti et al. 2022, section 4.2.3: on the first rank 1 + (p - 1) / (p m) times the layers of p stages.
    return min(virtual * micro_batches, (virtual - 1) * ranks + 2 * (ranks - 1 - rank) + 1)


def check(schedule: PipelineSchedule) -> None:
    found = step(schedule)
    assert found.bubble_shares == pytest.approx([schedule.bubble_share] * schedule.ranks)
    assert found.busy == (3 * schedule.virtual_stages * schedule.micro_batches,) * schedule.ranks
    bounds = [published_bound(schedule, rank) for rank in range(schedule.ranks)]
    if schedule.name == "zb_v":
        assert all(kept <= bound for kept, bound in zip(found.kept, bounds, strict=True))
    elif schedule.micro_batches % schedule.ranks == 0:
        assert list(found.kept) == bounds
    if schedule.micro_batches >= schedule.ranks:
        waits = {"1f1b": 3, "interleaved_1f1b": 3, "zb_v": 1}[schedule.name] * (schedule.ranks - 1)
        share = waits / (3 * schedule.virtual_stages * schedule.micro_batches + waits)
        assert schedule.bubble_share == pytest.approx(share)


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_every_small_size(name: str, virtual: int) -> None:
    for ranks in range(1, 7):
        for micro_batches in range(1, 3 * ranks + 2):
            check(PipelineSchedule(name, ranks, virtual, micro_batches))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_the_largest_size(name: str, virtual: int) -> None:
    check(PipelineSchedule(name, 64 // virtual, virtual, 512))  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.integers(1, 64), st.integers(1, 96))
def test_any_size(kind: tuple[str, int], ranks: int, micro_batches: int) -> None:
    name, virtual = kind
    check(PipelineSchedule(name, max(1, ranks // virtual), virtual, micro_batches))  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(1, 30), st.lists(TIMES, min_size=3, max_size=3), TIMES)
def test_any_times(kind: tuple[str, int], ranks: int, micro_batches: int, times: list[float], send: float) -> None:
    schedule = PipelineSchedule(kind[0], ranks, kind[1], micro_batches)  # type: ignore[arg-type]
    found, slower = step(schedule, *times), step(schedule, *times, send=send)
    path = schedule.stages * (times[0] + times[1])  # of the first micro-batch
    assert found.makespan <= slower.makespan * (1 + 1e-9)
    assert max(*found.busy, path) <= found.makespan * (1 + 1e-9)
    if schedule.name != "zb_v":
        assert found.bubble_shares == pytest.approx([schedule.bubble_share] * ranks)


def test_messages_take_time() -> None:
    alone = PipelineSchedule("1f1b", 4, 1, 1)
    assert step(alone, send=5).makespan == step(alone).makespan + 2 * 3 * 5
    turn = PipelineSchedule("zb_v", 2, 2, 1)  # stages 1 and 2 are of one rank
    assert step(turn, send=5).makespan == step(turn).makespan + 2 * 2 * 5


@pytest.mark.parametrize("ratio", [1.1, 1.2])
def test_zero_bubble_lasts_where_inputs_take_longer_than_weights(ratio: float) -> None:
    few, many = (step(PipelineSchedule("zb_v", 8, 2, count), 1, ratio, 2 - ratio) for count in (32, 96))
    waits = [found.makespan - found.busy[0] for found in (few, many)]
    assert waits[0] == pytest.approx(waits[1]), "more micro-batches wait no longer"
    assert waits[1] < 1.5 * 7  # 1f1b: 6 x 7


BREACHES: dict[str, Callable[[list[list[Action]]], object]] = {
    "wait": lambda ranks: ranks[0].insert(0, ranks[0].pop()),
    "missing": lambda ranks: ranks[0].pop(),
    "twice": lambda ranks: ranks[1].append(ranks[1][0]),
    "of a stage of rank 1": lambda ranks: ranks[0].insert(0, ranks[1].pop()),
}


@pytest.mark.parametrize("words", BREACHES)
@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_an_illegal_schedule_is_refused(name: str, virtual: int, words: str) -> None:
    schedule = PipelineSchedule(name, 2, virtual, 3)  # type: ignore[arg-type]
    ranks = [list(schedule.actions(rank)) for rank in range(2)]
    BREACHES[words](ranks)
    with pytest.raises(ValueError, match=words):
        simulate(ranks, schedule.stage_ranks, ActionCosts.equal(schedule.stages))


def test_what_is_kept_is_weighed() -> None:
    actions = [Action("F", 0, 0), Action("F", 1, 0), Action("B", 1, 0), Action("F", 0, 1), Action("I", 0, 0)]
    assert most_kept(actions, {0: 3, 1: 1}) == 6
    assert most_kept([*actions, Action("W", 0, 0), Action("F", 0, 2)], {0: 3, 1: 4}) == 7
    assert most_kept(actions, {0: 3, 1: 1}, {0: 5, 1: 0}) == 8, "what W reads may be more than what I did"


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_forward_passes_alone_are_legal(name: str, virtual: int) -> None:
    for micro_batches in (1, 5, 8):
        schedule = PipelineSchedule(name, 4, virtual, micro_batches)  # type: ignore[arg-type]
        ranks = [[it for it in schedule.actions(rank) if it.kind == "F"] for rank in range(4)]
        found = simulate(ranks, schedule.stage_ranks, ActionCosts.equal(schedule.stages))
        assert len(found.starts) == schedule.stages * micro_batches
        for action, start in found.starts.items():
            assert not action.stage or found.starts[action._replace(stage=action.stage - 1)] + 1 <= start


def test_stages_of_the_ranks() -> None:
    assert PipelineSchedule("interleaved_1f1b", 2, 3, 1).stages_of(1) == (1, 3, 5)
    assert PipelineSchedule("zb_v", 3, 2, 1).stage_ranks == (0, 1, 2, 2, 1, 0)
