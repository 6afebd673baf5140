"""Real checkpoints of small models with random weights, as a run writes them: for what reads checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.checkpoint.shard_spec import Fragment, FragmentKey
from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import ModelSection
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.model.model_config import build_model_config
from megalm.model.transformer import LanguageModel, initialize

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
LLAMA = ModelSection(style="llama", num_key_value_heads=2, qk_norm=True, **SIZES)
EXPERTS = ModelSection(num_experts=4, moe_intermediate_size=24, router_scores="sigmoid", expert_bias=True, **SIZES)
GPT2 = ModelSection(style="gpt2", **SIZES)


def write_run(
    run: Path,
    tokenizer: Tokenizer,
    section: ModelSection = LLAMA,
    length: int = 24,
    step: int = 10,
    spoilt: Mapping[str, float] | None = None,
    average: float | None = None,
    **facts: Any,
) -> Path:
    """A checkpoint of `run`; another `step` has other weights, a `spoilt` parameter has that number in every place.

    Args:
        average: the moving average of the weights is this times the weights; None: there is none.
    """
    shape = build_model_config(section, tokenizer.vocab_size, length)
    model = LanguageModel(shape)
    initialize(model, shape, seed=step)
    parts = []
    for name, parameter in model.named_parameters():
        size = tuple(parameter.shape)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(step)) * 0.1
        # Gains of 1 and biases of 0 would hide what is left out.
        values = parameter.detach() + (noise if parameter.ndim == 1 else 0)
        values = torch.full_like(values, (spoilt or {}).get(name, 0)) if name in (spoilt or {}) else values
        parts.append(Fragment(FragmentKey(name, "master", size, 0, parameter.numel()), values.flatten()))
        if average is not None:
            parts.append(Fragment(FragmentKey(name, "ema", size, 0, parameter.numel()), average * values.flatten()))
    for name, size in shape.expert_biases().items():
        values = torch.linspace(-1, 1, size[0])
        parts.append(Fragment(FragmentKey(name, "master", size, 0, size[0]), values))
    data = {"data.sequence_length": length, "data.document_mask": facts.pop("document_mask", False)}
    known = {
        "attempt": 1,
        "tokens": 100 * step,
        "model": asdict(shape),
        "data": data,
        "tokenizer": tokenizer.spec,
        "fingerprints": {"tokenizer": tokenizer.fingerprint},
    }
    return save_checkpoint(run / "checkpoints", step, parts, {**known, **facts}, (), SingleProcessCommunicator())
