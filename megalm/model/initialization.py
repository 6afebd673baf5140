"""Initial weights as a function of (seed, canonical name), so that every layout starts from the same model."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from megalm.model.model_config import ModelConfig
from megalm.model.param_shard import shard_of

_RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")


def initial_weight(name: str, size: tuple[int, ...], shape: ModelConfig, seed: int) -> Tensor:
    """The full, unsharded fp32 weight `name` on the CPU.

    Norm gains are 1, biases 0, matrices normal with `initializer_range`; the projections that write to the
    residual stream are divided by sqrt(2 x layers), as in GPT-2 (Radford et al., 2019).
    """
    if name.endswith(".bias"):
        return torch.zeros(size)
    if "norm" in name:
        return torch.ones(size)
    std = shape.initializer_range
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * shape.num_hidden_layers)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(size, generator=generator) * std


@torch.no_grad()
def initialize(model: nn.Module, shape: ModelConfig, seed: int) -> None:
    """Fill every parameter; a shared weight is filled once, under its first name.

    A sharded one is cut out of the whole weight, so all layouts start equal, bit for bit; one whole weight exists at
    a time.
    """
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        parameter.copy_(shard.cut(initial_weight(name, shard.shape, shape, seed)))
