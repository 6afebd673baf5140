"""Adam and AdamW whose moments take fewer bytes than fp32; see moment_codecs.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megalm.engine.optimizer.moment_codecs import BLOCK, Bf16Codec, EightBitCodec, MomentCodec, random_bits

Moment = Literal["exp_avg", "exp_avg_sq"]

# Blocks that an update holds in fp32 at a time, some ten times: what fits a CPU's cache, and what fills a GPU.
_CPU_BLOCKS, _GPU_BLOCKS = 2**8, 2**13


@dataclass(frozen=True)
class _Piece:
    """Elements [offset, offset + count) of a flat tensor: a range of one parameter, in slots [slot, slot + count).

    A slot is a place in a block. The first one is such that blocks begin at multiples of 256 of the parameter, wherever
    the tensor begins or ends.
    """

    offset: int
    count: int
    slot: int

    @property
    def blocks(self) -> tuple[int, int]:
        """The first block, and the one after the last."""
        return self.slot // BLOCK, math.ceil((self.slot + self.count) / BLOCK)


@dataclass(frozen=True)
class _Chunk:
    """Some blocks in a row, with what they hold: elements of the flat tensor, and their slots from the first block."""

    first: int
    last: int
    spans: tuple[tuple[slice, slice], ...]

    @classmethod
    def of(cls, pieces: list[_Piece], first: int, last: int) -> _Chunk:
        spans = []
        for piece in pieces:
            begin, end = max(piece.slot, first * BLOCK), min(piece.slot + piece.count, last * BLOCK)
            if begin < end:
                offset = piece.offset + begin - piece.slot
                spans.append((slice(offset, offset + end - begin), slice(begin - first * BLOCK, end - first * BLOCK)))
        return cls(first, last, tuple(spans))

    def gather(self, flat: Tensor) -> Tensor:
        """Return the elements, fp32 [blocks, 256]: a view where they fill the blocks, else a copy with zeros around."""
        size = (self.last - self.first) * BLOCK
        if flat.dtype == torch.float32 and [places for _, places in self.spans] == [slice(0, size)]:
            return flat[self.spans[0][0]].view(-1, BLOCK)
        slots = torch.zeros(size, device=flat.device)
        for elements, places in self.spans:
            slots[places] = flat[elements]
        return slots.view(-1, BLOCK)

    def scatter(self, blocks: Tensor, flat: Tensor) -> None:
        """Write the elements from `blocks` to `flat`."""
        for elements, places in self.spans:
            flat[elements] = blocks.view(-1)[places]


class LowPrecisionAdam(torch.optim.Optimizer):
    """Adam with moments in bf16 or in 8-bit codes; weights and the arithmetic of an update are fp32.

    A tensor is updated once it is laid out; until then `step` leaves it as it is. An update decodes, updates and
    encodes some blocks after others, so that the moments never exist in fp32 as a whole.

    Args:
        states: how moments are kept.
        decoupled: AdamW: weight decay is subtracted from the weight, not added to the gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        states: Literal["bf16", "8bit"],
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._decoupled = decoupled
        self._codecs: dict[Moment, MomentCodec] = {
            "exp_avg": Bf16Codec() if states == "bf16" else EightBitCodec(signed=True),
            "exp_avg_sq": Bf16Codec() if states == "bf16" else EightBitCodec(signed=False),
        }
        self._pieces: dict[nn.Parameter, dict[int, _Piece]] = {}
        self._chunks: dict[nn.Parameter, list[_Chunk]] = {}

    def lay_out(self, flat: nn.Parameter, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Say which parameters are in `flat`.

        Args:
            ranges: for each its offset in `flat`, its first element there, counted in the parameter, and their number.
        """
        pieces: dict[int, _Piece] = {}
        blocks = 0
        for offset, start, count in sorted(ranges):
            pieces[offset] = _Piece(offset, count, blocks * BLOCK + start % BLOCK)
            blocks = pieces[offset].blocks[1]
        self._pieces[flat] = pieces
        self._chunks[flat] = [_Chunk.of(list(pieces.values()), *it) for it in _ranges(0, blocks, flat.device)]

    def clear(self, flat: nn.Parameter, step: int) -> None:
        """Set the moments of `flat` to zero, and its number of updates to `step`."""
        blocks = self._chunks[flat][-1].last
        state: dict[str, Any] = {"step": step}
        for moment, codec in self._codecs.items():
            for index, stored in enumerate(codec.zeros(blocks, flat.device)):
                state[f"{moment}.{index}"] = stored
        self.state[flat] = state

    def read(self, flat: nn.Parameter, offset: int, moment: Moment) -> Tensor:
        """Return a moment of the range that begins at `offset` of `flat`, fp32."""
        piece, chunks = self._own_chunks(flat, offset)
        values = torch.zeros(piece.count, device=flat.device)
        for chunk in chunks if self.state[flat] else ():
            chunk.scatter(self._codecs[moment].decode(self._stored(flat, moment, chunk)), values)
        return values

    def write(self, flat: nn.Parameter, offset: int, moment: Moment, values: Tensor) -> None:
        """Set a moment of the range that begins at `offset` of `flat`, rounded to the nearest."""
        values = values.to(flat.device).view(-1)
        for chunk in self._own_chunks(flat, offset)[1]:
            self._codecs[moment].encode(chunk.gather(values), self._stored(flat, moment, chunk), None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update what has a gradient; `closure` is not used."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None and flat in self._chunks:
                    self._update(flat, group)

    def _update(self, flat: nn.Parameter, group: dict[str, Any]) -> None:
        if not self.state[flat]:
            self.clear(flat, step=0)
        step = self.state[flat]["step"] = self.state[flat]["step"] + 1
        assert flat.grad is not None
        weights, gradients = flat.data.view(-1), flat.grad.view(-1)
        beta1, beta2 = group["betas"]
        rate, decay = group["lr"], group["weight_decay"]
        correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        for chunk in self._chunks[flat]:
            weight, gradient = chunk.gather(weights), chunk.gather(gradients)
            bits = random_bits(gradient, step)
            if self._decoupled:
                weight.mul_(1 - rate * decay)
            elif decay:
                gradient = gradient.add(weight, alpha=decay)
            mean, square = (codec.decode(self._stored(flat, moment, chunk)) for moment, codec in self._codecs.items())
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = square.sqrt().add_(group["eps"] * correction2)
            weight.addcdiv_(mean, root, value=-rate * correction2 / correction1)
            chunk.scatter(weight, weights)
            for (moment, codec), values, random in zip(self._codecs.items(), (mean, square), bits, strict=True):
                codec.encode(values, self._stored(flat, moment, chunk), random)

    def _stored(self, flat: nn.Parameter, moment: Moment, chunk: _Chunk) -> tuple[Tensor, ...]:
        """Return views of the chunk's part of the codec's tensors."""
        state = self.state[flat]
        return tuple(state[name][chunk.first : chunk.last] for name in state if name.startswith(f"{moment}."))

    def _own_chunks(self, flat: nn.Parameter, offset: int) -> tuple[_Piece, list[_Chunk]]:
        """Return the range that begins at `offset`, and its chunks, whose elements count from its beginning."""
        piece = self._pieces[flat][offset]
        alone = [_Piece(0, piece.count, piece.slot)]
        return piece, [_Chunk.of(alone, *it) for it in _ranges(*piece.blocks, flat.device)]


def _ranges(first: int, last: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Blocks [first, last), some at a time."""
    size = _CPU_BLOCKS if device.type == "cpu" else _GPU_BLOCKS
    for begin in range(first, last, size):
        yield begin, min(begin + size, last)
