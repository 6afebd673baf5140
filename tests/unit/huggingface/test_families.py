"""Each family against transformers' own model of it, made at random: here and there again.

Logits may differ by 1e-5 of their scale, gradients too: both add the same products, in other orders. Sequences are
longer than windows and than the positions of the first training, which scaled rotations stretch.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.config.schema import ModelSection
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.config_json import family_of, section_of, to_config, to_shape
from megalm.huggingface.export_model import export_checkpoint, plan_export
from megalm.huggingface.families import FAMILIES
from megalm.huggingface.pretrained_folder import HuggingFaceFolder
from megalm.inference.generation import CachedModel
from megalm.inference.inference_model import InferenceModel
from megalm.model.model_config import build_model_config
from megalm.model.transformer import LanguageModel
from tests.huggingface_models import save_model
from tests.messages import assert_names

transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
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
_MOE = {**_GROUPED, "num_experts_per_tok": 2}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_PYTHIA = {**_SMALL, "hidden_act": "gelu", "eos_token_id": 256, "bos_token_id": None}

# Name -> (class in transformers, what it is made with, the family that it is exported as).
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {**_GROUPED, "rms_norm_eps": 1e-4}, "llama"),
    "llama-3.1": ("Llama", {**_GROUPED, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}, "llama"),
    "llama-linear": ("Llama", {**_GROUPED, **_BIASES, "rope_parameters": _LINEAR}, "llama"),
    "llama-gelu": ("Llama", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 12, "hidden_act": "gelu"}, "llama"),
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
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": 6, "sliding_window": 8}, "mixtral"),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **_MOE,
            "num_experts": 6,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "head_dim": 16,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
        "qwen3_moe",
    ),
    "olmoe": ("Olmoe", {**_MOE, "num_experts": 6, "intermediate_size": 20}, "olmoe"),
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
    "pythia": (
        "GPTNeoX",
        {**_PYTHIA, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        "gpt_neox",
    ),
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


def gradients_of(theirs: Any, folder: Path) -> HuggingFaceFolder:
    """A model whose weights are the gradients, by the names of files: modules in memory stack experts."""
    model = copy.deepcopy(theirs)
    with torch.no_grad():
        for parameter, own in zip(model.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(own.grad)
    model.save_pretrained(folder)
    return HuggingFaceFolder(folder)


def assert_near(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to 1e-5 of the largest number."""
    scale = float(expected.detach().abs().max())
    error = float((found - expected).detach().abs().max())
    assert scale > 0, what
    assert error <= 1e-5 * max(scale, 1e-3), (what, error / scale)


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_the_same_here_and_there_again(name: str, tmp_path: Path) -> None:
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "hf")
    source = HuggingFaceFolder(tmp_path / "hf")
    shape = source.shape
    assert shape.parameter_count() == sum(parameter.numel() for parameter in theirs.parameters())
    assert build_model_config(ModelSection(**section_of(shape)), vocab_size=1, sequence_length=1) == shape

    model = ours_of(source)
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert_near(model(tokens), expected, "logits")
    total, count = model(tokens[:, :-1], tokens[:, 1:])
    (total / count).backward()
    nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = gradients_of(theirs, tmp_path / "gradients")
    for part in shape.parameters():
        ours = model.get_parameter(part).grad
        assert ours is not None
        assert_near(ours, gradients.read(part), part)

    checkpoint = save_model(tmp_path / "run/checkpoints", shape, model)
    export_checkpoint(
        plan_export(CheckpointReader(checkpoint), tmp_path / "out", torch.float32, None), 1 << 40, "", int
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == CASES[name][2]
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    weights = again.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in theirs.state_dict().items())
    written, stored = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "hf"))
    assert [key for key in sorted(written) if "experts" in key] == [key for key in sorted(stored) if "experts" in key]
    with torch.no_grad():
        assert_near(again.eval()(tokens).logits, expected, "exported")

    cached = CachedModel(InferenceModel(checkpoint))
    lengths = (1, 5, 9, 20, 21, LENGTH)  # steps of several tokens and of one, within windows and beyond
    rows = [cached.next_token_logits(tokens.numpy(), np.array([n - 1, n - 1])) for n in lengths]
    for n, row in zip(lengths, rows, strict=True):
        assert_near(torch.from_numpy(row), expected[:, n - 1].detach(), f"cached to {n}")


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_a_pythia_of_any_version_is_read(head: str, tmp_path: Path) -> None:
    """transformers 5 may call its head otherwise; early versions saved masks and tables."""
    theirs_of("pythia").save_pretrained(tmp_path)
    expected, path = HuggingFaceFolder(tmp_path).read("head.weight"), tmp_path / "model.safetensors"
    weights = {name.replace("lm_head", head).replace("embed_out", head): it for name, it in load_file(path).items()}
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    save_file({**weights, **{f"gpt_neox.layers.0.attention.{name}": torch.ones(4) for name in buffers}}, path)
    assert torch.equal(HuggingFaceFolder(tmp_path).read("head.weight"), expected)


