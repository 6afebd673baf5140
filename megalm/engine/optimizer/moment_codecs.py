"""How Adam's moments are kept in fewer bytes than fp32: bf16, or 8-bit levels of a block's own range.

A codec stores blocks of 256 values. Its encoding rounds at random, so that the mean of many roundings is the value: a
second moment changes by a thousandth in a step, which rounding to the nearest would lose every time. Without random
numbers it rounds to the nearest, and then a decoded block is encoded as the same values: a checkpoint needs that.

All is integer arithmetic on the bits of fp32 numbers. Those of positive ones grow with the number, by 2^23 an octave
and evenly in it: a level's number is a multiple of the bits, and rounding is an addition and a shift.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK = 256
_LEVELS = 12  # of 8 bits in an octave
_SMALLEST = 33 << 23  # the bits of 2^-94: a block of smaller values is zero, so that every level is a normal number
_ABOVE_ALL = 256 * _LEVELS  # no fp32 number has a level of that number


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
            values = (values.view(torch.int32) + random).bitwise_and_(-0x10000).view(torch.float32)
        stored[0].copy_(values)


class EightBitCodec:
    """A value's level, counted from a block's lowest one, and an int32 a block that says which that is.

    Levels are fp32 numbers, numbered upwards, 12 an octave at equal distances; the highest of a block is the first that
    is not below its largest magnitude. So which levels a value may take depends on its block at the low end only.

    Args:
        signed: 127 levels over 10 octaves for each sign, and zero: for the first moment. Otherwise 256 levels over 21
            octaves and no zero, for the second moment: a smaller one is rounded up, because Adam divides by its root.
    """

    def __init__(self, signed: bool) -> None:
        self._signed, self._highest = signed, 127 if signed else 255

    def zeros(self, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
        codes = torch.zeros(blocks, BLOCK, dtype=torch.int8 if self._signed else torch.uint8, device=device)
        return codes, torch.zeros(blocks, 1, dtype=torch.int32, device=device)

    def decode(self, stored: tuple[Tensor, ...]) -> Tensor:
        codes, lowest = stored
        levels = codes.int()
        if self._signed:
            levels.abs_()
        octaves = (levels.add_(lowest) * 43691).bitwise_right_shift_(19)  # divided by 12, as far as fp32 goes
        per_level = (1 << 23) // _LEVELS
        bits = levels.mul_(per_level).add_(octaves, alpha=(1 << 23) - _LEVELS * per_level)
        values = bits.view(torch.float32)
        return values.mul_(codes.sign().float()) if self._signed else values

    def encode(self, values: Tensor, stored: tuple[Tensor, ...], random: Tensor | None) -> None:
        codes, lowest = stored
        bits = values.view(torch.int32)
        levels = (bits & 0x7FFFFFFF if self._signed else bits) >> 4  # 4 bits fewer, or the product would overflow
        largest = levels.amax(dim=1, keepdim=True)
        levels.mul_(_LEVELS)  # in units of 2^-19 levels
        first = ((largest * _LEVELS + ((1 << 19) - 1)) >> 19) - self._highest
        is_zero = largest < _SMALLEST >> 4
        lowest.copy_(first.masked_fill(is_zero, 0))
        if random is None:
            levels.add_(1 << 18)
        else:
            levels.add_(random, alpha=1 << 3)
        levels.bitwise_right_shift_(19).sub_(first.masked_fill(is_zero, _ABOVE_ALL)).clamp_(0, self._highest)
        codes.copy_(levels.mul_((bits >> 31).bitwise_or_(1)) if self._signed else levels)


def random_bits(values: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return two int32 tensors, uniform in [0, 2^16), that depend on the fp32 blocks `values` and on `step` alone.

    So the same update rounds alike after a resume and on any rank, without a generator's state. A hash of value, place
    in the block and step: multiplications carry bits upwards, shifts downwards.
    """
    places = torch.arange(BLOCK, dtype=torch.int32, device=values.device).mul_(_as_int32(0x27D4EB2F))
    bits = values.view(torch.int32) + places.add_(_as_int32(0x9E3779B1 * (step + 1)))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits.bitwise_xor_(bits >> shift).mul_(_as_int32(factor))
    upper = (bits >> 16).bitwise_and_(0xFFFF)
    return upper, bits.bitwise_xor_(upper).bitwise_and_(0xFFFF)


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
