"""Activation checkpointing: what each mode costs in time and saves in memory.

    python benchmarks/recompute.py [--layers 8] [--hidden 512] [--sequence 512] [--batch 8] [--repeats 5]

Forward and backward of the plain model in bf16, the modes in turn within one run. Memory is what autograd keeps from
the forward pass for the backward pass (every saved storage once, parameters left out), plus, with recomputation, the
one block that is being recomputed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megalm.config.schema import ModelSection
from megalm.engine.device import tune_malloc
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.transformer import LanguageModel, initialize

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
    models = {name: _model(shape, every, device) for name, every in (("none", 0), ("every 2nd", 2), ("every block", 1))}
    tokens = torch.randint(0, VOCABULARY, (arguments.batch, arguments.sequence), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(arguments.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            loss, _ = model(tokens, tokens)
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{shape.parameter_count():,} parameters, {arguments.batch} x {arguments.sequence} tokens, bf16, "
        f"torch {torch.__version__}"
    )
    print(f"{'recomputed':14}{'s/step':>9}{'kept MiB':>10}")
    for name, model in models.items():
        print(f"{name:14}{statistics.median(seconds[name]):9.3f}{_kept_bytes(model, tokens) / 2**20:10.1f}")


def _model(shape: ModelConfig, every: int, device: torch.device) -> LanguageModel:
    model = LanguageModel(shape, chunk_tokens=256, recompute_every=every)
    initialize(model, shape, 1)
    return model.to(device, torch.bfloat16)


def _kept_bytes(model: LanguageModel, tokens: torch.Tensor) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model(tokens, tokens)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    main()
