"""A step of a pipeline, action by action: whether a schedule is legal, its times, what each rank keeps. No torch.

simulate([schedule.actions(rank) for rank in range(4)], schedule.stage_ranks, ActionCosts.equal(schedule.stages))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalm.parallel.pipeline_schedules import Action, ActionKind

_Pass = tuple[ActionKind, int, int]  # an action without B, which is I and W in one


@dataclass(frozen=True)
class ActionCosts:
    """Times in any unit.

    Args:
        forward, input_gradient, weight_gradient: of each stage, for one micro-batch; a whole backward pass takes both.
        send: of an output or a gradient between two ranks, which compute meanwhile.
    """

    forward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    send: float = 0.0

    @staticmethod
    def equal(
        stages: int, forward: float = 1, input_gradient: float = 1, weight_gradient: float = 1, send: float = 0
    ) -> ActionCosts:
        """All stages take the same times."""
        return ActionCosts((forward,) * stages, (input_gradient,) * stages, (weight_gradient,) * stages, send)

    def by_kind(self) -> dict[ActionKind, tuple[float, ...]]:
        """The time of each kind of action, of each stage."""
        backward = tuple(map(sum, zip(self.input_gradient, self.weight_gradient, strict=True)))
        return {"F": self.forward, "B": backward, "I": self.input_gradient, "W": self.weight_gradient}


@dataclass(frozen=True)
class SimulatedStep:
    """What a step takes.

    Attributes:
        makespan: from the first action to the end of the last one.
        busy: time that each rank computes.
        kept: the most activations that each rank keeps at once, in stages x micro-batches.
        starts: of each action; an order of all ranks' actions in which none comes before what it needs.
    """

    makespan: float
    busy: tuple[float, ...]
    kept: tuple[int, ...]
    starts: dict[Action, float]

    @property
    def bubble_shares(self) -> tuple[float, ...]:
        """The share of the step that each rank waits."""
        return tuple(1 - busy / self.makespan for busy in self.busy)


def simulate(ranks: Sequence[Sequence[Action]], stage_ranks: Sequence[int], costs: ActionCosts) -> SimulatedStep:
    """Run each rank's actions in their order, each as soon as what it needs is there.

    Args:
        ranks: the actions of each, of a whole step or its F alone.
        stage_ranks: the rank of each stage.

    Raises:
        ValueError: ranks wait for each other, an action is missing, is there twice or stands on another rank than its
            stage, or a stage's micro-batches are not those of the others.
    """
    last, times = len(stage_ranks) - 1, costs.by_kind()
    ends: dict[_Pass, float] = {}
    starts: dict[Action, float] = {}
    at, clocks = [0] * len(ranks), [0.0] * len(ranks)
    waiting: dict[_Pass, int] = {}
    ready = list(range(len(ranks)))
    while ready:
        rank = ready.pop()
        actions, clock = ranks[rank], clocks[rank]
        for index in range(at[rank], len(actions)):
            kind, stage, micro_batch = action = actions[index]
            if stage_ranks[stage] != rank:
                raise ValueError(f"rank {rank} has {action}, of a stage of rank {stage_ranks[stage]}")
            needed = _needed(action, last)
            if needed is not None:
                if needed not in ends:
                    waiting[needed] = rank
                    break
                clock = max(clock, ends[needed] + (costs.send if stage_ranks[needed[1]] != rank else 0))
            starts[action] = clock
            clock += times[kind][stage]
            done: _Pass = ("I", stage, micro_batch) if kind == "B" else action
            if done in ends:
                raise ValueError(f"rank {rank} has {action} twice")
            ends[done] = clock
            if kind == "B":
                ends["W", stage, micro_batch] = clock
            if done in waiting:
                ready.append(waiting.pop(done))
            at[rank], clocks[rank] = index + 1, clock
    stuck = [f"rank {rank} at {ranks[rank][index]}" for rank, index in enumerate(at) if index < len(ranks[rank])]
    if stuck:
        raise ValueError(f"these ranks wait for each other, or for what nobody does: {', '.join(stuck)}")
    micro_batches = 1 + max((action.micro_batch for action in starts), default=-1)
    kinds = 3 if any(action.kind != "F" for action in starts) else 1
    missing = kinds * len(stage_ranks) * micro_batches - len(ends)
    if missing:
        raise ValueError(f"{missing} passes of {micro_batches} micro-batches are missing")
    busy = tuple(sum(times[kind][stage] for kind, stage, _ in actions) for actions in ranks)
    one = dict.fromkeys(range(last + 1), 1)
    return SimulatedStep(max(clocks), busy, tuple(int(most_kept(actions, one)) for actions in ranks), starts)


def _needed(action: Action, last: int) -> _Pass | None:
    """What must have ended before an action; what that needed has ended too, as the F of the stage of an I."""
    kind, stage, micro_batch = action
    if kind == "F":
        return ("F", stage - 1, micro_batch) if stage else None
    if kind == "W":
        return "I", stage, micro_batch
    return ("I", stage + 1, micro_batch) if stage < last else ("F", stage, micro_batch)


def most_kept(
    actions: Sequence[Action], sizes: Mapping[int, float], put_off: Mapping[int, float] | None = None
) -> float:
    """The most activations that a rank keeps at once.

    Args:
        actions: of the rank.
        sizes: of each stage of the rank, what one micro-batch keeps from its F to its B, or to its I.
        put_off: what it keeps from its I to its W; None: the same.
    """
    put_off = sizes if put_off is None else put_off
    kept: float = 0
    most: float = 0
    for kind, stage, _ in actions:
        if kind == "F":
            kept += sizes[stage]
        elif kind == "I":
            kept += put_off[stage] - sizes[stage]
        else:
            kept -= sizes[stage] if kind == "B" else put_off[stage]
        most = max(most, kept)
    return most
