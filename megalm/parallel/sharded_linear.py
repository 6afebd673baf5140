"""Column and row layers' products and their communication, which run at the same time, in chunks of a micro-batch.

While one chunk is multiplied, the next one is gathered or the one before it is summed. A product writes straight into
its place in the result, so chunks cost no copy more than one message does; only the gradient of a row layer's output,
of which a chunk has a part of each rank's slice, is put together for the product that needs it whole.

Shapes: B batch, T sequence, S the part of T that the stream holds, R = T / S slices, H hidden, F features held here,
M rows of a product, b and s the samples and the positions of a chunk.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.model.float8 import Float8Products, Products
from megalm.parallel import collectives
from megalm.parallel.collectives import Finish, ReplicatedResidual, SequenceShardedResidual
from megalm.parallel.process_groups import AxisGroup

# A compiled graph calls the methods of `TensorProducts` as operators, so that it does not break at their communication.
# `torch.library.custom_op` would load the compiler. An operator takes plain values: a process group by its name.
_OPERATORS = torch.library.Library("megalm", "FRAGMENT")
_HOW = "str group, bool sequence, bool float8, int chunks"
# Takes `TensorProducts` first: a method, or what gives results of its shapes without their numbers.
Operation = Callable[..., list[Tensor]]


def _operator(arguments: str, shapes: Operation) -> Callable[[Operation], Operation]:
    """Make a method of `TensorProducts` an operator as well; `arguments`: its schema."""

    def decorate(method: Operation) -> Operation:
        name = f"tensor_{method.__name__}"

        def called(function: Operation) -> Operation:
            return lambda *arguments: function(_products_of(*arguments[-4:]), *arguments[:-4])

        _OPERATORS.define(f"{name}({arguments}, {_HOW}) -> Tensor[]")
        _OPERATORS.impl(name, called(method), "CompositeExplicitAutograd")
        torch.library.register_fake(f"megalm::{name}", called(shapes), lib=_OPERATORS)

        @functools.wraps(method)
        def method_or_operator(self: TensorProducts, *arguments: Any) -> list[Tensor]:
            if not torch.compiler.is_compiling():
                return method(self, *arguments)
            found: list[Tensor] = getattr(torch.ops.megalm, name)(*arguments, *self.how)
            return found

        return method_or_operator

    return decorate


def _products_of(name: str, sequence: bool, float8: bool, chunks: int) -> TensorProducts:
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]  # torch: untyped
    ranks = tuple(dist.get_process_group_ranks(group))
    return TensorProducts(AxisGroup(ranks, dist.get_rank(group), group), sequence, float8, chunks)


def _columns_shapes(
    products: TensorProducts, hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    batch, length, _ = hidden.shape
    return [hidden.new_empty(batch, length * products.stream.slices, len(weight)) for weight in weights]


def _columns_backward_shapes(
    products: TensorProducts,
    hidden: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sharers: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    biases = [weight.shape[:1] for weight in weights] if len(needed) > 1 + len(weights) else []
    return _needed_shapes(hidden, needed, [hidden.shape, *(weight.shape for weight in weights), *biases])


def _row_shapes(products: TensorProducts, features: Tensor, weight: Tensor) -> list[Tensor]:
    batch, length, _ = features.shape
    return [features.new_empty(batch, length // products.stream.slices, len(weight))]


def _row_backward_shapes(
    products: TensorProducts, features: Tensor, weight: Tensor, gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    return _needed_shapes(features, needed, [features.shape, weight.shape])


def _needed_shapes(like: Tensor, needed: Sequence[bool], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Gradients of these shapes; those that nobody needs, of frozen parameters and below them, have no elements."""
    return [like.new_empty(shape if is_needed else 0) for is_needed, shape in zip(needed, shapes, strict=True)]


