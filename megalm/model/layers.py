"""The layer factory: the one seam between the model's maths and how its layers are split over ranks.

Modules never build `nn.Linear` or read a rank; they ask a `LayerFactory` for column, row and vocabulary layers,
for dropout and for the loss. `DenseLayers` gives the unsharded ones; a tensor-parallel factory in
`megalm.parallel` gives sharded ones that hold their group.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor, nn

from megalm.model.dropout import Dropout, DropoutClock
from megalm.model.loss import chunk_loss, linear_cross_entropy


class VocabularyLoss(Protocol):
    """Cross-entropy straight from hidden states: whole logits never exist at once."""

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        """[N, H], [V, H], [N] -> fp32 sum over the labels that are not IGNORE, a scalar."""
        ...


class LayerFactory(Protocol):
    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """A linear layer whose output features may be split over ranks."""
        ...

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """A linear layer whose input features may be split; its output is whole."""
        ...

    def embedding(self, rows: int, width: int) -> nn.Module:
        """A lookup table [rows, width] with a `weight`; its rows may be split."""
        ...

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        """The output projection of an untied head, split like `embedding`."""
        ...

    def loss(self) -> VocabularyLoss: ...

    def dropout(self, rate: float, layer: int, site: str, sharded: bool) -> nn.Module:
        """Dropout with a seed of its place; `sharded`: different on each tensor-parallel rank."""
        ...


class DenseLayers:
    """The unsharded layers of a one-rank model. Weights are left empty: `init.py` fills them by name.

    Args:
        compiled: the loss of a chunk runs compiled; its matrix products do not need it.
    """

    def __init__(self, clock: DropoutClock, compiled: bool = False) -> None:
        self.clock = clock
        self.compiled = compiled

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def embedding(self, rows: int, width: int) -> nn.Module:
        return nn.Embedding(rows, width)

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(vocab_size, hidden_size))

    def loss(self) -> VocabularyLoss:
        if not self.compiled:
            return linear_cross_entropy
        return functools.partial(linear_cross_entropy, chunk=torch.compile(chunk_loss, dynamic=False))

    def dropout(self, rate: float, layer: int, site: str, sharded: bool) -> nn.Module:
        return Dropout(rate, self.clock, place=f"{layer}/{site}")
