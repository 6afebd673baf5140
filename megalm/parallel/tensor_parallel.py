"""The tensor-parallel layer factory: the model's layers with their weights divided over the ranks of a group.

Column layers hold a part of the output features (whole heads), row layers a part of the input features. So a block
communicates twice: its attention and its MLP each read the whole residual stream and produce addends of it.

Shapes: B batch, T sequence, S the part of T that the stream holds, N = B x T, H hidden, F output features of a layer
held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megalm.model.layer_factory import (
    WHOLE_SEQUENCE,
    AnyModule,
    LayerFactory,
    Rectangle,
    ResidualStream,
    ShardedAxis,
    WholeSequence,
    annotate_shard,
)
from megalm.model.loss import LogitRule
from megalm.model.modules import DropoutClock, PositionEmbedding, RMSNorm
from megalm.model.weight_gradients import WeightGradients
from megalm.parallel import collectives
from megalm.parallel.process_groups import AxisGroup
from megalm.parallel.sharded_linear import TensorProducts
from megalm.parallel.vocab_parallel import VocabParallelEmbedding, VocabParallelOutput
from megalm.topology import DimRange, vocabulary_rows, whole_parts


class ColumnLinear(nn.Linear):
    """Rows `part` of a linear layer's weight [F, H]; a `ColumnProjection` applies it."""

    def __init__(self, in_features: int, part: DimRange, bias: bool) -> None:
        super().__init__(in_features, part.size, bias=bias)
        self.part = part


class ColumnProjection:
    """Applies column layers to the residual stream, together: only their common input and its gradient communicate.

    Args:
        gradients: of the weights, where they may be put off.
    """

    def __init__(self, products: TensorProducts, gradients: WeightGradients | None) -> None:
        self._how = products, gradients

    def __call__(self, hidden: Tensor, *columns: ColumnLinear) -> tuple[Tensor, ...]:
        sharers = [column.part.sharers for column in columns]
        weights = [column.weight for column in columns]
        biases = [column.bias for column in columns if column.bias is not None]
        return _Columns.apply(hidden, *self._how, sharers, *weights, *biases)  # type: ignore[no-untyped-call]  # torch: untyped


class _Columns(torch.autograd.Function):
    """One function for all layers, so that the gradient of their input is summed over the ranks once.

    The backward pass keeps the input as the stream holds it, a slice under sequence parallelism.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        products: TensorProducts,
        later: WeightGradients | None,
        sharers: Sequence[int],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(sharers)], parameters[len(sharers) :]
        ctx.save_for_backward(hidden, *weights)
        ctx.products, ctx.sharers, ctx.later = products, sharers, later
        if later is not None:
            ctx.weights = weights  # the parameters: a recomputation gives what is saved without their hooks
        return tuple(products.columns(hidden, weights, biases))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden, *weights = ctx.saved_tensors
        of_hidden, _, _, _, *of_parameters = ctx.needs_input_grad
        compute = partial(ctx.products.columns_backward, hidden, weights, gradients, ctx.sharers)
        needed = [of_hidden, *of_parameters]
        if ctx.later is None:
            found = _needed(compute(needed), needed)
        else:
            ends = 1 + len(weights)
            of_weights = [False, *needed[1:ends], *(False for _ in needed[ends:])]
            others = [it and not of_weight for it, of_weight in zip(needed, of_weights, strict=True)]
            found = _needed(compute(others), others)
            found[1:ends] = ctx.later.of(ctx.weights, lambda: _needed(compute(of_weights), of_weights)[1:ends])
        return found[0], None, None, None, *found[1:]


def _needed(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [each if it else None for each, it in zip(gradients, needed, strict=True)]


class TensorLayers(LayerFactory):
    """Sharded layers that hold their group. Weights are left empty: `initialize` cuts them from whole ones.

    Args:
        products: of column and row layers; they know the ranks that share each layer.
        compiled: the element-wise work of the loss runs compiled.
        z_loss: coefficient of the loss's penalty.
        context: how a context group holds a sample's sequence.
    """

    def __init__(
        self,
        clock: DropoutClock,
        products: TensorProducts,
        compiled: bool = False,
        z_loss: float = 0.0,
        context: WholeSequence = WHOLE_SEQUENCE,
    ) -> None:
        super().__init__(clock, compiled, z_loss=z_loss, sequence=context)
        self._products, self._stream = products, products.stream
        self._group = self._stream.group
        self.slices = self._stream.slices

    def column(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Linear:
        part = whole_parts(out_features, parts, self._group.size, self._group.index)
        layer = ColumnLinear(in_features, part, bias)
        _annotate(layer.weight, (out_features, in_features), 0, part)
        if bias:
            _annotate(layer.bias, (out_features,), 0, part)
        return layer

    def row(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Module:
        part = whole_parts(in_features, parts, self._group.size, self._group.index)
        layer = RowLinear(part, out_features, bias, self._products, self.weight_gradients)
        _annotate(layer.weight, (out_features, in_features), 1, part)
        if bias:
            assert layer.bias is not None
            self._replicate(layer.bias, sharded=False)
        return layer

    def projection(self) -> ColumnProjection:
        return ColumnProjection(self._products, self.weight_gradients)

    def stacked(self, size: tuple[int, ...], divided: int) -> nn.Parameter:
        part = whole_parts(size[divided], size[divided], self._group.size, self._group.index)
        return self._stacked(size, divided, (part.first, part.last))

    def stream(self) -> ResidualStream:
        return self._stream

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        part = vocabulary_rows(rows, self._group.size, self._group.index)
        layer = VocabParallelEmbedding(part, width, self._stream)
        _annotate(layer.weight, (rows, width), 0, part)
        return layer

    def positions(self, rows: int, width: int) -> PositionEmbedding:
        held = PositionEmbedding(rows, width, self.sequence.parts * self.slices, self._cut)
        return self.replicated(held, sharded=False)

    def replicated(self, module: AnyModule, sharded: bool) -> AnyModule:
        for parameter in module.parameters():
            self._replicate(parameter, sharded)
        return module

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        return _divided((vocab_size, hidden_size), vocabulary_rows(vocab_size, self._group.size, self._group.index))

    def of_heads(self, heads: int) -> nn.Parameter:
        return _divided((heads,), whole_parts(heads, heads, self._group.size, self._group.index))

    def norm_over_heads(self, width: int, heads: int, epsilon: float, zero_centered: bool) -> RMSNorm:
        part = whole_parts(width, heads, self._group.size, self._group.index)
        return self.replicated(ShardedRMSNorm(width, part, epsilon, zero_centered, self._group), sharded=True)

    def output(self, vocab_size: int, softcap: float | None) -> VocabParallelOutput:
        return VocabParallelOutput(
            vocab_size, LogitRule(softcap, self.z_loss), self._stream, self.compiled, self.sequence
        )

    def place(self, layer: int, site: str, sharded: bool) -> str:
        place = super().place(layer, site, sharded)
        return f"{place}/tensor {self._group.index}" if sharded or self._stream.is_sequence_sharded else place

    def _cut(self, whole: Tensor) -> Tensor:
        """[..., T] -> the positions of the stream's slice."""
        held = self.sequence.cut(whole)
        return held.chunk(self.slices, dim=-1)[self._group.index] if self.slices > 1 else held

    def _replicate(self, parameter: nn.Parameter, sharded: bool) -> None:
        """Annotate a parameter as whole on every rank; where each does a part of the work, sum their gradients."""
        annotate_shard(parameter, ShardedAxis(tuple(parameter.shape), None, is_owner=self._group.index == 0))
        if sharded or self._stream.is_sequence_sharded:
            parameter.register_hook(self._sum_gradient)

    def _sum_gradient(self, gradient: Tensor) -> Tensor:
        total = collectives.sum_over(gradient.to(torch.float32, copy=True).contiguous(), self._group)
        return total.to(gradient.dtype)


