"""Runs a pipeline's schedule: forward and backward passes of this rank's stages, and messages to other ranks' stages.

A schedule is a list of actions for each rank of the pipeline. Messages between ranks are not in it: each rank derives
the same order of all of them, from which no deadlock follows, whatever the schedule is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.cost_model.pipeline_simulation import ActionCosts, simulate
from megalm.model.weight_gradients import WeightGradients
from megalm.parallel.pipeline_schedules import Action
from megalm.parallel.process_groups import AxisGroup

_SENDS_UNDER_WAY = 4  # a further one waits for the oldest: what is sent stays in memory


@dataclass(frozen=True, order=True)
class Message:
    """What a stage gives to a neighbour, of one micro-batch: hidden states to the next one, or their gradient back."""

    stage: int
    micro_batch: int
    is_gradient: bool

    @property
    def receiver(self) -> int:
        """The stage that takes it."""
        return self.stage + (-1 if self.is_gradient else 1)


@dataclass(frozen=True)
class Transfer:
    """One end of a message between ranks; `peer` is a place in the pipeline."""

    message: Message
    peer: int
    sends: bool


Step = Action | Transfer


def with_transfers(orders: Sequence[Sequence[Action]], stage_ranks: Sequence[int], lowest: int) -> list[list[Step]]:
    """Return each rank's actions with its ends of the messages between ranks.

    All messages have one order: by the time at which they are made, if F, I and W take equal times. Every rank begins
    its ends in this order, the receiver when the message is made. So an end only ever waits for others that come
    earlier in this order, and ranks never wait for each other in a circle.

    Args:
        orders: of each rank.
        stage_ranks: the rank of each stage.
        lowest: the first stage with a backward pass; those of the stages before it are left out.
    """
    costs = ActionCosts.equal(len(stage_ranks))
    durations, starts = costs.by_kind(), simulate(orders, stage_ranks, costs).starts
    made = []
    steps: list[list[tuple[float, bool, Step]]] = []
    for order in orders:
        needed = [action for action in order if action.kind == "F" or action.stage >= lowest]
        steps.append([(starts[action], True, action) for action in needed])
        for action in needed:
            end = starts[action] + durations[action.kind][action.stage]
            message = Message(action.stage, action.micro_batch, action.kind != "F")
            last_receiver = lowest if message.is_gradient else 0
            if action.kind != "W" and last_receiver <= message.receiver < len(stage_ranks):
                made.append((end, message))
    for end, message in sorted(made):
        sender, receiver = stage_ranks[message.stage], stage_ranks[message.receiver]
        if sender != receiver:
            steps[sender].append((end, False, Transfer(message, receiver, sends=True)))
            steps[receiver].append((end, False, Transfer(message, sender, sends=False)))
    return [[step for *_, step in sorted(of_rank, key=lambda item: item[:2])] for of_rank in steps]


# (stage, its input or None at the first stage, micro-batch) -> its output: hidden states, or what `finish` takes.
RunStage = Callable[[int, Tensor | None, int], Tensor]


class StageExecutor:
    """Runs this rank's part of a schedule over some micro-batches; used once.

    Args:
        run_stage: runs the forward pass of one of this rank's stages.
        pipeline: the ranks with the other stages.
        last: the last stage.
        hidden: makes an empty tensor for a micro-batch's hidden states, or their gradient.
        lowest: the first stage with a backward pass; None: forward passes alone.
        phase: marks a phase of the step.
        weight_gradients: of the stages, where the schedule divides backward passes.
    """

    def __init__(
        self,
        run_stage: RunStage,
        pipeline: AxisGroup,
        last: int,
        hidden: Callable[[int], Tensor],
        lowest: int | None,
        phase: Callable[[str], AbstractContextManager[None]],
        weight_gradients: WeightGradients | None = None,
    ) -> None:
        self._run_stage = run_stage
        self._pipeline, self._last = pipeline, last
        self._hidden = hidden
        self._lowest = last + 1 if lowest is None else lowest
        self._phase = phase
        self._weight_gradients = weight_gradients
        self._made: dict[Message, Tensor] = {}
        self._arriving: dict[Message, tuple[dist.Work, Tensor]] = {}
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._passes: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}  # forward, not yet backward
        self._later: dict[tuple[int, int], deque[Callable[[], None]]] = {}  # put off by I, not yet done by W

    def run(self, steps: Iterable[Step]) -> None:
        """Collective over the pipeline: run this rank's steps of `with_transfers`."""
        for step in steps:
            if isinstance(step, Transfer):
                self._begin(step)
            elif step.kind == "F":
                self._run_forward(step.stage, step.micro_batch)
            elif step.kind == "W":
                self._run_weights(step.stage, step.micro_batch)
            else:
                self._run_backward(step.stage, step.micro_batch, whole=step.kind == "B")
        while self._sent:
            self._finish_sending()
        left = self._made, self._arriving, self._passes, self._later
        assert not any(left), "a schedule leaves work undone"

    def _run_forward(self, stage: int, micro_batch: int) -> None:
        hidden = None if stage == 0 else self._take(Message(stage - 1, micro_batch, is_gradient=False))
        if hidden is not None and stage > self._lowest:
            hidden.requires_grad_()
        with self._phase("forward"):
            output = self._run_stage(stage, hidden, micro_batch)
        if stage >= self._lowest:
            self._passes[stage, micro_batch] = hidden, get_gradient_edge(output)
        if stage < self._last:
            self._made[Message(stage, micro_batch, is_gradient=False)] = output.detach()

    def _run_backward(self, stage: int, micro_batch: int, whole: bool) -> None:
        is_last = stage == self._last
        gradient = None if is_last else self._take(Message(stage + 1, micro_batch, is_gradient=True))
        hidden, edge = self._passes.pop((stage, micro_batch))
        with self._phase("backward"), nullcontext() if whole else self._put_off(stage, micro_batch):
            torch.autograd.backward(edge, gradient)
        if hidden is not None and hidden.requires_grad:
            assert hidden.grad is not None
            self._made[Message(stage, micro_batch, is_gradient=True)] = hidden.grad

    @contextmanager
    def _put_off(self, stage: int, micro_batch: int) -> Iterator[None]:
        assert self._weight_gradients is not None
        with self._weight_gradients.put_off() as self._later[stage, micro_batch]:
            yield

    def _run_weights(self, stage: int, micro_batch: int) -> None:
        later = self._later.pop((stage, micro_batch))
        with self._phase("backward"):
            while later:  # what each keeps is free as soon as it is done
                later.popleft()()

    def _take(self, message: Message) -> Tensor:
        """Return what a stage has made, once it is here."""
        if message in self._made:  # by another stage of this rank
            return self._made.pop(message)
        work, tensor = self._arriving.pop(message)
        with self._phase("wait"):
            work.wait()
        return tensor

    def _begin(self, transfer: Transfer) -> None:
        peer, group = self._pipeline.ranks[transfer.peer], self._pipeline.process_group
        if not transfer.sends:
            tensor = self._hidden(transfer.message.micro_batch)
            work = dist.irecv(tensor, src=peer, group=group)
            assert work is not None
            self._arriving[transfer.message] = work, tensor
            return
        tensor = self._made.pop(transfer.message).contiguous()
        work = dist.isend(tensor, dst=peer, group=group)
        assert work is not None
        self._sent.append((work, tensor))
        if len(self._sent) > _SENDS_UNDER_WAY:
            self._finish_sending()

    def _finish_sending(self) -> None:
        work, _ = self._sent.popleft()
        with self._phase("wait"):
            work.wait()
