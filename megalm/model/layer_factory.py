"""The layer factory: the one interface between the model's maths and the division of its layers over ranks.

Modules never build `nn.Linear` or read a rank. They ask a `LayerFactory` for column, row and vocabulary layers, for
dropout and for the loss. `LayerFactory` builds the unsharded layers; its subclass in `megalm.parallel` builds sharded
ones that hold their group, and annotates each parameter with the part that it is of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from megalm.model.float8 import Float8Linear, Float8Products, Products
from megalm.model.loss import LogitRule, chunk_loss, linear_cross_entropy
from megalm.model.modules import Dropout, DropoutClock, PositionEmbedding, RMSNorm
from megalm.model.weight_gradients import SplitLinear, WeightGradients

if TYPE_CHECKING:
    from megalm.model.attention_kernels import AttentionMask, ScoreRule

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Rectangle = tuple[tuple[int, int], ...]
# The residual stream [B, T, H] and column layers that all read it -> [B, T, out features held here] of each layer. One
# call, so that the communication that they need happens once.
Projection = Callable[..., tuple[Tensor, ...]]


class AttentionInputs(NamedTuple):
    """What attention reads, of some heads.

    Attributes:
        query: [B, N, T, D].
        key, value: [B, K, T, D].
        mask: of whole sequences.
        sinks: [N] scores of no token, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask | None
    sinks: Tensor | None


Attend = Callable[[AttentionInputs], Tensor]  # -> [B, N, T, D]


