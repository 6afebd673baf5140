"""Normalisation over the last dimension. Statistics are taken in fp32 whatever the weights' type."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.shape import ModelShape


class RMSNorm(nn.Module):
    """x / rms(x) * weight, without a mean and without a bias (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:  # [..., size] -> [..., size]
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def norm(shape: ModelShape) -> nn.Module:
    """The norm of a style: LayerNorm with bias for gpt2, RMSNorm for llama."""
    if shape.style == "gpt2":
        return nn.LayerNorm(shape.hidden_size, eps=shape.norm_epsilon)
    return RMSNorm(shape.hidden_size, shape.norm_epsilon)
