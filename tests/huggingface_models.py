"""Small models with checkpoints as a run writes them, for what publishes and takes over models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.checkpoint.shard_spec import Fragment, FragmentKey
from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import ModelSection, RopeScaling
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.model.model_config import ModelConfig, build_model_config, model_settings
from megalm.model.transformer import LanguageModel, initialize

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
SECTIONS = {
    "llama": ModelSection(style="llama", **SIZES),
    "llama-gqa-tied": ModelSection(
        style="llama", num_key_value_heads=2, tie_word_embeddings=True, rope_theta=500.0, norm_epsilon=1e-4, **SIZES
    ),
    "llama-head-dim": ModelSection(style="llama", head_dim=10, intermediate_size=72, **SIZES),
    "qk-norm": ModelSection(style="llama", num_key_value_heads=1, qk_norm=True, **SIZES),
    "qk-norm-tied": ModelSection(style="llama", qk_norm=True, tie_word_embeddings=True, head_dim=12, **SIZES),
    "gpt2": ModelSection(style="gpt2", dropout=0.1, attention_dropout=0.2, **SIZES),
    "gpt2-untied": ModelSection(style="gpt2", tie_word_embeddings=False, intermediate_size=40, **SIZES),
}

_DEEP = {**SIZES, "num_hidden_layers": 7, "num_key_value_heads": 2}
_GEMMA = ModelSection(
    norm_placement="both",
    norm_zero_centered=True,
    hidden_act="gelu_pytorch_tanh",
    embedding_scale=32**0.5,
    tie_word_embeddings=True,
    head_dim=16,
    sliding_window=8,
    **_DEEP,
)
_OLMO = {"norm_placement": "post", "qk_norm": "whole"}
_MOE = {"num_experts": 5, "num_experts_per_token": 2}
_YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)
# Of the other families, by the `model_type` that they are exported as.
FAMILIES = {
    "qwen2": ModelSection(qkv_bias=True, num_key_value_heads=2, **SIZES),
    "mistral": ModelSection(num_key_value_heads=2, sliding_window=8, **SIZES),
    "olmo2": ModelSection(**_OLMO, num_key_value_heads=2, **SIZES),
    "olmo3": ModelSection(**_OLMO, sliding_window=8, full_attention_layers=4, rope_scaling=_YARN, **_DEEP),
    "mixtral": ModelSection(num_key_value_heads=2, **_MOE, **SIZES),
    "qwen3_moe": ModelSection(qk_norm=True, head_dim=16, moe_intermediate_size=24, **_MOE, **SIZES),
    "olmoe": ModelSection(qk_norm="whole", norm_topk_prob=False, **_MOE, **SIZES),
    "smollm3": ModelSection(no_rope_layers=4, tie_word_embeddings=True, **_DEEP),
    "gemma2": _GEMMA.model_copy(
        update={"full_attention_layers": 2, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    ),
    "gemma3_text": _GEMMA.model_copy(
        update={
            "qk_norm": True,
            "full_attention_layers": 6,
            "rope_theta": 500.0,
            "rope_local_theta": 10_000.0,
            "rope_scaling": RopeScaling(rope_type="linear", factor=3.0),
        }
    ),
    "gpt_neox": ModelSection(
        style="gpt2",
        position_embedding_type="rope",
        partial_rotary_factor=0.5,
        parallel_residual=True,
        hidden_act="gelu",
        tie_word_embeddings=False,
        **SIZES,
    ),
}
LLAMA_3 = ModelSection(
    num_key_value_heads=2,
    rope_scaling=RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=12),
    **SIZES,
)


def random_model(section: ModelSection, vocab_size: int = 257, length: int = 40) -> tuple[ModelConfig, LanguageModel]:
    """With gains other than 1 and biases other than 0, which would hide a swapped pair; in evaluation."""
    shape = build_model_config(section, vocab_size, length)
    model = LanguageModel(shape, chunk_tokens=7)
    initialize(model, shape, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return shape, model.eval()


def save_model(
    checkpoints: Path,
    shape: ModelConfig,
    model: LanguageModel,
    tokenizer: str = "bytes",
    **facts: Any,
) -> Path:
    """A checkpoint of one rank with what an export asks a manifest for."""
    known = {
        "tokens": 0,
        "created": "2026-11-20T12:00:00+00:00",
        "run": checkpoints.parent.name,
        "parameters": shape.parameter_count(),
        "model": model_settings(shape),
        "fingerprints": {"tokenizer": load_tokenizer(tokenizer).fingerprint},
        "tokenizer": tokenizer,
    }
    return save_checkpoint(
        checkpoints, 7, list(_fragments(shape, model)), {**known, **facts}, [], SingleProcessCommunicator()
    )


def _fragments(shape: ModelConfig, model: LanguageModel) -> Iterator[Fragment]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, size in shape.parameters().items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            values = weights[name] if kind == "master" else torch.full(size, 0.5)
            yield Fragment(FragmentKey(name, kind, size, 0, math.prod(size)), values.reshape(-1))