def test_the_scale_of_embeddings_is_rounded_as_theirs(tmp_path: Path) -> None:
    """In bf16 the root of 32 is another number."""
    theirs = theirs_of("gemma3").bfloat16()
    theirs.save_pretrained(tmp_path)
    model = ours_of(HuggingFaceFolder(tmp_path)).bfloat16()
    tokens = torch.arange(VOCAB).unsqueeze(0)
    assert torch.equal(model.embedding(tokens, None), theirs.model.embed_tokens(tokens))


# Of each configuration in the fixture, which is published: the parameters of its tensors, and fields.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen2.5-0.5B": (
        494_032_768,
        {"qkv_bias": True, "attention_output_bias": False, "sliding_window": None, "rope_theta": 1000000.0},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {"sliding_window": 4096, "full_attention_layers": (), "tie_word_embeddings": False},
    ),
    "SmolLM2-135M": (
        134_515_008,
        {"head_dim": 64, "qkv_bias": False},
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        {"no_rope_layers": tuple(range(3, 36, 4)), "tie_word_embeddings": True, "sliding_window": None},
    ),
    "OLMo-3-7B": (
        7_298_011_136,
        {"norm_placement": "post", "qk_norm": "whole", "sliding_window": 4096, "rope_local_theta": None},
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {"full_attention_layers": tuple(range(1, 26, 2)), "attention_scale": None, "attn_logit_softcapping": 50.0},
    ),
    "gemma-3-1b": (
        999_885_952,
        {"full_attention_layers": (5, 11, 17, 23), "rope_local_theta": 10000.0, "norm_zero_centered": True},
    ),
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {"moe_intermediate_size": 14336, "num_experts": 8, "num_experts_per_token": 2, "sliding_window": None},
    ),
    "Qwen3-30B-A3B-Base": (
        30_532_122_624,
        {"moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True, "qk_norm": True},
    ),
    "OLMoE-1B-7B-0924": (
        6_919_161_856,
        {"num_experts": 64, "norm_topk_prob": False, "qk_norm": "whole", "moe_layers": tuple(range(16))},
    ),
    "pythia-70m": (
        70_426_624,
        {"partial_rotary_factor": 0.25, "parallel_residual": True, "hidden_act": "gelu", "qkv_bias": True},
    ),
}
CONFIGS: dict[str, dict[str, Any]] = json.loads((FIXTURES / "huggingface_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read(name: str) -> None:
    parameters, expected = PUBLISHED[name]
    shape = to_shape(CONFIGS[name])
    assert shape.parameter_count() == parameters
    assert {field: getattr(shape, field) for field in expected} == expected
    assert to_shape(to_config(shape, 1, {}, "float32")) == shape


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 writes: no `rope_parameters`."""
    return {key: value for key, value in config.items() if key != "rope_parameters"}


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_of_transformers_are_written_and_read(name: str) -> None:
    kind, words, _ = CASES[name]
    theirs = getattr(transformers, _CONFIGS.get(kind, f"{kind}Config"))(**words).to_dict()
    shape = to_shape(theirs)
    written = to_config(shape, 1, {}, "float32")
    older = _older(written)
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "rotary_pct")}
    newer = {key: value for key, value in newer.items() if key not in ("rotary_emb_base", "rope_local_base_freq")}
    assert to_shape(written) == to_shape(older) == to_shape(newer) == shape


def _changed(name: str, **changes: Any) -> dict[str, Any]:
    """What is published, with changes."""
    return {**CONFIGS[name], **changes}


_SCALED = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (_changed("Mistral-7B-v0.1", rope_scaling=_SCALED), ["rope_scaling=linear", "sliding_window=4096"]),
        (_changed("Mistral-7B-v0.1", layer_types=["sliding_attention"] * 32), ["layer_types"]),
        (_changed("Mistral-7B-v0.1", num_key_value_heads=None), ["num_key_value_heads"]),
        (
            _changed("Qwen2.5-0.5B", use_sliding_window=True, max_window_layers=2, rope_scaling=_SCALED),
            ["rope_scaling"],
        ),
        (_changed("Qwen2.5-0.5B", head_dim=32), ["head_dim=32"]),
        (_changed("SmolLM3-3B", no_rope_layers=[1, 0]), ["no_rope_layers=[1, 0]"]),
        (_changed("SmolLM3-3B", no_rope_layers=[2] * 36), ["no_rope_layers"]),
        (_changed("OLMo-3-7B", layer_types=None, rope_theta=None), ["rope_theta"]),
        (_changed("OLMo-3-7B", clip_qkv=8.0), ["clip_qkv=8.0"]),
        (
            _changed("OLMo-3-7B", rope_parameters={"sliding_attention": {**_SCALED, "rope_theta": 5e5}}),
            ["rope_parameters"],
        ),
        (_changed("OLMo-3-7B", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), ["rope_parameters"]),
        (
            _changed("OLMo-3-7B", rope_scaling=None, rope_parameters={"full_attention": {**_YARN, "truncate": False}}),
            ["rope_parameters.full_attention.truncate=False"],
        ),
        (
            _changed("gemma-3-1b", rope_parameters={"sliding_attention": {"rope_theta": 5e5}}),
            ["rope_local_base_freq=10000"],
        ),
        (_changed("gemma-3-1b", attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0"]),
        (_changed("gemma-3-1b", use_bidirectional_attention=True), ["use_bidirectional_attention=True"]),
        (_changed("gemma-3-1b", layer_types=["sliding_attention"] * 26), ["sliding_window_pattern=6", "layer_types"]),
        (_changed("gemma-3-1b", sliding_window_pattern=0), ["sliding_window_pattern=0"]),
        (_changed("gemma-3-1b", query_pre_attn_scalar=0), ["query_pre_attn_scalar=0"]),
        (_changed("gemma-2-2b", hidden_act="silu"), ["hidden_act='silu'"]),
        (_changed("Mixtral-8x7B-v0.1", router_jitter_noise=0.1), ["router_jitter_noise=0.1"]),
        (_changed("Mixtral-8x7B-v0.1", num_local_experts=None), ["num_local_experts"]),
        (_changed("Qwen3-30B-A3B-Base", num_local_experts=64), ["num_local_experts=64", "num_experts=128"]),
        (_changed("Qwen3-30B-A3B-Base", use_sliding_window=True), ["use_sliding_window=True"]),
        (_changed("Qwen3-30B-A3B-Base", decoder_sparse_step=0), ["decoder_sparse_step=0"]),
        (_changed("Qwen3-30B-A3B-Base", mlp_only_layers=3), ["mlp_only_layers=3"]),
        (_changed("OLMoE-1B-7B-0924", clip_qkv=8.0), ["clip_qkv=8.0"]),
        (_changed("pythia-70m", rope_theta=5e5), ["rotary_emb_base=10000", "rope_theta=500000.0"]),
        (_changed("pythia-70m", rope_parameters={"partial_rotary_factor": 0.5}), ["rotary_pct=0.25"]),
        (_changed("pythia-70m", rotary_pct=0.02), ["head_dim=64"]),
    ],
)
def test_what_means_another_model_is_refused(config: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        to_shape(config)
    assert_names(refused.value, *names)


def test_a_scale_that_no_key_can_state_is_not_exported() -> None:
    shape = to_shape(CONFIGS["gemma-3-1b"])
    assert (
        to_config(replace(shape, attention_scale=1 / math.sqrt(168)), 1, {}, "float32")["query_pre_attn_scalar"] == 168
    )
    for changes in ({"attention_scale": 0.3}, {"embedding_scale": 34.0}, {"mlp_bias": True}):
        with pytest.raises(CheckpointError) as refused:
            family_of(replace(shape, **changes))
        name, value = list(changes.items())[-1]
        assert_names(refused.value, f"model.{name}={json.dumps(value)}", "Gemma3ForCausalLM")


def test_choices_without_effect_stand_in_no_ones_way() -> None:
    shape = to_shape(CONFIGS["SmolLM2-135M"])
    idle = {"rope_local_theta": 5.0, "full_attention_layers": (1,), "embedding_scale": 1.0, "attention_scale": 1 / 8}
    assert family_of(replace(shape, **idle)) is FAMILIES["llama"]
    assert family_of(replace(shape, sliding_window=8, full_attention_layers=tuple(range(30)))) is FAMILIES["llama"]
    shape = to_shape(CONFIGS["Mixtral-8x7B-v0.1"])
    assert family_of(replace(shape, intermediate_size=100)) is FAMILIES["mixtral"]


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("Mixtral-8x7B-v0.1", {"router_scores": "sigmoid"}, "model.router_scores"),
        ("Mixtral-8x7B-v0.1", {"num_shared_experts": 1}, "model.num_shared_experts"),
        ("Mixtral-8x7B-v0.1", {"moe_layers": (1, 3)}, "model.moe_layers"),
        ("OLMoE-1B-7B-0924", {"routed_scaling_factor": 2.5}, "model.routed_scaling_factor"),
    ],
)
def test_experts_that_no_class_computes_are_not_exported(name: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        family_of(replace(to_shape(CONFIGS[name]), **changes))
    assert_names(refused.value, named)
