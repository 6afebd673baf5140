"""A trainer in nanoGPT's way, to compare with: one file, fp32 weights under autocast, the whole model as one graph.

The architecture is GPT-2's (tied embeddings, biases, tanh-GELU), the loop nanoGPT's: random crops of a memory-mapped
file, cross-entropy over all logits at once, clipping at 1, AdamW, one line a step. AdamW is torch's fused one on a CPU
too, which nanoGPT takes on CUDA only: the faster choice.

    python benchmarks/nanogpt.py --tokens FILE.bin --layers 4 --hidden 256 --heads 4 --vocabulary 8192 --sequence 256 \
        --batch 16 --steps 40 [--precision bf16] [--no-compile]

prints a JSON line a step: {"step": 1, "loss": ..., "time": seconds since 1970}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch.

    Attributes:
        batch: sequences of a step.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.output = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        batch, length, width = hidden.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(hidden).split(width, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).contiguous().view(batch, length, width))


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.hidden)
        self.attention = _Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.hidden)
        self.up = nn.Linear(shape.hidden, 4 * shape.hidden)
        self.down = nn.Linear(4 * shape.hidden, shape.hidden)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.down(functional.gelu(self.up(self.mlp_norm(hidden)), approximate="tanh"))


class NanoGPT(nn.Module):
    """[B, T] tokens and [B, T] labels -> the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.positions = nn.Embedding(shape.sequence, shape.hidden)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.layers) if is_residual else 1.0))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.final_norm(hidden))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def nanogpt_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help="token ids as uint16, one after another")
    sizes = [field.name for field in fields(Shape)]
    for name in (*sizes, "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1337)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(**{name: getattr(arguments, name) for name in sizes})
    model = NanoGPT(shape).to(device)
    optimizer = nanogpt_optimizer(model, 1e-3)
    forward = model if arguments.no_compile else torch.compile(model)

    def next_batch() -> tuple[Tensor, Tensor]:
        data = np.memmap(arguments.tokens, dtype=np.uint16, mode="r")  # anew each time: nanoGPT's cure for a leak
        places = torch.randint(len(data) - shape.sequence, (shape.batch,))
        rows = [torch.from_numpy(data[at : at + shape.sequence + 1].astype(np.int64)) for at in places.tolist()]
        whole = torch.stack(rows).to(device)
        return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()

    tokens, labels = next_batch()
    for step in range(1, arguments.steps + 1):
        rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * step / arguments.steps)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = forward(tokens, labels)
        tokens, labels = next_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sys.stdout.write(json.dumps({"step": step, "loss": loss.item(), "time": time.time()}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
