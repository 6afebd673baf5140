"""Llamas of transformers that plain DeepSpeed trains, and the universal checkpoints that its own tool makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}},
}
SAVED, STEPS, RATE = "global_step3", 3, 1e-3
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
State = dict[str, dict[str, npt.NDArray[np.float32]]]  # kind -> name in transformers -> values


def write_config(folder: Path, vocab_size: int, **changes: Any) -> Path:
    """The model's config.json."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, "vocab_size": vocab_size, **changes}))
    return path


def build(config: Path, stage: int, precision: str = "fp32", grouped: bool = True) -> Any:
    """A DeepSpeed engine as a user builds it.

    Args:
        grouped: matrices decay but for the embedding, as in megalm; else all is one group.
    """
    import deepspeed
    import transformers
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # on a CPU it is slow, but works

    torch.manual_seed(0)
    stated = json.loads(config.read_text())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**stated))
    groups: dict[float, list[Any]] = {0.1: [], 0.0: []}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and "embed" not in name
        groups[0.1 if decays or not grouped else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for decay, members in groups.items() if members],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **PRECISIONS[precision],
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def train_step(engine: Any, tokens: torch.Tensor, labels: torch.Tensor, factor: float = 1.0) -> float:
    """One step on [B, T] tokens and labels, on the loss times a factor; the loss before it."""
    logits = engine(input_ids=tokens).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    engine.backward(loss * factor)
    engine.step()
    return float(loss.detach())


def train_and_save(
    comm: Any, device: torch.device, config: Path, runs: dict[Path, tuple[int, str]], grouped: bool
) -> list[tuple[State, dict[str, Any]]]:
    """Train a run in each folder, at a ZeRO stage in a precision, and make its checkpoint universal.

    Returns:
        the state and counters of each, as DeepSpeed itself says it; if `grouped` no state, for it knows only that of
        the first group.
    """
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = []
    vocab_size = json.loads(config.read_text())["vocab_size"]
    for folder, (stage, precision) in runs.items():
        engine = build(config, stage, precision, grouped)
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * step + comm.rank)
            tokens = torch.randint(0, vocab_size, (2, 25), generator=generator)
            overflows = precision == "fp16" and step == 1  # and DeepSpeed skips the step
            train_step(engine, tokens[:, :-1], tokens[:, 1:], math.inf if overflows else 1.0)
        engine.save_checkpoint(str(folder), tag=SAVED)
        state: State = {"master": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in () if grouped else engine.module.named_parameters():
            values = {"master": safe_get_full_fp32_param(parameter)}
            values |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")}
            for kind, tensor in values.items():
                state[kind][name] = tensor.detach().numpy().copy()
        scaler = vars(engine.optimizer.loss_scaler)
        counters = {
            "optimizer_step": STEPS - engine.skipped_steps,
            "skipped_steps": engine.skipped_steps,
            "loss_scaler": {key: scaler[key] for key in SCALER} if precision == "fp16" else {},
        }
        states.append((state, counters))
        if comm.is_main:
            words = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
            places = {"input_folder": str(folder / SAVED), "output_folder": str(folder / f"{SAVED}_universal")}
            ds_to_universal.main(SimpleNamespace(**places, **words, inject_missing_state=True))
    return states


def train_further(
    comm: Any, device: torch.device, config: Path, folder: Path, batches: list[tuple[Any, Any]]
) -> list[float]:
    """DeepSpeed's own continuation of a run of ZeRO 2, with the learning rate that it had: the losses."""
    engine = build(config, 2)
    engine.load_checkpoint(str(folder), tag=SAVED)
    return [train_step(engine, torch.as_tensor(tokens), torch.as_tensor(labels)) for tokens, labels in batches]
