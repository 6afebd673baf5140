"""The small modules of the model: position embeddings, rotary embeddings, dropout and norms.

Shapes: B batch, T sequence, N heads, D head dimension, H hidden, P positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.config.schema import Activation, RopeScaling
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

    They rotate pairs (i, i + R/2) of the first R dimensions of each head by angles position x theta^(-2i/R). Layers
    share the tables, which are no parameters: no state dict holds them.

    Args:
        rotary_dim: R.
        scaling: of the frequencies.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, rotary_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        frequencies, factor = rotary_frequencies(rotary_dim, theta, scaling)
        angles = torch.arange(max_positions, dtype=torch.float64).unsqueeze(1) * frequencies  # [P, R/2]
        self.rotary_dim = rotary_dim
        self.register_buffer("cosine", (angles.cos() * factor).float(), persistent=False)
        self.register_buffer("sine", (angles.sin() * factor).float(), persistent=False)

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """[B, T, N, D] -> the same, rotated by the T `positions`."""
        cosine = self.cosine[positions].to(x.dtype).unsqueeze(1)  # [T, 1, R/2]
        sine = self.sine[positions].to(x.dtype).unsqueeze(1)
        first, second, rest = x.split((sine.shape[-1], sine.shape[-1], x.shape[-1] - self.rotary_dim), dim=-1)
        rotated = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat((*rotated, rest) if rest.shape[-1] else rotated, dim=-1)


def rotary_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Return radians per position [R/2] in fp64, and the factor of the rotated vectors.

    The scalings are those of transformers' `modeling_rope_utils`: positions divided by the factor (linear; Chen et
    al., 2023), only those of waves that the first training saw less than one of (llama3), or a ramp between both by
    the number of waves in it (YaRN; Peng et al., 2023).
    """
    plain = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    if scaling is None:
        return plain, 1.0
    stretched = plain / scaling.factor
    if scaling.rope_type == "linear":
        return stretched, 1.0
    positions = scaling.original_max_position_embeddings
    assert positions is not None  # planning/run_checks.py
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((positions * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return kept * plain + (1 - kept) * stretched, 1.0

    def dimension_with(waves: float) -> float:
        return rotary_dim * math.log(positions / (waves * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_with(scaling.beta_fast), dimension_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    steps = torch.arange(rotary_dim // 2, dtype=torch.float64)
    slowed = ((steps - first) / max(last - first, 0.001)).clamp(0, 1)
    own_factor = 0.1 * math.log(scaling.factor) + 1
    return slowed * stretched + (1 - slowed) * plain, scaling.attention_factor or own_factor


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
    """x / rms(x) * gain, without a mean or a bias (Zhang and Sennrich, 2019); rms(x) is taken in fp32.

    Args:
        zero_centered: the gain is 1 + weight, as in Gemma.
    """

    def __init__(self, size: int, epsilon: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon
        self.zero_centered = zero_centered

    def gain(self) -> Tensor:
        # In fp32: bf16 holds no number between 1 and 1.0078.
        return 1 + self.weight.float() if self.zero_centered else self.weight

    def forward(self, x: Tensor) -> Tensor:  # [..., size] -> [..., size]
        if not self.zero_centered or x.dtype == self.weight.dtype == torch.float32:
            return functional.rms_norm(x, self.weight.shape, self.gain(), self.epsilon)
        return (functional.rms_norm(x.float(), self.weight.shape, None, self.epsilon) * self.gain()).to(x.dtype)


def norm(shape: ModelConfig) -> nn.Module:
    """LayerNorm with bias, or RMSNorm."""
    if shape.normalization == "layer_norm":
        return nn.LayerNorm(shape.hidden_size, eps=shape.norm_epsilon)
    return RMSNorm(shape.hidden_size, shape.norm_epsilon, shape.norm_zero_centered)


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()  # So et al., 2021


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "silu": functional.silu,
    "relu2": _squared_relu,
}
