"""Expert parallelism: each rank of a group holds some experts of each layer, and tokens travel to them and back.

Each rank sends the rows of its tokens to the ranks that hold their experts, an all-to-all of unequal parts, so that no
token is dropped; what the experts make of them travels back the same way, and so do the gradients. How many rows go
where is exchanged first and read by the host: the only wait for the device, once in a layer's forward pass and once in
its recomputation.

Shapes: P ranks, E experts of a layer, L = E / P experts held here, R rows of this rank's tokens, A rows that arrive, H
hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.model.layer_factory import AllExperts
from megalm.model.moe import Rows
from megalm.parallel import collectives
from megalm.parallel.process_groups import AxisGroup


class DividedExperts(AllExperts):
    """Rank i of a group holds experts [i L, (i + 1) L) of each layer.

    Args:
        group: the ranks, whose number divides the experts.
    """

    def __init__(self, group: AxisGroup) -> None:
        self._group = group

    def held(self, experts: int) -> tuple[int, int]:
        count = experts // self._group.size
        return self._group.index * count, (self._group.index + 1) * count

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        sent = counts.long().view(self._group.size, -1)  # [P, L]: rows for each expert of each rank
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=self._group.process_group)
        to_each, from_each = rows_of_ranks(len(rows), sent, arriving)
        assert to_each[self._group.index] == from_each[self._group.index], (to_each, from_each)
        there = partial(_exchanged, sent=to_each, received=from_each, group=self._group)
        back = partial(_exchanged, sent=from_each, received=to_each, group=self._group)
        arrived = collectives.linear(rows, there, back)
        # Sorted by sender, then by expert -> by expert.
        experts = torch.arange(sent.shape[1], device=rows.device).repeat(self._group.size)
        expert = experts.repeat_interleave(arriving.flatten(), output_size=sum(from_each))  # [A]
        order = expert.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=rows.device))

        def combine(outputs: Tensor) -> Tensor:
            by_sender = Rows.apply(outputs, place, order, 1)  # type: ignore[no-untyped-call]  # torch: untyped
            return collectives.linear(by_sender, back, there)

        own = Rows.apply(arrived, order, place, 1)  # type: ignore[no-untyped-call]  # torch: untyped
        return own, arriving.sum(0), combine


def rows_of_ranks(rows: int, sent: Tensor, arriving: Tensor) -> tuple[list[int], list[int]]:
    """Of `rows`, [P, L], [P, L] -> how many go to each rank, and come from each; waits for the device."""
    to_each, from_each = torch.stack([sent.sum(1), arriving.sum(1)]).tolist()
    return to_each, from_each


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: AxisGroup) -> Tensor:
    """[sum of `sent`, H] -> [sum of `received`, H]: the first rows to the first rank, and so on."""
    result = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group.process_group)
    return result
