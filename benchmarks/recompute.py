"""Activation checkpointing: what each mode costs in time and saves in memory.

    python -m benchmarks recompute [--layers 8] [--hidden 512] [--sequence 512] [--batch 8] [--repeats 5]

Forward and backward of the plain model in bf16, the modes in turn within one run. Beside each other stand what is alive
after the forward pass and what the plan says; and the operations of the backward pass beyond those without
recomputation, and what the plan says.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from megalm.config.deepspeed.json_schema import ZeroSection
from megalm.config.schema import ModelSection, Recompute
from megalm.cost_model.memory import MemoryCase, shares
from megalm.cost_model.moments import kept_bytes
from megalm.engine.device import tune_malloc, wait_for
from megalm.model.model_config import ModelConfig, build_model_config, recomputed_flops_per_token
from megalm.model.recomputation import Recomputation
from megalm.model.transformer import LanguageModel, initialize
from megalm.topology import Topology
from tests.live_memory import LiveMemory

VOCABULARY = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 8), ("hidden", 512), ("sequence", 512), ("batch", 8), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    tune_malloc()  # as a run does
    section = ModelSection(
        style="gpt2",
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
    )
    shape = build_model_config(section, VOCABULARY, arguments.sequence)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices: dict[str, tuple[int, Recompute]] = {kind: (0, kind) for kind in get_args(Recompute)}
    choices["every 2nd"] = 2, "none"
    models = {name: _model(shape, *choice, device) for name, choice in choices.items()}
    tokens = torch.randint(0, VOCABULARY, (arguments.batch, arguments.sequence), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(arguments.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            loss, _ = model(tokens, tokens)
            loss.backward()
            wait_for(device)
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{shape.parameter_count():,} parameters, {arguments.batch} x {arguments.sequence} tokens, bf16, "
        f"torch {torch.__version__}"
    )
    headings = ("recomputed", "s/step", "kept MiB", "planned", "again GFLOP", "planned")
    print("".join(f"{heading:>12}" for heading in headings))
    plain = _again(models["none"], tokens)
    for name, (every, kind) in choices.items():
        kept, planned = _kept_bytes(models[name], tokens), _planned_bytes(shape, arguments, every, kind, device)
        again = _again(models[name], tokens) - plain
        expected = recomputed_flops_per_token(shape, arguments.sequence, kind, every) * tokens.numel()
        numbers = statistics.median(seconds[name]), kept / 2**20, planned / 2**20, again / 1e9, expected / 1e9
        print(f"{name:>12}" + "".join(f"{number:12.3f}" for number in numbers))


def _planned_bytes(
    shape: ModelConfig, sizes: argparse.Namespace, every: int, kind: Recompute, device: torch.device
) -> int:
    case = MemoryCase(
        shape=shape,
        sequence_length=sizes.sequence,
        micro_batch=sizes.batch,
        accumulation=1,
        precision="bf16",
        gradient_precision="fp32",
        communication_precision="fp32",
        zero=ZeroSection(stage=1),
        topology=Topology(1),
        checkpoint_activations_every=every,
        recompute=kind,
        on_cpu=device.type == "cpu",
    )
    (share,) = shares(shape, case.topology)
    return kept_bytes(case, share)[0]


def _again(model: LanguageModel, tokens: torch.Tensor) -> int:
    """Operations of the backward pass."""
    loss, _ = model(tokens, tokens)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def _model(shape: ModelConfig, every: int, recompute: Recompute, device: torch.device) -> LanguageModel:
    model = LanguageModel(shape, chunk_tokens=256, recomputation=Recomputation(recompute, every))
    initialize(model, shape, 1)
    return model.to(device, torch.bfloat16)


def _kept_bytes(model: LanguageModel, tokens: torch.Tensor) -> int:
    """What is alive after the forward pass, less the gradients that the loss makes in it."""
    with LiveMemory() as memory:
        loss, _ = model(tokens, tokens)
    kept = memory.bytes
    del loss
    weight = model.head.weight
    return kept - 4 * weight.numel() - tokens.numel() * weight.shape[1] * weight.element_size()