class WholeSequence:
    """How a rank holds a sample's sequence outside attention: all of it; `megalm.parallel.context_parallel` divides it.

    Shapes: T whole sequence, C = T / parts positions held here, N heads, K key/value heads, D head dimension.

    Attributes:
        parts: ranks that divide a sequence.
        multiple: divides the length of a sequence.
        suffix: of the names that dropout's seeds are derived from: each part has masks of its own.
    """

    parts = 1
    multiple = 1
    suffix = ""

    def cut(self, whole: Tensor) -> Tensor:
        """[..., T] -> [..., C], the positions held here."""
        return whole

    def positions(self, length: int, device: torch.device) -> slice | Tensor:
        """Which positions of the whole sequence are the `length` held here, C."""
        return slice(0, length)

    def attend(self, attention: Attend, inputs: AttentionInputs, rule: ScoreRule) -> Tensor:
        """Attention [B, N, C, D] of queries [B, N, C, D] and keys and values [B, K, C, D] of positions held here.

        Args:
            attention: of some heads over whole sequences, by `rule`.
        """
        return attention(inputs)

    def total(self, addends: Tensor) -> Tensor:
        """The sum of what ranks have of the parts of the same sequences; without a gradient."""
        return addends

    def running_totals(self, addends: Tensor) -> Tensor:
        """[B, C, ...] -> the sums of a whole sequence's addends up to each position held here; without a gradient."""
        return addends.cumsum(1)

    def rows(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[B, C, H] -> [B, H], each sample's row of one of the T `positions` [B], on every rank; without a gradient."""
        return hidden[torch.arange(len(positions), device=hidden.device), positions]


WHOLE_SEQUENCE = WholeSequence()


class AllExperts:
    """Which experts of a layer a rank holds: all of them; `megalm.parallel.expert_parallel` divides them.

    Shapes: E experts of a layer, L held here, R rows of this rank's tokens, A rows for experts held here.
    """

    def held(self, experts: int) -> tuple[int, int]:
        """[first, last) of the `experts` of a layer that are held here, L."""
        return 0, experts

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The rows for experts held here, and the way back.

        Args:
            rows: [R, H], sorted by expert.
            counts: [E] of them.

        Returns:
            Rows [A, H] sorted by expert held here, [L] of them, and what returns outputs [A, H] of these experts as
            [R, H] in the order of `rows`.
        """
        return rows, counts, lambda outputs: outputs


ALL_EXPERTS = AllExperts()


class VocabularyOutput:
    """From the last hidden states to logits or to the loss, with the vocabulary's weight.

    Args:
        rule: what becomes of the products with the weight.
        compiled: the loss of a chunk runs compiled; its matrix products do not need it.
        sequence: how ranks hold a sample's sequence.

    Attributes:
        observe: takes the losses [N] of each token, 0 where there is no target.
    """

    def __init__(self, rule: LogitRule, compiled: bool = False, sequence: WholeSequence = WHOLE_SEQUENCE) -> None:
        chunk = partial(chunk_loss, rule=rule)
        self.rule = rule
        self.chunk = torch.compile(chunk, dynamic=False) if compiled else chunk
        self.sequence = sequence
        self.observe: Callable[[Tensor], None] | None = None

    def whole(self, hidden: Tensor) -> Tensor:
        """The residual stream, of which a rank may hold a slice, as [B, T, H], which `loss` and `logits` take."""
        return hidden

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        """[N, H], [V, H], [N] -> fp32 sum over the labels that are not IGNORE; whole logits never exist at once."""
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens, self.chunk, self.observe)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., H], [V, H] -> [..., V]."""
        return self.rule.capped(hidden @ weight.t())


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of what training minimises of routers beside the loss: `balance_losses` and `z_losses` of moe.py."""

    balance: float = 0.0
    z: float = 0.0


class ResidualStream:
    """How the `ranks` that share a layer hold the residual stream [B, S, H]: one rank alone, all of it."""

    ranks = 1

    def whole(self, hidden: Tensor) -> Tensor:
        """The stream as [B, T, H], of which each rank makes a part of the use."""
        return hidden

    def join(self, addend: Tensor) -> Tensor:
        """The sum of the ranks' addends [B, T, H], as the stream."""
        return addend


class LayerFactory:
    """The unsharded layers of a one-rank model. Weights are left empty: `initialize` fills them by name.

    Args:
        compiled: the loss of a chunk runs compiled.
        float8: column and row layers multiply in float8; embedding and head do not.
        z_loss: coefficient of the loss's penalty.
        sequence: how ranks hold a sample's sequence outside attention.

    Attributes:
        slices: number of slices of the residual stream's sequence, which must divide its length.
        router_losses: of layers with experts.
        experts: which experts of a layer are held here.
        expert_capacity_factor: of an expert's equal share of a sequence, what it takes in training; None: everything.
        weight_gradients: those of column and row layers built from now on may be put off; None: they never are.
    """

    def __init__(
        self,
        clock: DropoutClock,
        compiled: bool = False,
        float8: bool = False,
        z_loss: float = 0.0,
        sequence: WholeSequence = WHOLE_SEQUENCE,
    ) -> None:
        self.slices = 1
        self.sequence = sequence
        self.clock = clock
        self.compiled = compiled
        self.z_loss = z_loss
        self.router_losses = RouterLosses()
        self.experts = ALL_EXPERTS
        self.expert_capacity_factor: float | None = None
        self.weight_gradients: WeightGradients | None = None
        self._float8 = float8

    def column(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Linear:
        """A linear layer whose output features may be divided over ranks, only between its equal `parts` (heads)."""
        return self._linear(in_features, out_features, bias)

    def row(self, in_features: int, out_features: int, bias: bool, parts: int) -> nn.Module:
        """A linear layer whose input features may be divided between its `parts`; its output is whole."""
        return self._linear(in_features, out_features, bias)

    def _linear(self, in_features: int, out_features: int, bias: bool) -> nn.Linear:
        if self.weight_gradients is not None:
            products = Float8Products if self._float8 else Products
            return SplitLinear(in_features, out_features, bias, products, self.weight_gradients)
        return (Float8Linear if self._float8 else nn.Linear)(in_features, out_features, bias=bias)

    def projection(self) -> Projection:
        """Applies the column layers of one input."""
        return lambda hidden, *columns: tuple(column(hidden) for column in columns)

    def stacked(self, size: tuple[int, ...], divided: int) -> nn.Parameter:
        """One matrix for each expert, [E, out, in], of which the first dimension and `divided` may be divided."""
        return self._stacked(size, divided, (0, size[divided]))

    def _stacked(self, size: tuple[int, ...], divided: int, part: tuple[int, int]) -> nn.Parameter:
        """The experts held here, of whose dimension `divided` only a part is."""
        parts = {0: self.experts.held(size[0]), divided: part}
        rectangle = tuple(parts.get(dimension, (0, length)) for dimension, length in enumerate(size))
        shard = ShardedAxis(size, rectangle, is_owner=True)
        parameter = nn.Parameter(torch.empty(shard.sizes))
        if shard.sizes != size:
            annotate_shard(parameter, shard)
        return parameter

    def stream(self) -> ResidualStream:
        """The residual stream, for what is computed from all of it."""
        return ResidualStream()

    def embedding(self, rows: int, width: int) -> nn.Embedding:
        """A lookup table [rows, width]; its rows may be divided."""
        return nn.Embedding(rows, width)

    def positions(self, rows: int, width: int) -> PositionEmbedding:
        """A table of position embeddings, whole on every rank."""
        return PositionEmbedding(rows, width, self.sequence.parts, self.sequence.cut)

    def replicated(self, module: AnyModule, sharded: bool) -> AnyModule:
        """`module`, whose parameters are whole on every rank; `sharded`: it sees only this rank's heads."""
        return module

    def of_heads(self, heads: int) -> nn.Parameter:
        """One number for each head, divided like the heads."""
        return nn.Parameter(torch.empty(heads))

    def norm_over_heads(self, width: int, heads: int, epsilon: float, zero_centered: bool) -> RMSNorm:
        """An RMS norm over all heads together, whose features [..., width] may be divided between heads."""
        return RMSNorm(width, epsilon, zero_centered)

    def vocabulary_weight(self, vocab_size: int, hidden_size: int) -> nn.Parameter:
        """The output projection of an untied head, divided like `embedding`."""
        return nn.Parameter(torch.empty(vocab_size, hidden_size))

    def output(self, vocab_size: int, softcap: float | None) -> VocabularyOutput:
        """From hidden states to logits, capped or not, and loss."""
        return VocabularyOutput(LogitRule(softcap, self.z_loss), self.compiled, self.sequence)

    def place(self, layer: int, site: str, sharded: bool) -> str:
        """The name that a dropout's seed is derived from; `sharded`: different on each tensor-parallel rank.

        Each part of a sequence has its own.
        """
        return f"{layer}/{site}{self.sequence.suffix}"

    def dropout(self, rate: float, layer: int, site: str, sharded: bool) -> nn.Module:
        """Dropout with a seed of its `place`."""
        return Dropout(rate, self.clock, self.place(layer, site, sharded))


@dataclass(frozen=True)
class ShardedAxis:
    """Which part of a whole parameter a module's own parameter is.

    Initial weights, checkpoints and gradient norms read it, so they need not know the ranks.

    Args:
        shape: of the whole parameter.
        rectangle: per dimension the [first, last) rows held here; None: all of it.
        is_owner: true on exactly one of the ranks that hold this part: that rank counts it in norms and saves it.
    """

    shape: tuple[int, ...]
    rectangle: Rectangle | None
    is_owner: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.rectangle is None:
            return self.shape
        return tuple(last - first for first, last in self.rectangle)

    def cut(self, whole: Tensor) -> Tensor:
        """A view of the part of the whole parameter that is held here."""
        if self.rectangle is None:
            return whole
        return whole[tuple(slice(first, last) for first, last in self.rectangle)]


def annotate_shard(parameter: Tensor, shard: ShardedAxis) -> None:
    """Record which part of the whole a parameter is."""
    parameter.shard = shard  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> ShardedAxis:
    """The annotation, or all of it without one; valid while the parameter has its own shape (ZeRO 3 flattens it)."""
    found: ShardedAxis | None = getattr(parameter, "shard", None)
    return found if found is not None else ShardedAxis(tuple(parameter.shape), None, is_owner=True)
