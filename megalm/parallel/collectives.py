"""Every collective of the tensor-parallel layers: plain ones, ones with gradients, and the residual stream's.

A `begin_*` function starts a collective and returns a function that waits for its result, so that a matrix product can
run meanwhile. Shapes: B batch, T sequence, S = T / ranks, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.model.layer_factory import ResidualStream
from megalm.parallel.process_groups import AxisGroup

Finish = Callable[[], Tensor]


def sum_over(tensor: Tensor, group: AxisGroup) -> Tensor:
    """Sum of the ranks' tensors, in place."""
    return begin_sum(tensor, group)()


def sum_of_copies(tensor: Tensor, group: AxisGroup) -> Tensor:
    """Sum of the ranks' tensors, which stay as they are."""
    return sum_over(tensor.clone(memory_format=torch.contiguous_format), group)


def begin_sum(tensor: Tensor, group: AxisGroup) -> Finish:
    """Start `sum_over`."""
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group.process_group, async_op=True)
    return _finish(work, lambda: tensor)


def maximum_over(tensor: Tensor, group: AxisGroup) -> Tensor:
    """Element-wise maximum of the ranks' tensors, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.process_group)
    return tensor


def gather(part: Tensor, group: AxisGroup) -> Tensor:
    """Every rank's tensor: [...] -> [ranks, ...]."""
    whole = part.new_empty((group.size, *part.shape))
    dist.all_gather_into_tensor(whole.flatten(0, 1), part.contiguous(), group=group.process_group)
    return whole


def begin_gather_sequence(part: Tensor, group: AxisGroup) -> Finish:
    """Start to gather the ranks' slices [B, S, H] -> [B, T, H]."""
    slices = part.new_empty((group.size, *part.shape))
    work = dist.all_gather_into_tensor(
        slices.flatten(0, 1), part.contiguous(), group=group.process_group, async_op=True
    )
    return _finish(work, lambda: slices.movedim(0, 1).flatten(1, 2))


def begin_scatter_sum(whole: Tensor, group: AxisGroup, result: Tensor | None = None) -> Finish:
    """Start to sum the ranks' addends [B, T, H] -> this rank's slice [B, S, H] of the sum, in `result` if given."""
    batch, length, width = whole.shape
    slices = whole.view(batch, group.size, length // group.size, width).movedim(1, 0).contiguous()
    if result is None:
        result = torch.empty_like(slices[0])
    work = dist.reduce_scatter_tensor(result, slices.flatten(0, 1), group=group.process_group, async_op=True)
    return _finish(work, lambda: result)


# A linear map of a tensor.
Map = Callable[[Tensor], Tensor]


def linear(tensor: Tensor, forward: Map, backward: Map) -> Tensor:
    """forward(tensor), whose gradient is backward(gradient): a linear map, and its transpose."""
    result = _Linear.apply(tensor, forward, backward)  # type: ignore[no-untyped-call]  # torch: untyped
    assert isinstance(result, Tensor)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Map, backward: Map) -> Tensor:
        ctx.backward_map = backward
        return forward(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_map(gradients[0]), None, None


def _finish(work: Any, result: Finish) -> Finish:
    def wait() -> Tensor:
        work.wait()
        return result()

    return wait


class ReplicatedResidual(ResidualStream):
    """How the ranks of a tensor group hold the residual stream between the sharded layers: [B, T, H] on every rank."""

    is_sequence_sharded = False

    def __init__(self, group: AxisGroup) -> None:
        self.group = group
        self.ranks = group.size
        self.slices = group.size if self.is_sequence_sharded else 1

    def whole(self, hidden: Tensor) -> Tensor:
        """The stream as [B, T, H]; its gradient is summed over the ranks, each of which makes a part of its use."""
        return linear(hidden, lambda it: it.view_as(it), self._summed)

    def join(self, addend: Tensor) -> Tensor:
        """The sum of the ranks' addends [B, T, H], as the stream; each addend gets the sum's gradient."""
        return linear(addend, self._summed, lambda it: it)

    def _summed(self, tensor: Tensor) -> Tensor:
        return sum_of_copies(tensor, self.group)

    def begin_whole(self, hidden: Tensor) -> Finish:
        """Start `whole`, without a gradient."""
        return lambda: hidden

    def addend_of(self, part: Tensor) -> Tensor:
        """Room [B, T, H] for this rank's addend of `part`, a contiguous piece of the stream that `begin_sum` fills."""
        return part

    def begin_sum(self, addend: Tensor, part: Tensor) -> Finish:
        """Start the sum of the ranks' addends, into `part` of the stream."""
        return begin_sum(addend, self.group)


class SequenceShardedResidual(ReplicatedResidual):
    """With `parallel.sequence`: [B, S, H], the rank's slice of the sequence.

    The group then computes and keeps norms, dropout and residuals once, not once per rank.
    """

    is_sequence_sharded = True

    def whole(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self._gathered, self._scattered)

    def join(self, addend: Tensor) -> Tensor:
        return linear(addend, self._scattered, self._gathered)

    def _gathered(self, part: Tensor) -> Tensor:
        return begin_gather_sequence(part, self.group)()

    def _scattered(self, whole: Tensor) -> Tensor:
        return begin_scatter_sum(whole.contiguous(), self.group)()

    def begin_whole(self, hidden: Tensor) -> Finish:
        return begin_gather_sequence(hidden, self.group)

    def addend_of(self, part: Tensor) -> Tensor:
        batch, length, width = part.shape
        return part.new_empty(batch, length * self.slices, width)

    def begin_sum(self, addend: Tensor, part: Tensor) -> Finish:
        return begin_scatter_sum(addend, self.group, part)
