"""Matrix products in float8, with a scale for each row of both factors (torchao's rowwise recipe).

Each row of a factor, along the dimension that the product sums over, is divided by its largest value and rounded to
e4m3: 4 bits of exponent and 3 of mantissa. The forward product and both products of the backward pass are such;
weights, their gradients and everything between the layers stay in the model's type. A row is scaled by what a rank
holds of it: where a tensor group divides the summed dimension, each rank scales its own part, which is no coarser.

Shapes: M and N rows, C the summed dimension, H in features, F out features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max  # 448
_SMALLEST_SCALED = 1e-12  # rows below it, all zeros among them, keep zeros


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, C] -> its rows divided by their scales, in float8, and the fp32 scales [M, 1]; NaN and infinity give NaN."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST_SCALED) / _LARGEST
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3).contiguous(), scale


@functools.cache
def _compiled_quantize() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`quantize` in two passes over `x`; uncompiled it takes seven, which cost more than float8 saves."""
    return torch.compile(quantize, dynamic=True)


# A factor's rows in float8 and their scales.
Rounded = tuple[Tensor, Tensor]


def _rounded(factor: Tensor) -> Rounded:
    if factor.device.type == "cpu" or torch.compiler.is_compiling():
        return quantize(factor)
    return _compiled_quantize()(factor)


def _product(left: Rounded, right: Rounded, dtype: torch.dtype) -> Tensor:
    (a, a_scale), (b, b_scale) = left, right
    if a.device.type == "cpu":
        return ((a.float() @ b.float().t()) * a_scale * b_scale.t()).to(dtype)
    return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=dtype, use_fast_accum=True)


def float8_product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, C] times the transpose of right [N, C], summed in fp32 -> [M, N] in the factors' type.

    A CPU multiplies the same float8 values in fp32.
    """
    return _product(_rounded(left), _rounded(right), left.dtype)


class _Float8Linear(torch.autograd.Function):
    """`functional.linear` by three products in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = float8_product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return result if bias is None else result + bias

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = outer[0].flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            float8_product(rows, weight.t()).view(x.shape) if of_x else None,
            Float8Products.weight_gradient(rows, x.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in float8."""

    def forward(self, x: Tensor) -> Tensor:
        return _Float8Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch: untyped


class MultiplyRows(Protocol):
    """Writes the product of rows [M, C], or of each of some matrices of rows [R, M, C], into `out`, [..., M, N].

    `add` is added: a bias, or what `out` holds.
    """

    def __call__(self, rows: Tensor, out: Tensor, add: Tensor | None = None) -> None: ...


class Products:
    """The matrix products of linear layers that communicate, without gradients, in the model's own type."""

    @staticmethod
    def by(right: Tensor) -> MultiplyRows:
        """Products of rows with one factor, [C, N]."""

        def multiply(rows: Tensor, out: Tensor, add: Tensor | None = None) -> None:
            if rows.ndim == 2:
                torch.mm(rows, right, out=out) if add is None else torch.addmm(add, rows, right, out=out)
                return
            each = right.expand(len(rows), *right.shape)
            torch.bmm(rows, each, out=out) if add is None else torch.baddbmm(add, rows, each, out=out)

        return multiply

    @staticmethod
    def weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
        """Gradients [M, F] of the output and the input [M, H] -> [F, H]."""
        return rows.t() @ x


class Float8Products(Products):
    """The same in float8."""

    @staticmethod
    def by(right: Tensor) -> MultiplyRows:
        factor = _rounded(right.t())

        def multiply(rows: Tensor, out: Tensor, add: Tensor | None = None) -> None:
            product = _product(_rounded(rows.flatten(0, -2)), factor, rows.dtype).view(out.shape)
            if add is None:
                out.copy_(product)
            else:
                torch.add(product, add, out=out)

        return multiply

    @staticmethod
    def weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
        return float8_product(rows.t(), x.t())
