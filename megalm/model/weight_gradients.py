"""Gradients of weights apart from the rest of a backward pass: a zero-bubble pipeline fills gaps with them.

The weights of linear layers and of experts wait: their gradients take about as long as those of the inputs, which the
stage before needs. What is small, as of norms, biases and embeddings, comes with the backward pass, and so does that of
the head's weight, which is there since the forward pass (loss.py).

Shapes: M rows, H in features, F out features, L experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalm.model.float8 import Products

# The gradient of each of some weights; None for a frozen one.
ComputeGradients = Callable[[], Sequence[Tensor | None]]


class WeightGradients:
    """Asked by backward passes whether to compute the gradients of weights."""

    def __init__(self) -> None:
        self._later: deque[Callable[[], None]] | None = None

    @contextmanager
    def put_off(self) -> Iterator[deque[Callable[[], None]]]:
        """Within, backward passes compute no gradients of these weights, but add what does so later."""
        self._later = later = deque[Callable[[], None]]()
        try:
            yield later
        finally:
            self._later = None

    def of(self, weights: Sequence[Tensor], compute: ComputeGradients) -> Sequence[Tensor | None]:
        """`compute()`, or None for each weight: they are put off, or all frozen."""
        if not any(weight.requires_grad for weight in weights):
            return [None] * len(weights)
        if self._later is None:
            return compute()
        self._later.append(partial(_add_gradients, weights, compute))
        return [None] * len(weights)


def _add_gradients(weights: Sequence[Tensor], compute: ComputeGradients) -> None:
    """A backward pass of its own, so that gradients are added up, and hooks run, as in any."""
    _Root.apply(compute, *weights).backward()  # type: ignore[no-untyped-call]  # torch: untyped


class _Root(Function):
    """The end of a graph of nothing but some weights."""

    @staticmethod
    def forward(ctx: Any, compute: ComputeGradients, *weights: Tensor) -> Tensor:
        ctx.compute = compute
        return weights[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return None, *ctx.compute()


class SplitLinear(nn.Linear):
    """A linear layer the gradient of whose weight may be put off.

    Args:
        products: how it multiplies.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, products: type[Products], gradients: WeightGradients
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._how = products, gradients

    def forward(self, x: Tensor) -> Tensor:
        return _SplitLinear.apply(x, self.weight, self.bias, *self._how)  # type: ignore[no-untyped-call]  # torch: untyped


class _SplitLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, products: type[Products], gradients: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # The parameter itself: a recomputation gives what is saved without it.
        ctx.weight, ctx.products, ctx.gradients = weight, products, gradients
        result = x.new_empty(*x.shape[:-1], len(weight))
        products.by(weight.t())(x.flatten(0, -2), result.flatten(0, -2), bias)
        return result

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = outer[0].flatten(0, -2), x.flatten(0, -2)  # [M, F], [M, H]
        of_x, _, of_bias, *_ = ctx.needs_input_grad
        products: type[Products] = ctx.products
        result = None
        if of_x:
            result = x.new_empty(x.shape)
            products.by(weight)(rows, result.flatten(0, -2))
        (of_weight,) = ctx.gradients.of([ctx.weight], lambda: [products.weight_gradient(rows, inputs)])
        return result, of_weight, rows.sum(0) if of_bias else None, None, None


class SplitGroupedProduct(Function):
    """`functional.grouped_mm` with matrices whose gradient may be put off."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, ends: Tensor, gradients: WeightGradients) -> Tensor:
        """[M, H], [L, F, H], [L] -> [M, F]: rows up to the first of `ends` by the first matrix, and so on."""
        ctx.save_for_backward(rows, matrices, ends)
        ctx.matrices, ctx.gradients = matrices, gradients
        return functional.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrices, ends = ctx.saved_tensors
        gradient = outer[0].contiguous()
        of_rows = functional.grouped_mm(gradient, matrices, offs=ends) if ctx.needs_input_grad[0] else None
        (of_matrices,) = ctx.gradients.of(
            [ctx.matrices], lambda: [functional.grouped_mm(gradient.t(), rows, offs=ends)]
        )
        return of_rows, of_matrices, None, None
