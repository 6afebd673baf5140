"""Context parallelism: the ranks of a group divide each sequence, and only attention reads more than a rank's own part.

`all_to_all` (DeepSpeed-Ulysses, Jacobs et al., 2023) gives each rank whole sequences of some heads for the time of
attention, and takes back its positions of all heads. `ring` leaves queries where they are and sends keys and values
around (ring_attention.py).

Shapes: R ranks, B batch, T sequence, C = T / R positions held here, N heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.model.attention_kernels import ScoreRule
from megalm.model.layer_factory import Attend, AttentionInputs, WholeSequence
from megalm.model.modules import uncompiled
from megalm.parallel import collectives
from megalm.parallel.process_groups import AxisGroup
from megalm.parallel.ring_attention import RingPlaces, ring_attention


class _DividedSequence(WholeSequence):
    """A context group divides each sequence.

    Args:
        group: the ranks, which hold parts of one size.
    """

    def __init__(self, group: AxisGroup) -> None:
        self._group = group
        self.parts = group.size
        self.suffix = f"/context {group.index}"

    def total(self, addends: Tensor) -> Tensor:
        return collectives.sum_over(addends.detach().clone(), self._group)

    def running_totals(self, addends: Tensor) -> Tensor:
        pieces = addends.unflatten(1, (self.multiple // self.parts, -1))
        held = self.positions(pieces.shape[1], addends.device)
        of_pieces = pieces.new_zeros(len(pieces), self.multiple, *pieces.shape[3:])
        of_pieces[:, held] = pieces.sum(2, dtype=pieces.dtype)
        before = self.total(of_pieces).cumsum(1, dtype=pieces.dtype).roll(1, dims=1)
        before[:, 0] = 0
        return (pieces.cumsum(2, dtype=pieces.dtype) + before[:, held].unsqueeze(2)).flatten(1, 2)

    def rows(self, hidden: Tensor, positions: Tensor) -> Tensor:
        held = torch.arange(hidden.shape[1] * self.parts, device=hidden.device)[
            self.positions(hidden.shape[1], hidden.device)
        ]
        here = positions.unsqueeze(1) == held  # [B, C]
        found = super().rows(hidden, here.int().argmax(dim=1))
        return collectives.sum_over(torch.where(here.any(dim=1, keepdim=True), found, 0.0), self._group)


class ExchangedSequence(_DividedSequence):
    """`parallel.context_method=all_to_all`: rank r of a context group holds the r-th of R equal slices.

    The heads held here, N, divide over the ranks. Key/value heads do, or R is a multiple of their number: each is then
    sent to all ranks whose query heads read it.
    """

    def __init__(self, group: AxisGroup) -> None:
        super().__init__(group)
        self.multiple = group.size

    def cut(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.parts, dim=-1)[self._group.index].contiguous()

    def positions(self, length: int, device: torch.device) -> slice | Tensor:
        first = self._group.index * length
        return slice(first, first + length)

    def attend(self, attention: Attend, inputs: AttentionInputs, rule: ScoreRule) -> Tensor:
        ranks = self.parts
        query, key, value, mask, sinks = inputs
        if key.shape[1] < ranks:
            key, value = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (key, value))
        # One message for all three: [B, N, C, D] -> [B, R, N / R, C, D] of each.
        by_rank = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]
        heads = [x.shape[2] for x in by_rank]
        arrived = self._exchange(torch.cat(by_rank, dim=2).movedim(1, 0))  # [R, B, M, C, D]
        whole = arrived.movedim(0, 2).flatten(2, 3)  # [B, M, T, D]
        query, key, value = whole.split(heads, dim=1)
        own = None if sinks is None else sinks.chunk(ranks)[self._group.index]
        mixed = attention(AttentionInputs(query, key, value, mask, own))  # [B, N / R, T, D]
        returned = self._exchange(mixed.unflatten(2, (ranks, -1)).movedim(2, 0))  # [R, B, N / R, C, D]
        return returned.permute(1, 3, 0, 2, 4).flatten(2, 3).transpose(1, 2)  # as the output projection reads it

    def _exchange(self, parts: Tensor) -> Tensor:
        """[R, ...], a part for each rank -> [R, ...], a part from each; so do the gradients travel back."""
        exchanged = partial(_exchanged, group=self._group.process_group.group_name)
        return collectives.linear(parts, exchanged, exchanged)


class RingSequence(_DividedSequence):
    """`parallel.context_method=ring`: rank r holds two pieces of 2 R, the r-th from the front and from the end."""

    def __init__(self, group: AxisGroup) -> None:
        super().__init__(group)
        self.multiple = 2 * group.size
        self._places = RingPlaces(group)

    def cut(self, whole: Tensor) -> Tensor:
        pieces = whole.chunk(2 * self.parts, dim=-1)
        return torch.cat([pieces[piece] for piece in self._places.pieces(self._group.index)], dim=-1)

    def positions(self, length: int, device: torch.device) -> slice | Tensor:
        return self._places.positions(self._group.index, length, device)

    @uncompiled
    def attend(self, attention: Attend, inputs: AttentionInputs, rule: ScoreRule) -> Tensor:
        """Attention by the same rule in the place of `attention`; it has no dropout (planning/parallel_checks.py)."""
        query, key, value, mask, sinks = inputs
        documents = None if mask is None else mask.documents
        return ring_attention(query, key, value, documents, rule, sinks, self._places)


def _exchanged(parts: Tensor, group: str) -> Tensor:
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.megalm.exchange(parts.contiguous(), group)
        return result
    return _all_to_all(parts.contiguous(), group)


def _all_to_all(parts: Tensor, group: str) -> Tensor:
    result = torch.empty_like(parts)
    named = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]  # torch: untyped
    dist.all_to_all_single(result, parts, group=named)
    return result


# As in sharded_linear.py: a compiled graph does not break at an operator, which takes a process group by its name.
_OPERATORS = torch.library.Library("megalm", "FRAGMENT")
_OPERATORS.define("exchange(Tensor parts, str group) -> Tensor")
_OPERATORS.impl("exchange", _all_to_all, "CompositeExplicitAutograd")
torch.library.register_fake("megalm::exchange", lambda parts, group: torch.empty_like(parts), lib=_OPERATORS)
