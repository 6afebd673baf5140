"""What the backward pass computes again instead of reading what the forward pass kept.

The same operations on the same numbers give the same bits. Dropout derives its seeds from its place, step and
micro-batch, so that no generator's state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalm.model.modules import DropoutClock


def recomputed(function: Callable[..., Tensor], clock: DropoutClock, *inputs: Any) -> Tensor:
    """function(*inputs), of which only the inputs are kept.

    In a pipeline other micro-batches have run forward by then: the clock goes back to this one.
    """
    micro_batch = clock.micro_batch

    def run(*inputs: Any) -> Tensor:
        with _at(clock, micro_batch):
            return function(*inputs)

    result = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


@contextmanager
def _at(clock: DropoutClock, micro_batch: int) -> Iterator[None]:
    now = clock.micro_batch
    if now == micro_batch:  # the forward pass
        yield
        return
    clock.micro_batch = micro_batch
    try:
        yield
    finally:
        clock.micro_batch = now


def of_recomputed_norm(norm: nn.Module, hidden: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(norm(hidden)), of whose norm only the input is kept: its output too is computed again when first read.

    `checkpoint` alone would keep the output, as the input of the layers in `function`, or run those layers again.
    """
    normed = checkpoint(norm, hidden, use_reentrant=False, preserve_rng_state=False)
    again = _Again(norm, hidden.detach())
    storage = normed.untyped_storage()._cdata  # its address says nothing on "meta"

    def pack(tensor: Tensor) -> Tensor | _View:
        if tensor.untyped_storage()._cdata == storage:
            return again.view_like(tensor)
        # A result that held itself would never be freed; weights must stay those that ZeRO 3 fills and empties.
        return tensor if tensor.is_leaf else tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return function(normed)


class _Again:
    """A norm's output, computed again at the first reading and let go at the last one."""

    def __init__(self, norm: nn.Module, hidden: Tensor) -> None:
        self._norm, self._hidden = norm, hidden
        self._readers = self._left = 0
        self._output: Tensor | None = None

    def view_like(self, tensor: Tensor) -> _View:
        """A promise of `tensor`, which is a view of the output."""
        self._readers += 1
        return _View(self, tensor.shape, tensor.stride(), tensor.storage_offset())

    def read(self) -> Tensor:
        if self._output is None:
            with torch.no_grad():
                self._output = self._norm(self._hidden)
            self._left = self._readers
        output = self._output
        self._left -= 1
        if not self._left:
            self._output = None
        return output


@dataclass(frozen=True)
class _View:
    of: _Again
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, _View):
        return kept.of.read().as_strided(kept.size, kept.stride, kept.offset)
    return kept
