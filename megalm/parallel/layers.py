"""The tensor-parallel layer factory: the model's layers with their weights divided over the ranks of a group.

Column layers hold a part of the output features (whole heads), row layers a part of the input features, so a block
talks twice: its attention and its MLP each take the whole stream and give addends of it. Shapes: B batch, T sequence,
S the part of T that the stream holds, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.dropout import DropoutClock
from megalm.model.layers import AnyModule, DenseLayers
from megalm.model.positions import PositionEmbedding, position_ids
from megalm.model.shard import Rectangle, Shard, mark
from megalm.model.uncompiled import uncompiled
from megalm.parallel import collectives, partition
from megalm.parallel.columns import ColumnLinear, ColumnProjection
from megalm.parallel.groups import AxisGroup
from megalm.parallel.partition import Part
from megalm.parallel.stream import SlicedStream, Stream, WholeStream
from megalm.parallel.vocabulary import VocabularyEmbedding, VocabularyOutput


class TensorLayers(DenseLayers):
    """Sharded layers that hold their group. Weights are left empty: `initialise` cuts them from whole ones.

    Args:
        group: the ranks that share each layer.
        sequence: the residual stream is divided along the sequence between the sharded layers.
        compiled: the element-wise work of the loss runs compiled.
    """

    def __init__(self, clock: DropoutClock, group: AxisGroup, sequence: bool = False, compiled: bool = False) -> None:
        super().__init__(clock, compiled)
        self._group = group
        self.slices = group.size if sequence else 1
        self._stream: Stream = SlicedStream(group) if sequence else WholeStream(group)

    def column(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Linear:
        part = partition.whole_parts(out_features, parts, self._group.size, self._group.index)
        layer = ColumnLinear(in_features, part, bias)
        _mark(layer.weight, (out_features, in_features), 0, part)
        if bias:
            _mark(layer.bias, (out_features,), 0, part)
        return layer

    def row(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Module:
        part = partition.whole_parts(in_features, parts, self._group.size, self._group.index)
        layer = RowLinear(part, out_features, bias, self._stream)
        _mark(layer.weight, (out_features, in_features), 1, part)
        if bias:
            assert layer.bias is not None
            self._replicate(layer.bias, sharded=False)
        return layer

    def projection(self) -> ColumnProjection:
        return ColumnProjection(self._stream)

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        part = partition.rows(rows, self._group.size, self._group.index)
        layer = VocabularyEmbedding(part, width, self._stream)
        _mark(layer.weight, (rows, width), 0, part)
        return layer

    def positions(self, rows: int, width: int) -> PositionEmbedding:
        table = SlicedPositions(rows, width, self._group) if self._stream.in_slices else PositionEmbedding(rows, width)
        return self.replicated(table, sharded=False)

    def replicated(self, module: AnyModule, sharded: bool) -> AnyModule:
        for parameter in module.parameters():
            self._replicate(parameter, sharded)
        return module

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        part = partition.rows(vocab_size, self._group.size, self._group.index)
        weight = nn.Parameter(torch.empty(part.size, hidden_size))
        _mark(weight, (vocab_size, hidden_size), 0, part)
        return weight

    def output(self, vocab_size: int) -> VocabularyOutput:
        return VocabularyOutput(vocab_size, self._stream, self.compiled)

    def place(self, layer: int, site: str, sharded: bool) -> str:
        place = super().place(layer, site, sharded)
        return f"{place}/tensor {self._group.index}" if sharded or self._stream.in_slices else place

    def _replicate(self, parameter: nn.Parameter, sharded: bool) -> None:
        """Whole on every rank. Where each rank has used it for a part of the work, its gradient is their sum."""
        mark(parameter, Shard(tuple(parameter.shape), None, is_owner=self._group.index == 0))
        if sharded or self._stream.in_slices:
            parameter.register_hook(self._sum_gradient)

    def _sum_gradient(self, gradient: Tensor) -> Tensor:
        total = collectives.sum_over(gradient.to(torch.float32, copy=True).contiguous(), self._group)
        return total.to(gradient.dtype)


class RowLinear(nn.Module):
    """The columns of a linear layer's weight [H, F] that `part` says; takes what column layers gave here."""

    def __init__(self, part: Part, out_features: int, bias: bool, stream: Stream) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, part.size))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._stream = stream

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, F] -> the stream [B, S, H]; the bias is added once, to the sum."""
        joined = self._join(functional.linear(features, self.weight))
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
        """Of `length` positions, S, of the slice; `documents` [B, T] are whole."""
        ids = position_ids(length * self._group.size, documents, self.weight.device)
        first = self._group.index * length
        return functional.embedding(ids[..., first : first + length], self.weight)


def _mark(parameter: Tensor, shape: tuple[int, ...], dimension: int, part: Part) -> None:
    rectangle: Rectangle | None = tuple(
        (part.first, part.last) if index == dimension else (0, size) for index, size in enumerate(shape)
    )
    if part.size == shape[dimension]:
        rectangle = None  # the only key/value head
    mark(parameter, Shard(shape, rectangle, is_owner=part.sharer == 0))
