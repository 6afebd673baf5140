"""Measure a forward and backward pass of each part of the model on this machine, to balance a pipeline.

Shapes: B micro-batch, T sequence (of which this rank may hold a slice), H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalm.communicator import Communicator
from megalm.cost_model.pipeline_balance import StageCosts
from megalm.model.transformer import StageBuilder

_REPEATS = 3


def measured_costs(
    build: StageBuilder, tokens: tuple[int, int], dtype: torch.dtype, device: torch.device, comm: Communicator
) -> StageCosts:
    """Return the seconds of embedding, one block, and head with loss, each of the slowest rank: equal on all ranks.

    Collective. The parts exist only while they are measured, one at a time.

    Args:
        tokens: B, T of a micro-batch.
        dtype: the model's compute type.
    """
    shape = build.shape
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    size = (tokens[0], tokens[1] // build.slices, shape.hidden_size)
    hidden = torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    def seconds(make: Callable[[], nn.Module], forward: Callable[[nn.Module], Tensor]) -> float:
        return _seconds(_filled(make()).to(device, dtype), forward, device)

    costs = [
        seconds(build.embedding, lambda embedding: embedding(ids, None).sum()),
        seconds(lambda: build.block(0), lambda block: block(hidden, None).sum()),
        seconds(lambda: _End(build), lambda end: end(hidden, ids)),
    ]
    return StageCosts(*comm.max(costs))


class _End(nn.Module):
    """Final norm and head of the last stage: [B, T, H], [B, T] -> loss."""

    def __init__(self, build: StageBuilder) -> None:
        super().__init__()
        self.norm = build.final_norm()
        self.head = build.head(build.token_table() if build.shape.tie_word_embeddings else None)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss, _ = self.head(self.norm(hidden), labels)
        return loss


def _seconds(module: nn.Module, forward: Callable[[nn.Module], Tensor], device: torch.device) -> float:
    """Return the seconds of the fastest of a few passes, after one warm-up pass."""
    fastest = float("inf")
    for repeat in range(1 + _REPEATS):
        _wait(device)
        start = time.perf_counter()
        forward(module).backward()
        _wait(device)
        if repeat > 0:
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    """Fill the weights: the builder leaves them uninitialized, and arbitrary values may be slow to compute with."""
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    return module


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
