"""The small modules of the model: position embeddings, rotary embeddings, dropout and norms.

Shapes: B batch, T sequence, N heads, D head dimension, H hidden, P positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.model.model_config import ModelConfig


class PositionEmbedding(nn.Embedding):
    """Learned embeddings [P, H] of positions; under a document mask each document starts at position 0.

    Args:
        parts: number of ranks that divide a sequence between them.
        cut: from numbers of all positions [..., T] to those of the T / parts that this rank holds.
    """

    def __init__(
        self, rows: int, width: int, parts: int = 1, cut: Callable[[Tensor], Tensor] = lambda ids: ids
    ) -> None:
        super().__init__(rows, width)
        self._parts = parts
        self._cut = cut

    def forward(self, length: int, documents: Tensor | None) -> Tensor:  # type: ignore[override]
        """Embeddings [length, H] of positions held here, or [B, length, H] with `documents` [B, T], which are whole.

        Positions count from 0, or from the start of each document.
        """
        return super().forward(self._cut(position_ids(length * self._parts, documents, self.weight.device)))


def position_ids(length: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Positions [T], or [B, T] counted from the start of each document."""
    steps = torch.arange(length, device=device)
    if documents is None:
        return steps
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(dim=1).values


class RotaryEmbedding(nn.Module):
    """Rotary position embeddings (Su et al., 2021), in the half-split layout of Hugging Face's Llama.

    They rotate pairs (i, i + D/2) of each head by angles position x theta^(-2i/D). All layers share the tables, which
    are no parameters: no state dict holds them.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(max_positions, dtype=torch.float64).unsqueeze(1) * frequencies  # [P, D/2]
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """[B, T, N, D] -> the same, rotated by the T `positions`."""
        cosine = self.cosine[positions].to(x.dtype).unsqueeze(1)  # [T, 1, D/2]
        sine = self.sine[positions].to(x.dtype).unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def uncompiled(function: AnyFunction) -> AnyFunction:
    """Keep a function out of compiled graphs, as `torch.compiler.disable` does.

    That decorator loads the compiler when a module is imported, which takes a second. This one, with which torch
    decorates its own optimizers, loads it at the first call.
    """
    lazily: Callable[[AnyFunction], AnyFunction] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return lazily(function)


@dataclass
class DropoutClock:
    """The seeds of all dropout masks: a function of run seed, step, micro-batch and place (layer and site).

    The engine sets step and micro-batch before each micro-batch; modules only read them. No mask depends on an earlier
    draw, so a resumed run draws the same masks, and so does a block that the backward pass recomputes.

    Attributes:
        now: seed, step and micro-batch as a tensor, which a compiled graph takes as an input; a number would be a
            constant of the graph. Each change makes another tensor: a backward pass may still need the earlier one.
    """

    seed: int
    step: int = 0
    micro_batch: int = 0
    now: Tensor = field(init=False, repr=False, compare=False)

    def __setattr__(self, name: str, value: int) -> None:
        object.__setattr__(self, name, value)
        object.__setattr__(self, "now", _text_tensor(f"{self.seed}/{self.step}/{self.micro_batch}"))

    def seed_at(self, place: str) -> int:
        """A 63-bit seed for `place` at this step and micro-batch."""
        return _seed(f"{self.seed}/{self.step}/{self.micro_batch}", place)


def _seed(now: str, place: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{now}/{place}".encode(), digest_size=8).digest(), "little") >> 1


_TEXT_BYTES = 64  # one length for all: tensors of another shape would be compiled anew


def _text_tensor(text: str) -> Tensor:
    """`text` as bytes in the CPU's memory, padded with zeros."""
    return torch.tensor(list(text.encode().ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8, device="cpu")


def _text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).rstrip(b"\0").decode()


def _dropout_mask(x: Tensor, now: Tensor, place: Tensor, rate: float) -> Tensor:
    generator = torch.Generator(device=x.device).manual_seed(_seed(_text(now), _text(place)))
    return torch.rand(x.shape, generator=generator, device=x.device) >= rate


# An operator of its own, so that a compiled graph calls it and does not break; `torch.library.custom_op` would load the
# compiler at its first call.
_OPERATORS = torch.library.Library("megalm", "DEF")
_OPERATORS.define("dropout_mask(Tensor x, Tensor now, Tensor place, float rate) -> Tensor")
_OPERATORS.impl("dropout_mask", _dropout_mask, "CompositeExplicitAutograd")
torch.library.register_fake(
    "megalm::dropout_mask", lambda x, now, place, rate: torch.empty_like(x, dtype=torch.bool), lib=_OPERATORS
)


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` in training and scales the rest by 1 / (1 - rate)."""

    def __init__(self, rate: float, clock: DropoutClock, place: str) -> None:
        super().__init__()
        self.rate = rate
        self.clock = clock
        self.place = place
        self._place = _text_tensor(place)  # no buffer: it stays on the CPU

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.ops.megalm.dropout_mask(x.detach(), self.clock.now, self._place, self.rate)
        return x * keep * (1.0 / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}, place={self.place!r}"


class RMSNorm(nn.Module):
    """x / rms(x) * weight, without a mean or a bias (Zhang and Sennrich, 2019); rms(x) is taken in fp32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:  # [..., size] -> [..., size]
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def norm(shape: ModelConfig) -> nn.Module:
    """The norm of a style: LayerNorm with bias for gpt2, RMSNorm for llama."""
    if shape.style == "gpt2":
        return nn.LayerNorm(shape.hidden_size, eps=shape.norm_epsilon)
    return RMSNorm(shape.hidden_size, shape.norm_epsilon)