class ShardedRMSNorm(RMSNorm):
    """An RMS norm over features [..., W] of which a rank holds `part`; the weight [W] is whole.

    Ranks that share a part, key/value heads, count it once each: in the mean square, and in its gradient.
    """

    def __init__(self, width: int, part: DimRange, epsilon: float, zero_centered: bool, group: AxisGroup) -> None:
        super().__init__(width, epsilon, zero_centered)
        self._part = part
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        count = self.weight.shape[0] * self._part.sharers
        # Each rank makes another use of the sum: its gradient is summed too.
        summed = partial(collectives.sum_of_copies, group=self._group)
        squares = collectives.linear(wide.square().sum(-1, keepdim=True), summed, summed)
        normed = wide * torch.rsqrt(squares / count + self.epsilon)
        return (normed * self.gain()[self._part.first : self._part.last].float()).to(x.dtype)


class RowLinear(nn.Module):
    """Columns `part` of a linear layer's weight [H, F]; its input is the output of column layers of this rank."""

    def __init__(
        self,
        part: DimRange,
        out_features: int,
        bias: bool,
        products: TensorProducts,
        gradients: WeightGradients | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, part.size))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._how = products, gradients

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, F] -> the stream [B, S, H]; the bias is added once, to the sum."""
        joined = _Row.apply(features, self.weight, *self._how)  # type: ignore[no-untyped-call]  # torch: untyped
        return joined if self.bias is None else joined + self.bias


class _Row(torch.autograd.Function):
    """The product of a row layer, summed over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, products: TensorProducts, later: WeightGradients | None
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.products, ctx.later = products, later
        if later is not None:
            ctx.weight = weight
        (result,) = products.row(features, weight)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        of_features, of_weight, _, _ = ctx.needs_input_grad
        compute = partial(ctx.products.row_backward, *ctx.saved_tensors, gradients[0])
        if ctx.later is None:
            needed = [of_features, of_weight]
            return *_needed(compute(needed), needed), None, None
        # A slice of the gradient is gathered twice: the whole would be kept for longer than any other activation.
        features_gradient, _ = _needed(compute([of_features, False]), [of_features, False])
        return features_gradient, *ctx.later.of([ctx.weight], lambda: compute([False, True])[1:]), None, None


def _divided(shape: tuple[int, ...], part: DimRange) -> nn.Parameter:
    """A parameter of a part of the whole's first dimension."""
    parameter = nn.Parameter(torch.empty(part.size, *shape[1:]))
    _annotate(parameter, shape, 0, part)
    return parameter


def _annotate(parameter: Tensor, shape: tuple[int, ...], dimension: int, part: DimRange) -> None:
    """Annotate a parameter with its part of one dimension of the whole `shape`."""
    rectangle: Rectangle | None = tuple(
        (part.first, part.last) if index == dimension else (0, size) for index, size in enumerate(shape)
    )
    if part.size == shape[dimension]:
        rectangle = None  # the only key/value head
    annotate_shard(parameter, ShardedAxis(shape, rectangle, is_owner=part.sharer == 0))
