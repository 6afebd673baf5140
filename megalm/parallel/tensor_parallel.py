"""The tensor-parallel layer factory: the model's layers with their weights divided over the ranks of a group.

Column layers hold a part of the output features (whole heads), row layers a part of the input features. So a block
communicates twice: its attention and its MLP each read the whole residual stream and produce addends of it.

Shapes: B batch, T sequence, S the part of T that the stream holds, N = B x T, H hidden, F output features of a layer
held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.float8 import Products
from megalm.model.layer_factory import AnyModule, LayerFactory, Rectangle, ShardedAxis, annotate_shard
from megalm.model.modules import DropoutClock, PositionEmbedding, position_ids, uncompiled
from megalm.parallel import collectives
from megalm.parallel.collectives import Finish, ReplicatedResidual, SequenceShardedResidual
from megalm.parallel.process_groups import AxisGroup
from megalm.parallel.vocab_parallel import VocabParallelEmbedding, VocabParallelOutput
from megalm.topology import DimRange, vocabulary_rows, whole_parts


class ColumnLinear(nn.Linear):
    """Rows `part` of a linear layer's weight [F, H]; a `ColumnProjection` applies it."""

    def __init__(self, in_features: int, part: DimRange, bias: bool) -> None:
        super().__init__(in_features, part.size, bias=bias)
        self.part = part


class ColumnProjection:
    """Applies column layers to the residual stream, together: only their common input and its gradient communicate."""

    def __init__(self, stream: ReplicatedResidual, products: type[Products]) -> None:
        self._stream = stream
        self._products = products

    @uncompiled
    def __call__(self, hidden: Tensor, *columns: nn.Linear) -> tuple[Tensor, ...]:
        assert all(isinstance(column, ColumnLinear) for column in columns)
        parts = [column.part for column in columns]
        weights, biases = [column.weight for column in columns], [column.bias for column in columns]
        return _Columns.apply(hidden, self._stream, self._products, parts, *weights, *biases)  # type: ignore[no-untyped-call]  # torch: untyped


