"""The layer factory: the one seam between the model's maths and how its layers are split over ranks.

Modules never build `nn.Linear` or read a rank; they ask a `LayerFactory` for column, row and vocabulary layers,
for dropout and for the loss. `DenseLayers` gives the unsharded ones; a tensor-parallel factory in
`megalm.parallel` gives sharded ones that hold their group.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from megalm.model.loss import ChunkLoss, chunk_loss, linear_cross_entropy
from megalm.model.modules import Dropout, DropoutClock, PositionEmbedding

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Projection(Protocol):
    """Column layers of one input together, so that what passes between ranks for their sake passes once."""

    def __call__(self, hidden: Tensor, *columns: nn.Linear) -> tuple[Tensor, ...]:
        """[B, T, H] of the residual stream -> [B, T, out features held here] of each layer."""
        ...


class VocabularyOutput(Protocol):
    """From the last hidden states to logits or to the loss, with the vocabulary's weight."""

    def whole(self, hidden: Tensor) -> Tensor:
        """The residual stream, of which a rank may hold a slice, as [B, T, H]; what `loss` and `logits` take."""
        ...

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        """[N, H], [V, H], [N] -> fp32 sum over the labels that are not IGNORE; whole logits never exist at once."""
        ...

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., H], [V, H] -> [..., V]."""
        ...


class LayerFactory(Protocol):
    slices: int  # the residual stream lies on so many ranks: its sequence length divides by it

    def column(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Linear:
        """A linear layer whose output features may be split over ranks, between its equal `parts` (heads) only."""
        ...

    def row(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Module:
        """A linear layer whose input features may be split between its `parts`; its output is whole."""
        ...

    def projection(self) -> Projection: ...

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        """A lookup table [rows, width]; its rows may be split."""
        ...

    def positions(self, rows: int, width: int) -> PositionEmbedding: ...

    def replicated(self, module: AnyModule, sharded: bool) -> AnyModule:
        """`module`, whose parameters are whole on every rank; `sharded`: it sees only this rank's heads."""
        ...

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        """The output projection of an untied head, split like `embedding`."""
        ...

    def output(self, vocab_size: int) -> VocabularyOutput: ...

    def place(self, layer: int, site: str, sharded: bool) -> str:
        """The name that a dropout's seed comes from; `sharded`: different on each tensor-parallel rank."""
        ...

    def dropout(self, rate: float, layer: int, site: str, sharded: bool) -> nn.Module:
        """Dropout with a seed of its `place`."""
        ...


class DenseLayers:
    """The unsharded layers of a one-rank model. Weights are left empty: `initialize` fills them by name.

    Args:
        compiled: the loss of a chunk runs compiled; its matrix products do not need it.
    """

    def __init__(self, clock: DropoutClock, compiled: bool = False) -> None:
        self.slices = 1
        self.clock = clock
        self.compiled = compiled

    def column(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=bias)

    def row(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Module:
        return nn.Linear(in_features, out_features, bias=bias)

    def projection(self) -> Projection:
        return _each

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        return nn.Embedding(rows, width)

    def positions(self, rows: int, width: int) -> PositionEmbedding:
        return PositionEmbedding(rows, width)

    def replicated(self, module: AnyModule, sharded: bool) -> AnyModule:
        return module

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(vocab_size, hidden_size))

    def output(self, vocab_size: int) -> VocabularyOutput:
        return DenseOutput(torch.compile(chunk_loss, dynamic=False) if self.compiled else chunk_loss)

    def place(self, layer: int, site: str, sharded: bool) -> str:
        return f"{layer}/{site}"

    def dropout(self, rate: float, layer: int, site: str, sharded: bool) -> nn.Module:
        return Dropout(rate, self.clock, self.place(layer, site, sharded))


class DenseOutput:
    """The output of a one-rank model."""

    def __init__(self, chunk: ChunkLoss = chunk_loss) -> None:
        self.chunk = chunk

    def whole(self, hidden: Tensor) -> Tensor:
        return hidden

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens, self.chunk)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden @ weight.t()


def _each(hidden: Tensor, *columns: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(column(hidden) for column in columns)