class TensorProducts:
    """How a tensor group multiplies.

    Args:
        group: the ranks that share each layer.
        sequence: ranks divide the residual stream between the sharded layers along the sequence.
        float8: multiply in float8.
        chunks: the most chunks of a micro-batch; 1: communication and products take turns.

    Attributes:
        stream: the residual stream, which column layers read and row layers write.
        how: the arguments as plain values.
    """

    def __init__(self, group: AxisGroup, sequence: bool = False, float8: bool = False, chunks: int = 1) -> None:
        self.stream = SequenceShardedResidual(group) if sequence else ReplicatedResidual(group)
        self.how = group.process_group.group_name, sequence, float8, chunks
        self._kind = Float8Products if float8 else Products
        self._most_chunks = chunks

    @_operator("Tensor hidden, Tensor[] weights, Tensor[] biases", _columns_shapes)
    def columns(self, hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
        """[B, S, H] and layers [F, H] -> the output [B, T, F] of each; without biases there are none at all."""
        stream = self.stream
        chunks = self._chunks(hidden) if stream.is_sequence_sharded else [_ALL]
        begun = [stream.begin_whole(chunk.of(hidden)) for chunk in chunks]
        multiply = [self._kind.by(weight.t()) for weight in weights]
        addends: Sequence[Tensor | None] = biases or [None] * len(weights)
        results = _columns_shapes(self, hidden, weights, biases)
        for chunk in chunks:
            whole = begun.pop(0)()  # whose buffer nothing else holds
            for result, by, bias in zip(results, multiply, addends, strict=True):
                rows = chunk.rows(result, stream.slices)
                by(_as_rows(whole, rows), rows, bias)
        return results

    @_operator(
        "Tensor hidden, Tensor[] weights, Tensor[] gradients, int[] sharers, bool[] needed", _columns_backward_shapes
    )
    def columns_backward(
        self,
        hidden: Tensor,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        sharers: Sequence[int],
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """Gradients of the input, of the weights and of the biases, from those [B, T, F] of the outputs.

        The weights' gradients need the whole input, which is gathered again while the input's gradient is multiplied,
        and are multiplied while that is summed.

        Args:
            sharers: per layer the ranks that hold the same part.
            needed: of these gradients; in the place of the others stand tensors without elements.
        """
        stream = self.stream
        weights_needed, biases_needed = needed[1 : 1 + len(weights)], needed[1 + len(weights) :]
        # The gather of slices is under way until the last product: their sum cannot begin earlier.
        chunks = [_ALL] if stream.is_sequence_sharded else self._chunks(hidden)
        gathered = stream.begin_whole(hidden) if any(weights_needed) else None
        gradients = [gradient.contiguous() for gradient in gradients]
        multiply = [self._kind.by(weight) for weight in weights] if needed[0] else []
        result = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else hidden.new_empty(0)
        begun = []
        for chunk in chunks if needed[0] else ():
            part = chunk.of(result)
            addend = stream.addend_of(part)
            total = None
            for gradient, by in zip(gradients, multiply, strict=True):
                rows = chunk.rows(gradient, stream.slices)
                out = _as_rows(addend, rows)
                by(rows, out, total)
                total = out
            begun.append(stream.begin_sum(addend, part))
        rows_of = [gradient.flatten(0, 1) for gradient in gradients]
        none = hidden.new_empty(0)
        shared: list[Finish] = []
        if gathered is None:
            shared += [lambda: none] * len(weights)
        else:
            whole = gathered().flatten(0, 1)
            shared += [
                _begin_shared(self._kind.weight_gradient(rows, whole), count, stream.group) if it else lambda: none
                for rows, count, it in zip(rows_of, sharers, weights_needed, strict=True)
            ]
        shared += [
            _begin_shared(rows.sum(0), count, stream.group) if it else lambda: none
            for rows, count, it in zip(rows_of, sharers, biases_needed, strict=False)
        ]
        for finish in begun:
            finish()
        return [result, *(finish() for finish in shared)]

    @_operator("Tensor features, Tensor weight", _row_shapes)
    def row(self, features: Tensor, weight: Tensor) -> list[Tensor]:
        """[B, T, F] and a layer [H, F] -> the ranks' sum as the stream, [B, S, H], alone in a list."""
        stream = self.stream
        features = features.contiguous()
        (result,) = _row_shapes(self, features, weight)
        by = self._kind.by(weight.t())
        begun = []
        for chunk in self._chunks(result):
            part = chunk.of(result)
            addend = stream.addend_of(part)
            rows = chunk.rows(features, stream.slices)
            by(rows, _as_rows(addend, rows))
            begun.append(stream.begin_sum(addend, part))
        for finish in begun:
            finish()
        return [result]

    @_operator("Tensor features, Tensor weight, Tensor gradient, bool[] needed", _row_backward_shapes)
    def row_backward(self, features: Tensor, weight: Tensor, gradient: Tensor, needed: Sequence[bool]) -> list[Tensor]:
        """Gradients of the input and of the weight, from that [B, S, H] of the output; `needed` as above."""
        stream = self.stream
        chunks = self._chunks(gradient) if stream.is_sequence_sharded else [_ALL]
        begun = [stream.begin_whole(chunk.of(gradient)) for chunk in chunks]
        by = self._kind.by(weight)
        features = features.contiguous()
        result = torch.empty_like(features)
        whole = gradient.new_empty(*features.shape[:2], len(weight)) if len(chunks) > 1 else None
        for chunk in chunks:
            part = begun.pop(0)()
            rows = chunk.rows(result, stream.slices)
            if needed[0]:
                by(_as_rows(part, rows), rows)
            if whole is None:
                whole = part
            else:
                place = chunk.rows(whole, stream.slices)
                place.copy_(_as_rows(part, place))
        assert whole is not None
        none = features.new_empty(0)
        of_weight = self._kind.weight_gradient(whole.flatten(0, 1), features.flatten(0, 1)) if needed[1] else none
        return [result if needed[0] else none, of_weight]

    def _chunks(self, part: Tensor) -> list[Chunk]:
        """Divide the samples of a tensor [B, S, ...], or the positions of a single one."""
        batch, length, *_ = part.shape
        if batch > 1:
            return [Chunk(samples=piece) for piece in _pieces(batch, self._most_chunks)]
        return [Chunk(positions=piece) for piece in _pieces(length, self._most_chunks)]


_EVERY = slice(None)


class Chunk(NamedTuple):
    """Some samples of a micro-batch, or, of a single one, some positions of each rank's slice."""

    samples: slice = _EVERY
    positions: slice = _EVERY

    def of(self, part: Tensor) -> Tensor:
        """[B, S, C] -> [b, s, C], contiguous."""
        return part[self.samples, self.positions].contiguous()

    def rows(self, whole: Tensor, slices: int) -> Tensor:
        """[B, T, C] -> a view, [M, C], or [R, s, C] where there are other positions between those of two slices."""
        samples = whole[self.samples]
        if slices == 1 or self.positions == _EVERY:
            return samples[:, self.positions].flatten(0, 1)
        return samples.view(slices, -1, whole.shape[2])[:, self.positions]


_ALL = Chunk()


def _pieces(size: int, count: int) -> list[slice]:
    """Divide `size` elements into at most `count` pieces, of which no two differ by more than one element."""
    count = min(size, count)
    ends = [size * index // count for index in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(ends)]


def _as_rows(chunk: Tensor, rows: Tensor) -> Tensor:
    """[b, R * s, C] -> a view of it in the form of `Chunk.rows`."""
    return chunk.view(*rows.shape[:-1], chunk.shape[-1])


def _begin_shared(gradient: Tensor, sharers: int, group: AxisGroup) -> Finish:
    """Start the gradient of a parameter held here, to which each sharer of its part contributes an addend."""
    if sharers == 1:
        return lambda: gradient
    # A buffer of all the group's parts needs no further process group; shared parts are few and small.
    place = group.index // sharers
    buffer = gradient.new_zeros((group.size // sharers, *gradient.shape), dtype=torch.float32)
    buffer[place] = gradient
    total = collectives.begin_sum(buffer, group)
    return lambda: total()[place].to(gradient.dtype)
