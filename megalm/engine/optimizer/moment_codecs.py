"""How Adam's moments are kept in fewer bytes than fp32: bf16, or block-wise 8-bit codes.

A codec stores blocks of 256 values. Its encoding rounds at random, so that the mean of many roundings is the value: a
second moment changes by a thousandth in a step, which rounding to the nearest would lose every time. Without random
numbers it rounds to the nearest, and then a decoded block is encoded as the same bits: a checkpoint needs that.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK = 256
_SMALLEST_SCALE = 2.0**-96  # a block of smaller values is zero: all its products with a level stay normal numbers


class MomentCodec(Protocol):
    """Keeps blocks of fp32 values in tensors of its own, whose first dimension is the block."""

    def zeros(self, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensors for this number of blocks of zeros."""

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        """Return the values, fp32 [blocks, 256]."""

    def encode(self, values: Tensor, stored: tuple[Tensor, ...], random: Tensor | None) -> None:
        """Write `values` to `stored`.

        Args:
            values: fp32 [blocks, 256].
            random: int32 of the same shape, uniform in [0, 2^16); None rounds to the nearest.
        """


class Bf16Codec:
    def zeros(self, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.zeros(blocks, BLOCK, dtype=torch.bfloat16, device=device),)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        return stored[0].float()

    def encode(self, values: Tensor, stored: tuple[Tensor, ...], random: Tensor | None) -> None:
        if random is not None:  # the lower half of an fp32 number is what bf16 drops
            values = ((values.view(torch.int32) + random) & -0x10000).view(torch.float32)
        stored[0].copy_(values)


class EightBitCodec:
    """A block's largest magnitude as an fp32 scale, and each value's ratio to it as one of geometric levels.

    The levels are equally far apart in the logarithm: the relative precision is the same for small and large values.

    Args:
        device: of the blocks.
        signed: 127 levels over 10 octaves for each sign, and zero: for the first moment. Otherwise 256 levels over 20
            octaves and no zero, for the second moment: a smaller one is rounded up, because Adam divides by its root.
    """

    def __init__(self, device: torch.device, signed: bool) -> None:
        self._signed, self._octaves = signed, 10.0 if signed else 20.0
        count = 127 if signed else 256
        exponents = self._octaves * (torch.arange(count, dtype=torch.float64) / (count - 1) - 1)
        levels = torch.exp2(exponents).float()
        self._levels = (torch.cat([torch.zeros(1), levels]) if signed else levels).to(device)
        self._first = 1 if signed else 0  # the level that the logarithm of a ratio begins at

    def zeros(self, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
        codes = torch.zeros(blocks, BLOCK, dtype=torch.int8 if self._signed else torch.uint8, device=device)
        return codes, torch.zeros(blocks, 1, device=device)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        codes, scale = stored
        indices = codes.int()
        values = self._at(indices.abs()) * scale
        return values * indices.sign() if self._signed else values

    def encode(self, values: Tensor, stored: tuple[Tensor, ...], random: Tensor | None) -> None:
        codes, scale = stored
        magnitudes = values.abs()
        largest = magnitudes.amax(dim=1, keepdim=True)
        scale.copy_(torch.where(largest < _SMALLEST_SCALE, 0.0, largest))
        ratios = magnitudes / torch.where(largest < _SMALLEST_SCALE, 1.0, largest)
        steps = len(self._levels) - 1 - self._first
        places = self._first + steps * (1 + ratios.log2() / self._octaves)
        below = places.clamp(0, len(self._levels) - 2).int()
        low, high = self._at(below), self._at(below + 1)
        threshold: Tensor | float = 0.5 if random is None else (random.float() + 0.5) * 2.0**-16
        indices = below + ((ratios - low) / (high - low) > threshold).int()
        codes.copy_(indices * values.sign().int() if self._signed else indices)

    def _at(self, indices: Tensor) -> Tensor:
        return self._levels.index_select(0, indices.view(-1)).view_as(indices)


def random_bits(values: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return two int32 tensors, uniform in [0, 2^16), that depend on the fp32 blocks `values` and on `step` alone.

    So the same update rounds alike after a resume and on any rank, without a generator's state. A hash of value, place
    in the block and step: the last steps of MurmurHash3.
    """
    places = torch.arange(BLOCK, dtype=torch.int32, device=values.device) * _as_int32(0x27D4EB2F)
    bits = (values.view(torch.int32) + places) ^ _as_int32(0x9E3779B1 * (step + 1))
    for shift, mask, factor in ((16, 0xFFFF, 0x85EBCA6B), (13, 0x7FFFF, 0xC2B2AE35)):
        bits = (bits ^ ((bits >> shift) & mask)) * _as_int32(factor)
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    return bits & 0xFFFF, (bits >> 16) & 0xFFFF


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