class _Columns(torch.autograd.Function):
    """One function for all layers, so that the gradient of their input is summed over the ranks once.

    The backward pass keeps the input as the stream holds it, a slice under sequence parallelism, and computes the
    weights' gradients while the input's gradient communicates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        stream: ReplicatedResidual,
        products: type[Products],
        parts: Sequence[DimRange],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(parts)], parameters[len(parts) :]
        ctx.save_for_backward(hidden, *weights)
        ctx.stream, ctx.products, ctx.parts = stream, products, parts
        whole = stream.begin_whole(hidden)()
        return tuple(products.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        hidden, *weights = ctx.saved_tensors
        stream: ReplicatedResidual = ctx.stream
        products: type[Products] = ctx.products
        whole = stream.begin_whole(hidden)
        rows = [gradient.flatten(0, 1) for gradient in gradients]  # [N, F]
        addend = None
        for row, weight in zip(rows, weights, strict=True):
            addend = products.add_input_gradient(addend, row, weight)
        assert addend is not None
        input_gradient = stream.begin_gradient(addend.view(*gradients[0].shape[:2], -1))
        whole_rows = whole().flatten(0, 1)  # [N, H]
        begun = [
            _begin_shared(products.weight_gradient(row, whole_rows), part, stream.group)
            for row, part in zip(rows, ctx.parts, strict=True)
        ] + [
            _begin_shared(row.sum(0), part, stream.group) if ctx.needs_input_grad[place] else _nothing
            for place, (row, part) in enumerate(zip(rows, ctx.parts, strict=True), start=4 + len(weights))
        ]
        return input_gradient(), None, None, None, *(finish() for finish in begun)


def _begin_shared(gradient: Tensor, part: DimRange, group: AxisGroup) -> Finish:
    """Start the gradient of a parameter held here, to which each sharer of its part contributes an addend."""
    if part.sharers == 1:
        return lambda: gradient
    # A buffer of all the group's parts needs no further process group; shared parts are few and small.
    place = group.index // part.sharers
    buffer = gradient.new_zeros((group.size // part.sharers, *gradient.shape), dtype=torch.float32)
    buffer[place] = gradient
    total = collectives.begin_sum(buffer, group)
    return lambda: total()[place].to(gradient.dtype)


def _nothing() -> None:
    """The gradient of a missing bias."""


class TensorLayers(LayerFactory):
    """Sharded layers that hold their group. Weights are left empty: `initialize` cuts them from whole ones.

    Args:
        group: the ranks that share each layer.
        sequence: ranks divide the residual stream between the sharded layers along the sequence.
        compiled: the element-wise work of the loss runs compiled.
        float8: column and row layers multiply in float8.
    """

    def __init__(
        self,
        clock: DropoutClock,
        group: AxisGroup,
        sequence: bool = False,
        compiled: bool = False,
        float8: bool = False,
    ) -> None:
        super().__init__(clock, compiled, float8)
        self._group = group
        self.slices = group.size if sequence else 1
        self._stream = SequenceShardedResidual(group) if sequence else ReplicatedResidual(group)

    def column(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Linear:
        part = whole_parts(out_features, parts, self._group.size, self._group.index)
        layer = ColumnLinear(in_features, part, bias)
        _annotate(layer.weight, (out_features, in_features), 0, part)
        if bias:
            _annotate(layer.bias, (out_features,), 0, part)
        return layer

    def row(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Module:
        part = whole_parts(in_features, parts, self._group.size, self._group.index)
        layer = RowLinear(part, out_features, bias, self._stream, self.products)
        _annotate(layer.weight, (out_features, in_features), 1, part)
        if bias:
            assert layer.bias is not None
            self._replicate(layer.bias, sharded=False)
        return layer

    def projection(self) -> ColumnProjection:
        return ColumnProjection(self._stream, self.products)

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        part = vocabulary_rows(rows, self._group.size, self._group.index)
        layer = VocabParallelEmbedding(part, width, self._stream)
        _annotate(layer.weight, (rows, width), 0, part)
        return layer

    def positions(self, rows: int, width: int) -> PositionEmbedding:
        sharded = self._stream.is_sequence_sharded
        table = SlicedPositions(rows, width, self._group) if sharded else PositionEmbedding(rows, width)
        return self.replicated(table, sharded=False)

    def replicated(self, module: AnyModule, sharded: bool) -> AnyModule:
        for parameter in module.parameters():
            self._replicate(parameter, sharded)
        return module

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        part = vocabulary_rows(vocab_size, self._group.size, self._group.index)
        weight = nn.Parameter(torch.empty(part.size, hidden_size))
        _annotate(weight, (vocab_size, hidden_size), 0, part)
        return weight

    def output(self, vocab_size: int) -> VocabParallelOutput:
        return VocabParallelOutput(vocab_size, self._stream, self.compiled)

    def place(self, layer: int, site: str, sharded: bool) -> str:
        place = super().place(layer, site, sharded)
        return f"{place}/tensor {self._group.index}" if sharded or self._stream.is_sequence_sharded else place

    def _replicate(self, parameter: nn.Parameter, sharded: bool) -> None:
        """Annotate a parameter as whole on every rank; where each does a part of the work, sum their gradients."""
        annotate_shard(parameter, ShardedAxis(tuple(parameter.shape), None, is_owner=self._group.index == 0))
        if sharded or self._stream.is_sequence_sharded:
            parameter.register_hook(self._sum_gradient)

    def _sum_gradient(self, gradient: Tensor) -> Tensor:
        total = collectives.sum_over(gradient.to(torch.float32, copy=True).contiguous(), self._group)
        return total.to(gradient.dtype)


class RowLinear(nn.Module):
    """Columns `part` of a linear layer's weight [H, F]; its input is the output of column layers of this rank."""

    def __init__(
        self, part: DimRange, out_features: int, bias: bool, stream: ReplicatedResidual, products: type[Products]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, part.size))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._stream = stream
        self._products = products

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, F] -> the stream [B, S, H]; the bias is added once, to the sum."""
        joined = self._join(self._products.linear(features, self.weight))
        return joined if self.bias is None else joined + self.bias

    @uncompiled
    def _join(self, addend: Tensor) -> Tensor:
        return self._stream.join(addend)


class SlicedPositions(PositionEmbedding):
    """Position embeddings of this rank's slice of the sequence."""

    def __init__(self, rows: int, width: int, group: AxisGroup) -> None:
        super().__init__(rows, width)
        self._group = group

    def forward(self, length: int, documents: Tensor | None) -> Tensor:  # type: ignore[override]
        """Embeddings of the slice's `length` positions, S; `documents` is whole, [B, T]."""
        ids = position_ids(length * self._group.size, documents, self.weight.device)
        first = self._group.index * length
        return functional.embedding(ids[..., first : first + length], self.weight)


def _annotate(parameter: Tensor, shape: tuple[int, ...], dimension: int, part: DimRange) -> None:
    """Annotate a parameter with its part of one dimension of the whole `shape`."""
    rectangle: Rectangle | None = tuple(
        (part.first, part.last) if index == dimension else (0, size) for index, size in enumerate(shape)
    )
    if part.size == shape[dimension]:
        rectangle = None  # the only key/value head
    annotate_shard(parameter, ShardedAxis(shape, rectangle, is_owner=part.sharer == 0))
