"""What the backward pass computes again instead of reading what the forward pass kept.

The same operations on the same numbers give the same bits. Dropout derives its seeds from its place, step and
micro-batch, so that no generator's state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from megalm.config.schema import Recompute
from megalm.model.activation_offload import OffloadedInputs
from megalm.model.modules import DropoutClock


@dataclass(frozen=True)
class Recomputation:
    """What the backward pass of a model computes again.

    Attributes:
        kind: in each block.
        every: every n-th block is recomputed whole instead; 0: none.
        mlp_chunk_tokens: tokens of a micro-batch whose MLP is computed at once, and again; None: all, and not again.
        inputs: where the inputs of blocks that are recomputed whole are kept; None: on the device.
    """

    kind: Recompute = "none"
    every: int = 0
    mlp_chunk_tokens: int | None = None
    inputs: OffloadedInputs | None = None


KEEP_ALL = Recomputation()


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


class TokenTiles:
    """Applies modules, one after the other, to one tile of tokens at a time; only their common input is kept.

    The backward pass computes each tile again, and adds up the gradients of weights in fp32: in bf16 each further
    tile would lose low bits. Weights are read as they lie, gathered for the whole block under ZeRO 3.

    Args:
        modules: which compute each token by itself, from the outputs of the one before.
        tokens: of a tile, as this rank holds them.
    """

    def __init__(self, modules: Sequence[nn.Module], tokens: int) -> None:
        self._modules = tuple(modules)
        self._tokens = tokens
        self._compute = self._apply

    def compile(self, **options: Any) -> None:
        """Compile a tile as one graph."""
        self._compute = torch.compile(self._apply, dynamic=False, **options)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]"""
        parameters = [parameter for module in self._modules for parameter in module.parameters()]
        result = _Tiles.apply(hidden, self, *parameters)  # type: ignore[no-untyped-call]  # torch: untyped
        assert isinstance(result, Tensor)
        return result

    def forward(self, hidden: Tensor) -> Tensor:
        """The result of all tiles, without gradients."""
        rows, weights = _as_rows(hidden), self._weights()
        result = torch.empty_like(rows)
        for tile in self._tiles(rows):
            result[:, tile] = self._compute(rows[:, tile], weights)
        return result.view(hidden.shape)

    def backward(self, hidden: Tensor, outer: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of `hidden` and of the modules' parameters, None for a frozen one, from that of the result."""
        rows, gradients, weights = _as_rows(hidden), _as_rows(outer), self._weights()
        flat = [weight for own in weights for weight in own.values()]
        trained = [weight for weight in flat if weight.requires_grad]
        result = torch.empty_like(rows)
        totals: list[Tensor] = []
        for tile in self._tiles(rows):
            inputs = rows[:, tile].detach().requires_grad_()
            with torch.enable_grad():
                self._compute(inputs, weights).backward(gradients[:, tile])
            result[:, tile] = _taken(inputs)
            totals = _added(totals, [_taken(weight) for weight in trained])
        sums = iter(totals)
        narrow = [next(sums).to(weight.dtype) if weight.requires_grad else None for weight in flat]
        return result.view(hidden.shape), narrow

    def _weights(self) -> list[dict[str, Tensor]]:
        """The modules' parameters without the hooks that wait for their whole gradients."""
        return [
            {
                name: parameter.detach().requires_grad_(parameter.requires_grad)
                for name, parameter in module.named_parameters()
            }
            for module in self._modules
        ]

    def _apply(self, rows: Tensor, weights: Sequence[dict[str, Tensor]]) -> Tensor:
        for module, own in zip(self._modules, weights, strict=True):
            rows = functional_call(module, own, (rows,))
        return rows

    def _tiles(self, rows: Tensor) -> list[slice]:
        """Tiles of one size, the last of which may be shorter."""
        total = rows.shape[1]
        size = -(-total // -(-total // self._tokens))
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _as_rows(hidden: Tensor) -> Tensor:
    """[B, T, H] -> [1, B * T, H]"""
    return hidden.reshape(1, -1, hidden.shape[-1])


def _taken(leaf: Tensor) -> Tensor:
    """The gradient of a tensor, which has none afterwards."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def _added(totals: list[Tensor], addends: Sequence[Tensor]) -> list[Tensor]:
    if not totals:
        return [addend.to(torch.promote_types(addend.dtype, torch.float32)) for addend in addends]
    for total, addend in zip(totals, addends, strict=True):
        total.add_(addend)
    return totals


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tiles: TokenTiles, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.tiles = tiles
        if in_backward():  # a whole block's recomputation, which reads what is saved and nothing else
            return torch.empty_like(hidden)
        return tiles.forward(hidden)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.saved_tensors
        hidden_gradient, others = ctx.tiles.backward(hidden, outer[0])
        return hidden_gradient, None, *others


def in_backward() -> bool:
    """Whether this is the backward pass, which computes some of the forward pass again."""
    task: int = torch._C._current_graph_task_id()
    return task != -1
