"""Column layers of one input: the only communication is that of their common input and of its gradient.

Shapes: B batch, T sequence, N = B x T, H hidden, F output features of a layer held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.uncompiled import uncompiled
from megalm.parallel import collectives
from megalm.parallel.collectives import Finish
from megalm.parallel.groups import AxisGroup
from megalm.parallel.partition import Part
from megalm.parallel.stream import Stream


class ColumnLinear(nn.Linear):
    """The rows of a linear layer's weight [F, H] that `part` says; applied by a `ColumnProjection`."""

    def __init__(self, in_features: int, part: Part, bias: bool) -> None:
        super().__init__(in_features, part.size, bias=bias)
        self.part = part


class ColumnProjection:
    """Applies column layers to the residual stream, together."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @uncompiled
    def __call__(self, hidden: Tensor, *columns: nn.Linear) -> tuple[Tensor, ...]:
        assert all(isinstance(column, ColumnLinear) for column in columns)
        parts = [column.part for column in columns]
        weights, biases = [column.weight for column in columns], [column.bias for column in columns]
        return _Columns.apply(hidden, self._stream, parts, *weights, *biases)


class _Columns(torch.autograd.Function):
    """One function for all, so that the gradient of their input is summed over the ranks once.

    Of the input only what the stream holds is kept for the backward pass, a slice where it is in slices. The weights'
    gradients are computed while the input's gradient is under way.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, stream: Stream, parts: Sequence[Part], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(parts)], parameters[len(parts) :]
        ctx.save_for_backward(hidden, *weights)
        ctx.stream, ctx.parts = stream, parts
        whole = stream.begin_whole(hidden)()
        return tuple(functional.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden, *weights = ctx.saved_tensors
        stream: Stream = ctx.stream
        whole = stream.begin_whole(hidden)
        rows = [gradient.flatten(0, 1) for gradient in gradients]  # [N, F]
        addend = rows[0] @ weights[0]
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            addend.addmm_(row, weight)
        input_gradient = stream.begin_gradient(addend.view(*gradients[0].shape[:2], -1))
        whole_rows = whole().flatten(0, 1)  # [N, H]
        begun = [
            _begin_shared(row.t() @ whole_rows, part, stream.group) for row, part in zip(rows, ctx.parts, strict=True)
        ] + [
            _begin_shared(row.sum(0), part, stream.group) if ctx.needs_input_grad[place] else _nothing
            for place, (row, part) in enumerate(zip(rows, ctx.parts, strict=True), start=3 + len(weights))
        ]
        return input_gradient(), None, None, *(finish() for finish in begun)


def _begin_shared(gradient: Tensor, part: Part, group: AxisGroup) -> Finish:
    """The gradient of what is held here; sharers of a part each have an addend of it."""
    if part.sharers == 1:
        return lambda: gradient
    # In a buffer of all the group's parts, so that no further group is needed: shared parts are few and small.
    place = group.index // part.sharers
    buffer = gradient.new_zeros((group.size // part.sharers, *gradient.shape), dtype=torch.float32)
    buffer[place] = gradient
    total = collectives.begin_sum(buffer, group)
    return lambda: total()[place].to(gradient.dtype)


def _nothing() -> None:
    """The gradient of a bias that a layer does not have."""
