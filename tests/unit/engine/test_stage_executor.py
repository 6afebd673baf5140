"""The order of messages between the ranks of a pipeline: no ranks wait for each other, even if nothing is buffered."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megalm.engine.pipeline.stage_executor import Message, Step, Transfer, with_transfers
from megalm.parallel.pipeline_schedules import Action, PipelineSchedule
from megalm.topology import PipelineScheduleName

KINDS: tuple[tuple[PipelineScheduleName, int], ...] = (
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("zb_v", 2),
)


def _orders(schedule: PipelineSchedule, trains: bool) -> list[list[Action]]:
    of_ranks = (schedule.actions(rank) for rank in range(schedule.ranks))
    return [[action for action in order if trains or action.kind == "F"] for order in of_ranks]


def _run_without_buffers(ranks: list[list[Step]], stage_ranks: tuple[int, ...], lowest: int) -> set[Message]:
    """Every rank stands still at its end of a message until the other rank is at the other end; what has been sent."""
    left = [list(reversed(steps)) for steps in ranks]
    here: list[set[Message]] = [set() for _ in ranks]
    sent = set()
    while any(left):
        before = sum(map(len, left))
        for rank, steps in enumerate(left):
            while steps and isinstance(steps[-1], Action):
                kind, stage, micro_batch = steps.pop()
                if kind == "W":
                    continue
                is_gradient = kind != "F"
                source = Message(stage + 1 if is_gradient else stage - 1, micro_batch, is_gradient)
                assert source in here[rank] or not 0 <= source.stage < len(stage_ranks), "computed before it is there"
                here[rank].add(Message(stage, micro_batch, is_gradient))
            if steps:
                end = steps[-1]
                assert isinstance(end, Transfer)
                other = left[end.peer]
                if other and other[-1] == Transfer(end.message, rank, not end.sends):
                    source_rank = rank if end.sends else end.peer
                    assert stage_ranks[end.message.stage] == source_rank
                    assert end.message in here[source_rank], "sent before it is made"
                    assert not end.message.is_gradient or end.message.receiver >= lowest
                    steps.pop()
                    other.pop()
                    here[rank].add(end.message)
                    here[end.peer].add(end.message)
                    sent.add(end.message)
        assert sum(map(len, left)) < before, f"waiting for each other: {[steps[-1:] for steps in left]}"
    return sent


@pytest.mark.parametrize(("name", "virtual"), KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_no_ranks_wait_for_each_other(name: PipelineScheduleName, virtual: int, ranks: int) -> None:
    for micro_batches in (1, 2, 3, 4, 5, 8, 9):
        schedule = PipelineSchedule(name, ranks, virtual, micro_batches)
        between = [one != other for one, other in pairwise(schedule.stage_ranks)]
        for trains, lowest in ((True, 0), (True, schedule.stages - 1), (True, 1), (False, 0)):
            steps = with_transfers(_orders(schedule, trains), schedule.stage_ranks, lowest)
            sent = _run_without_buffers(steps, schedule.stage_ranks, lowest)
            back = between[lowest:] if trains else []
            assert len(sent) == micro_batches * sum([*between, *back])
            actions = [step for of_rank in steps for step in of_rank if isinstance(step, Action)]
            backward = (schedule.stages - lowest) * (2 if schedule.divides_backward else 1) if trains else 0
            assert len(actions) == micro_batches * (schedule.stages + backward)


def test_a_receiver_begins_when_the_message_is_made() -> None:
    """Not when it needs it: the message travels while it computes."""
    schedule = PipelineSchedule("interleaved_1f1b", 2, 2, 4)
    _, second = with_transfers(_orders(schedule, True), schedule.stage_ranks, 0)
    assert second[:3] == [
        Transfer(Message(0, 0, False), 0, sends=False),
        Action("F", 1, 0),
        Transfer(Message(0, 1, False), 0, sends=False),
    ]
