"""Context parallelism: the ranks of a group divide each sequence, and only attention reads more than a rank's own part.

`all_to_all` (DeepSpeed-Ulysses, Jacobs et al., 2023) gives each rank whole sequences of some heads for the time of
attention, and takes back its positions of all heads.

Shapes: R ranks, B batch, T sequence, C = T / R positions held here, N heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.model.attention import DocumentMask
from megalm.model.layer_factory import Attend, WholeSequence
from megalm.parallel import collectives
from megalm.parallel.process_groups import AxisGroup


class ExchangedSequence(WholeSequence):
    """`parallel.context_method=all_to_all`: rank r of a context group holds the r-th of R equal slices.

    The heads held here, N, divide over the ranks. Key/value heads do, or R is a multiple of their number: each is then
    sent to all ranks whose query heads read it.
    """

    def __init__(self, group: AxisGroup) -> None:
        self._group = group
        self.parts = self.multiple = group.size
        self.suffix = f"/context {group.index}"

    def cut(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.parts, dim=-1)[self._group.index].contiguous()

    def positions(self, length: int, device: torch.device) -> slice | Tensor:
        first = self._group.index * length
        return slice(first, first + length)

    def attend(self, attention: Attend, query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None) -> Tensor:
        ranks = self.parts
        if key.shape[1] < ranks:
            key, value = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (key, value))
        # One message for all three: [B, N, C, D] -> [B, R, N / R, C, D] of each.
        by_rank = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]
        heads = [x.shape[2] for x in by_rank]
        arrived = self._exchange(torch.cat(by_rank, dim=2).movedim(1, 0))  # [R, B, M, C, D]
        whole = arrived.movedim(0, 2).flatten(2, 3)  # [B, M, T, D]
        query, key, value = whole.split(heads, dim=1)
        mixed = attention(query, key, value, mask)  # [B, N / R, T, D]
        returned = self._exchange(mixed.unflatten(2, (ranks, -1)).movedim(2, 0))  # [R, B, N / R, C, D]
        return returned.movedim(0, 1).flatten(1, 2)

    def rows(self, hidden: Tensor, positions: Tensor) -> Tensor:
        length = hidden.shape[1]
        local = positions - self._group.index * length
        found = super().rows(hidden, local.clamp(0, length - 1))
        is_held = (local >= 0) & (local < length)
        return collectives.sum_over(torch.where(is_held.unsqueeze(1), found, 0.0), self._group)

    def _exchange(self, parts: Tensor) -> Tensor:
        return Exchange.apply(parts, self._group)  # type: ignore[no-untyped-call]  # torch: untyped


class Exchange(torch.autograd.Function):
    """[R, ...], a part for each rank -> [R, ...], a part from each; so do the gradients travel back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients[0], ctx.group), None


def _exchanged(parts: Tensor, group: AxisGroup) -> Tensor:
    parts = parts.contiguous()
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.megalm.exchange(parts, group.process_group.group_name)
        return result
    return _all_to_all(parts, group.process_group)


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = torch.empty_like(parts)
    dist.all_to_all_single(result, parts, group=group)
    return result


def _exchange_by_name(parts: Tensor, group: str) -> Tensor:
    return _all_to_all(parts, dist.distributed_c10d._resolve_process_group(group))  # type: ignore[attr-defined, arg-type]  # torch: untyped


# As in sharded_linear.py: a compiled graph does not break at an operator.
_OPERATORS = torch.library.Library("megalm", "FRAGMENT")
_OPERATORS.define("exchange(Tensor parts, str group) -> Tensor")
_OPERATORS.impl("exchange", _exchange_by_name, "CompositeExplicitAutograd")
torch.library.register_fake("megalm::exchange", lambda parts, group: torch.empty_like(parts), lib=_OPERATORS)
