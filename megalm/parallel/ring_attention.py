"""Ring attention (Liu et al., 2023): keys and values travel around a context group while queries stay.

A rank attends to one rank's keys and values while the next ones are on their way, and joins what it has found by an
online softmax. Plain matrix products over tiles: no [C, C] scores exist, on any device.

Shapes: B batch, C positions held here, N heads, K key/value heads, G = N / K query heads that share one, D head
dimension, S = B x K, Q queries and E keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.model.attention_kernels import ScoreRule, soft_capped
from megalm.parallel.process_groups import AxisGroup

_TILE = 1024  # queries, and keys


@dataclass(frozen=True)
class RingPlaces:
    """Which positions of sequences each rank of a ring of R holds.

    Of 2 R equal pieces rank r holds the r-th from the front and the r-th from the end, so that under the causal mask
    all ranks have as much to do, in every turn of the ring.
    """

    group: AxisGroup

    def pieces(self, rank: int) -> tuple[int, int]:
        """The two pieces of a rank, in the order in which it holds them."""
        return rank, 2 * self.group.size - 1 - rank

    def positions(self, rank: int, length: int, device: torch.device) -> Tensor:
        """The `length` positions [C] of the whole sequence that a rank holds."""
        half = length // 2
        return torch.cat([torch.arange(piece * half, (piece + 1) * half, device=device) for piece in self.pieces(rank)])

    def tiles(self, source: int, length: int, window: int | None) -> Iterator[_Tile]:
        """The tiles of this rank's queries and a source rank's keys of which a query sees a key."""
        half = length // 2
        for query_half, query_piece in enumerate(self.pieces(self.group.index)):
            for key_half, key_piece in enumerate(self.pieces(source)):
                for queries in range(0, half, _TILE):
                    last_query = query_piece * half + min(queries + _TILE, half) - 1
                    for keys in range(0, half, _TILE):
                        first_key = key_piece * half + keys
                        last_key = key_piece * half + min(keys + _TILE, half) - 1
                        if first_key > last_query:
                            continue
                        if window is not None and query_piece * half + queries - last_key >= window:
                            continue
                        rows = slice(query_half * half + queries, query_half * half + min(queries + _TILE, half))
                        columns = slice(key_half * half + keys, key_half * half + min(keys + _TILE, half))
                        yield _Tile(rows, columns, query_piece * half + queries - first_key)


@dataclass(frozen=True)
class _Tile:
    """Queries and keys, as places of what a rank holds; `ahead`: first query's position less the first key's."""

    queries: slice
    keys: slice
    ahead: int


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor | None,
    rule: ScoreRule,
    sinks: Tensor | None,
    places: RingPlaces,
) -> Tensor:
    """Causal attention of the positions held here to whole sequences, within a document if `documents` is given.

    Collective in the places' group.

    Args:
        query: [B, N, C, D], of any floating type.
        key, value: [B, K, C, D], the same type.
        documents: [B, T] document numbers of whole sequences.
        sinks: [N] scores that take their share of each softmax and have no value, or None.

    Returns:
        [B, N, C, D]. Probabilities and sums are fp32; in bf16 both factors of a product are bf16.
    """
    return _RingAttention.apply(query, key, value, documents, sinks, rule, places)  # type: ignore[no-untyped-call]  # torch: untyped


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor | None,
        sinks: Tensor | None,
        rule: ScoreRule,
        places: RingPlaces,
    ) -> Tensor:
        batch, _, length, width = query.shape
        shared = batch * key.shape[1]
        wide = torch.promote_types(query.dtype, torch.float32)
        own = torch.stack((key, value)).view(2, shared, length, width)
        query = query.reshape(shared, -1, length, width) * rule.scale  # [S, G, C, D]
        highest = query.new_full(query.shape[:3], -math.inf, dtype=wide)  # [S, G, C], of the scores until now
        total = torch.zeros_like(highest)  # of exp(score - highest)
        if sinks is not None:  # a score of its own in each row
            highest, total = _per_row(sinks, highest), torch.ones_like(highest)
        mixed = query.new_zeros(query.shape, dtype=wide)
        for source, keys, values in _around(own, places):
            names = _documents(documents, places, source, length)
            for tile in places.tiles(source, length, rule.window):
                scores, _ = _scores(query, keys, tile, names, rule)  # [S, G, Q, E]
                before = highest[:, :, tile.queries]
                top = torch.maximum(before, scores.amax(-1))
                base = top.masked_fill(top == -math.inf, 0.0)  # of a row without a key until now
                exponentials = scores.sub_(base.unsqueeze(-1)).exp_()
                scale = (before - base).exp()
                found = exponentials.flatten(1, 2).to(query.dtype) @ values[:, tile.keys]
                total[:, :, tile.queries] = total[:, :, tile.queries] * scale + exponentials.sum(-1)
                mixed[:, :, tile.queries] = mixed[:, :, tile.queries] * scale.unsqueeze(-1) + found.view(
                    *scale.shape, width
                )
                highest[:, :, tile.queries] = top
        result = (mixed / total.unsqueeze(-1)).to(query.dtype)
        ctx.save_for_backward(query, own, result, highest + total.log(), documents, sinks)
        ctx.rule, ctx.places = rule, places
        return result.view(batch, -1, length, width)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, own, result, logarithms, documents, sinks = ctx.saved_tensors
        rule: ScoreRule = ctx.rule
        places: RingPlaces = ctx.places
        batch, length, width = len(outer[0]), query.shape[2], query.shape[3]
        upper = outer[0].reshape(query.shape)
        wide = logarithms.dtype
        # The softmax subtracts this from each row's gradient.
        row = (upper.to(wide) * result.to(wide)).sum(-1)  # [S, G, C]
        query_grad = torch.zeros_like(query, dtype=wide)
        arriving: Callable[[], Tensor] | None = None
        for source, keys, values in _around(own, places):
            names = _documents(documents, places, source, length)
            grads = torch.zeros_like(own, dtype=wide)  # of the source's keys and values
            for tile in places.tiles(source, length, rule.window):
                scores, slope = _scores(query, keys, tile, names, rule)
                probabilities = scores.sub_(logarithms[:, :, tile.queries].unsqueeze(-1)).exp_()
                above = upper[:, :, tile.queries].flatten(1, 2)
                grads[1, :, tile.keys] += probabilities.flatten(1, 2).to(query.dtype).transpose(1, 2) @ above
                of_scores = (above @ values[:, tile.keys].transpose(1, 2)).view(probabilities.shape).to(wide)
                of_scores = of_scores.sub_(row[:, :, tile.queries].unsqueeze(-1)).mul_(probabilities)
                if slope is not None:
                    of_scores = of_scores * slope
                narrow = of_scores.flatten(1, 2).to(query.dtype)
                query_grad[:, :, tile.queries] += (narrow @ keys[:, tile.keys]).view(*probabilities.shape[:3], width)
                grads[0, :, tile.keys] += narrow.transpose(1, 2) @ query[:, :, tile.queries].flatten(1, 2)
            if arriving is not None:  # what the ranks before have found for this source
                grads += arriving()
            arriving = _begin_shift(grads, places.group)
        assert arriving is not None
        query_grad *= rule.scale
        sinks_grad = None
        if sinks is not None:  # a sink has no value, and so no other gradient than the softmax's
            share = (_per_row(sinks, logarithms) - logarithms).exp()
            sinks_grad = -(share * row).sum(-1).view(batch, -1).sum(0).to(sinks.dtype)
        grads = arriving()  # home after a whole turn
        shapes = query_grad, grads[0], grads[1]
        return (*(x.reshape(batch, -1, length, width).to(query.dtype) for x in shapes), None, sinks_grad, None, None)


def _around(own: Tensor, places: RingPlaces) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each rank of the ring with its keys and values [S, C, D], this one first; the next ones travel meanwhile."""
    held, group = own, places.group
    for turn in range(group.size):
        begun = _begin_shift(held, group) if turn < group.size - 1 else None
        yield (group.index - turn) % group.size, held[0], held[1]
        if begun is not None:
            held = begun()


