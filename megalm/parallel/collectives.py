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

from megalm.parallel.process_groups import AxisGroup

Finish = Callable[[], Tensor]


def sum_over(tensor: Tensor, group: AxisGroup) -> Tensor:
    """Sum of the ranks' tensors, in place."""
    return begin_sum(tensor, group)()


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


class SumGradient(torch.autograd.Function):
    """The same tensor; its gradient is summed over the ranks, each of which does a part of the work on it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradients[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class Sum(torch.autograd.Function):
    """The sum of the ranks' addends; each addend gets the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, addend: Tensor, group: AxisGroup) -> Tensor:
        return sum_over(addend.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class GatherSequence(torch.autograd.Function):
    """Slices [B, S, H] -> [B, T, H]; the gradient of a slice is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return begin_gather_sequence(part, group)()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return begin_scatter_sum(gradients[0].contiguous(), ctx.group)(), None


class ScatterSum(torch.autograd.Function):
    """Addends [B, T, H] -> this rank's slice [B, S, H] of their sum; the gradients of all slices are gathered."""

    @staticmethod
    def forward(ctx: Any, addend: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return begin_scatter_sum(addend.contiguous(), group)()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return begin_gather_sequence(gradients[0], ctx.group)(), None


def _finish(work: Any, result: Finish) -> Finish:
    def wait() -> Tensor:
        work.wait()
        return result()

    return wait


class ReplicatedResidual:
    """How the ranks of a tensor group hold the residual stream between the sharded layers: [B, T, H] on every rank."""

    is_sequence_sharded = False

    def __init__(self, group: AxisGroup) -> None:
        self.group = group
        self.ranks = group.size
        self.slices = group.size if self.is_sequence_sharded else 1

    def whole(self, hidden: Tensor) -> Tensor:
        """The stream as [B, T, H]; its gradient is summed over the ranks."""
        return SumGradient.apply(hidden, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def join(self, addend: Tensor) -> Tensor:
        """The sum of the ranks' addends [B, T, H], as the stream."""
        return Sum.apply(addend, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

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
        return GatherSequence.apply(hidden, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def join(self, addend: Tensor) -> Tensor:
        return ScatterSum.apply(addend, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def begin_whole(self, hidden: Tensor) -> Finish:
        return begin_gather_sequence(hidden, self.group)

    def addend_of(self, part: Tensor) -> Tensor:
        batch, length, width = part.shape
        return part.new_empty(batch, length * self.slices, width)

    def begin_sum(self, addend: Tensor, part: Tensor) -> Finish:
        return begin_scatter_sum(addend, self.group, part)
