"""Learned position embeddings, which start again with each document under a mask. Shapes: B batch, T sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PositionEmbedding(nn.Embedding):
    """A table [max positions, H], looked up by position and not by token."""

    def forward(self, length: int, documents: Tensor | None) -> Tensor:  # type: ignore[override]
        """Embeddings [T, H] of positions 0..T-1, or [B, T, H] counted in each of `documents` [B, T]."""
        return super().forward(position_ids(length, documents, self.weight.device))


def position_ids(length: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Positions [T], or [B, T] counted from the start of each document."""
    steps = torch.arange(length, device=device)
    if documents is None:
        return steps
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(dim=1).values
