"""Dropout whose mask is a function of where and when it is drawn, never of what was drawn before.

The seed comes from (run seed, step, micro-batch, layer, site). So a resumed run draws the same masks, and
recomputing a block in the backward pass draws its own mask again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.model.uncompiled import uncompiled


@dataclass
class DropoutClock:
    """The moving part of every seed. The engine sets it before each micro-batch; modules only read it."""

    seed: int
    step: int = 0
    micro_batch: int = 0

    def seed_at(self, place: str) -> int:
        """A 63-bit seed for `place` at this step and micro-batch."""
        text = f"{self.seed}/{self.step}/{self.micro_batch}/{place}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` in training and scales the rest by 1 / (1 - rate)."""

    def __init__(self, rate: float, clock: DropoutClock, place: str) -> None:
        super().__init__()
        self.rate = rate
        self.clock = clock
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return x * self._keep(x) * (1.0 / (1.0 - self.rate))

    @uncompiled  # compiled, each new seed would be a constant, and each step would be compiled anew
    def _keep(self, x: Tensor) -> Tensor:
        generator = torch.Generator(device=x.device).manual_seed(self.clock.seed_at(self.place))
        return torch.rand(x.shape, generator=generator, device=x.device) >= self.rate

    def extra_repr(self) -> str:
        return f"rate={self.rate}, place={self.place!r}"
