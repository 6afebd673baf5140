"""Rotary position embeddings (Su et al., 2021), in the half-split layout of Hugging Face's Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotates pairs (i, i + D/2) of each head by angles position x theta^(-2i/D).

    The tables are shared by all layers and are not parameters: they are in no state dict.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(max_positions, dtype=torch.float64).unsqueeze(1) * frequencies  # [P, D/2]
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """[B, T, N, D] -> the same, rotated by its position in T, which counts from `start`."""
        end = start + x.shape[1]
        cosine = self.cosine[start:end].to(x.dtype).unsqueeze(1)  # [T, 1, D/2]
        sine = self.sine[start:end].to(x.dtype).unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
