"""Each family against transformers' own model of it, made at random: here and there again.

Logits may differ by 1e-5 of their scale, gradients too: both add the same products, in other orders. Sequences are
longer than windows and than the positions of the first training, which scaled rotations stretch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.config.schema import ModelSection
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.config_json import family_of, section_of, to_config, to_shape
from megalm.huggingface.export_model import export_checkpoint, plan_export
from megalm.huggingface.export_weights import from_hf
from megalm.huggingface.families import FAMILIES
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.huggingface.weight_mapping import hf_tensors
from megalm.inference.generation import CachedModel
from megalm.inference.inference_model import InferenceModel
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.transformer import LanguageModel
from tests.huggingface_models import save_model
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

LENGTH, VOCAB = 48, 300
_ROWS = {"vocab_size": VOCAB, "initializer_range": 0.2, "max_position_embeddings": LENGTH}
_SMALL = {**_ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 256}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 12, "rope_theta": 500.0}
_LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "rope_theta": 500.0}
_LOCAL = {"rope_type": "default", "rope_theta": 100.0}
_GEMMA = {**_GROUPED, "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_PYTHIA = {**_SMALL, "hidden_act": "gelu", "eos_token_id": 256, "bos_token_id": None}

# Name -> (class in transformers, what it is made with, the family that it is exported as).
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {**_GROUPED, "rms_norm_eps": 1e-4}, "llama"),
    "llama-3.1": ("Llama", {**_GROUPED, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}, "llama"),
    "llama-linear": ("Llama", {**_GROUPED, **_BIASES, "rope_parameters": _LINEAR}, "llama"),
    "llama-gelu": ("Llama", {**_GROUPED, "head_dim": 12, "hidden_act": "gelu"}, "llama"),
    "qwen2": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}, "qwen2"),
    "qwen2-window": (
        "Qwen2",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "qwen2",
    ),
    "qwen2-yarn": ("Qwen2", {**_GROUPED, "rope_parameters": _YARN}, "qwen2"),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16, "attention_bias": True}, "qwen3"),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 8}, "mistral"),
    "mistral-full": ("Mistral", {**_GROUPED, "sliding_window": None, "head_dim": 10}, "llama"),
    "olmo2": ("Olmo2", {**_GROUPED, "attention_bias": True}, "olmo2"),
    "olmo3": (
        "Olmo3",
        {
            **_GROUPED,
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "rope_parameters": {"full_attention": _YARN, "sliding_attention": {**_LOCAL, "rope_theta": 500.0}},
        },
        "olmo3",
    ),
    "smollm3": ("SmolLM3", {**_GROUPED, "num_hidden_layers": 5}, "smollm3"),
    "smollm3-window": (
        "SmolLM3",
        {**_GROUPED, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
        "smollm3",
    ),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}, "gemma2"),
    "gemma3": (
        "Gemma3",
        {**_GEMMA, "rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _LOCAL}},
        "gemma3_text",
    ),
    "pythia": ("GPTNeoX", {**_PYTHIA, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, "gpt_neox"),
    "pythia-serial": ("GPTNeoX", {**_PYTHIA, "use_parallel_residual": False, "attention_bias": False}, "gpt_neox"),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "initializer_range": 0.2},
        "gpt2",
    ),
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def theirs_of(name: str) -> Any:
    """Their model with gains other than 1 and biases other than 0, which would hide a swapped pair."""
    kind, words, _ = CASES[name]
    config = getattr(transformers, _CONFIGS.get(kind, f"{kind}Config"))(**words)
    config._attn_implementation = "eager"  # the others have no soft caps
    torch.manual_seed(5)
    model = getattr(transformers, _HEADS.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def ours_of(folder: HuggingFaceFolder) -> LanguageModel:
    model = LanguageModel(folder.shape, chunk_tokens=7).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(folder.read(name))
    return model


def assert_near(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to 1e-5 of the largest number."""
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max())
    assert scale > 0, what
    assert error <= 1e-5 * max(scale, 1e-3), (what, error / scale)


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_the_same_here_and_there_again(name: str, tmp_path: Path) -> None:
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "hf")
    source = HuggingFaceFolder(tmp_path / "hf")
    shape, family = source.shape, FAMILIES[json.loads((tmp_path / "hf/config.json").read_text())["model_type"]]
    assert shape.parameter_count() == sum(parameter.numel() for parameter in theirs.parameters())
    assert build_model_config(ModelSection(**section_of(shape)), vocab_size=1, sequence_length=1) == shape

    model = ours_of(source)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert_near(model(tokens), expected, "logits")
    total, count = model(tokens[:, :-1], tokens[:, 1:])
    (total / count).backward()
    nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {key.replace("lm_head.", f"{family.names.head}."): value.grad for key, value in theirs.named_parameters()}
    for tensor in hf_tensors(shape, family):
        for part, _ in tensor.parts:
            ours = model.get_parameter(part).grad
            assert ours is not None
            assert_near(ours, from_hf(tensor, gradients[tensor.name], part), part)

    checkpoint = save_model(tmp_path / "run/checkpoints", shape, model)
    export_checkpoint(plan_export(CheckpointReader(checkpoint), tmp_path / "out", torch.float32, None), 1 << 40, "", int)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == CASES[name][2]
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    weights = again.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in theirs.state_dict().items())
    with torch.no_grad():
        assert_near(again.eval()(tokens).logits, expected, "exported")

    cached = CachedModel(InferenceModel(checkpoint))
    lengths = (1, 5, 9, 20, 21, LENGTH)  # steps of several tokens and of one, within windows and beyond
    rows = [cached.next_token_logits(tokens.numpy(), np.array([n - 1, n - 1])) for n in lengths]
    for n, row in zip(lengths, rows, strict=True):
        assert_near(torch.from_numpy(row), expected[:, n - 1].detach(), f"cached to {n}")


def of(name: str) -> ModelConfig:
    return to_shape(json.loads(theirs_config(name)))


def theirs_config(name: str) -> str:
    kind, words, _ = CASES[name]
    config = getattr(transformers, _CONFIGS.get(kind, f"{kind}Config"))(**words)
    return str(config.to_json_string(use_diff=False))