def _begin_shift(tensor: Tensor, group: AxisGroup) -> Callable[[], Tensor]:
    """Start to send a tensor to the next rank of the ring; the returned function waits for the one before's."""
    result = torch.empty_like(tensor)
    to, come = ([0] * group.size for _ in range(2))
    to[(group.index + 1) % group.size] = come[(group.index - 1) % group.size] = tensor.numel()
    work = dist.all_to_all_single(result.view(-1), tensor.view(-1), come, to, group=group.process_group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return result

    return wait


def _documents(whole: Tensor | None, places: RingPlaces, source: int, length: int) -> tuple[Tensor, Tensor] | None:
    """Document numbers of the positions held here [B, C], and of those of a source rank."""
    if whole is None:
        return None
    own, other = (places.positions(rank, length, whole.device) for rank in (places.group.index, source))
    return whole[:, own], whole[:, other]


def _per_row(sinks: Tensor, like: Tensor) -> Tensor:
    """[N] -> [S, G, C], the sink of each row's head."""
    shared, groups, _ = like.shape
    by_head = sinks.to(like.dtype).view(-1, groups).repeat(shared * groups // len(sinks), 1)
    return by_head.unsqueeze(-1).expand_as(like).clone()


def _scores(
    query: Tensor, key: Tensor, tile: _Tile, documents: tuple[Tensor, Tensor] | None, rule: ScoreRule
) -> tuple[Tensor, Tensor | None]:
    """[S, G, Q, E] of a tile, in fp32, -inf where a query does not attend to a key; and a soft cap's slope there."""
    shared, groups, _, _ = query.shape
    scores = query[:, :, tile.queries].flatten(1, 2) @ key[:, tile.keys].transpose(1, 2)
    rows, columns = tile.queries.stop - tile.queries.start, scores.shape[-1]
    by_head = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(shared, groups, rows, columns)
    by_head, slope = soft_capped(by_head, rule.softcap)
    if tile.ahead < columns - 1:
        later = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu_(tile.ahead + 1)
        by_head.masked_fill_(later, -math.inf)
    if rule.window is not None and tile.ahead + rows - 1 >= rule.window:
        past = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril_(tile.ahead - rule.window)
        by_head.masked_fill_(past, -math.inf)
    if documents is not None:
        own, other = documents
        others = own[:, tile.queries, None] != other[:, None, tile.keys]  # [B, Q, E]
        by_head.view(len(others), -1, rows, columns).masked_fill_(others.unsqueeze(1), -math.inf)
    return by_head, slope
