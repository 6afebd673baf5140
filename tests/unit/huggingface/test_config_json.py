"""config.json: there and back, and everything that megalm's model cannot do refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.config.schema import ModelSection
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.config_json import family_of, section_of, to_config, to_shape
from megalm.huggingface.weight_mapping import hf_tensors
from megalm.model.model_config import ModelConfig, build_model_config
from tests.huggingface_models import SECTIONS, SIZES
from tests.messages import assert_names

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
QWEN3 = {
    **LLAMA,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": ["full_attention", "full_attention"],
}
# As the first GPT-2 was published, without what later versions of transformers would add.
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def shape_of(section: ModelSection) -> ModelConfig:
    return build_model_config(section, 257, 40)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_shape_comes_back(name: str) -> None:
    shape = shape_of(SECTIONS[name])
    assert to_shape(to_config(shape, eod_id=1, special={}, dtype="float32")) == shape
    assert build_model_config(ModelSection(**section_of(shape)), vocab_size=1, sequence_length=1) == shape


@pytest.mark.parametrize("name", SECTIONS)
def test_every_parameter_is_in_one_tensor_of_theirs(name: str) -> None:
    shape = shape_of(SECTIONS[name])
    tensors = hf_tensors(shape)
    parts = [part for tensor in tensors for part, _ in tensor.parts]
    assert sorted(parts) == sorted(shape.parameters())
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_published_configurations_are_read() -> None:
    gpt2 = to_shape(GPT2)
    assert (gpt2.parameter_count(), gpt2.intermediate_size, gpt2.dropout) == (124_439_808, 3072, 0.1)
    assert to_shape({**GPT2, "n_special": 0, "predict_special_tokens": True, "_num_labels": 1}) == gpt2
    llama = to_shape(LLAMA)
    assert (llama.head_dim, llama.num_key_value_heads, llama.norm_epsilon) == (8, 2, 1e-5)
    qwen3 = to_shape(QWEN3)
    assert (qwen3.head_dim, qwen3.qk_norm) == (16, True)


def test_rope_theta_is_found_in_both_places() -> None:
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert to_shape({**new, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rope_theta == 5e5
    assert to_shape({**LLAMA, "rope_theta": 5e5}).rope_theta == 5e5
    assert to_shape(new).rope_theta == 10_000.0
    older = {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    for config, names in (
        ({**LLAMA, **newer}, ("rope_theta=10000.0", "500000.0")),
        ({**LLAMA, **older}, ("rope_theta=10000.0", "rope_scaling.rope_theta=1000000.0")),
        ({**new, **older, **newer}, ("rope_parameters.rope_theta=500000.0", "rope_scaling.rope_theta=1000000.0")),
    ):
        with pytest.raises(DataError) as refused:
            to_shape(config)
        assert_names(refused.value, *names)


def test_values_of_another_type_are_refused() -> None:
    for key, value in (("architectures", 5), ("rope_theta", [1]), ("hidden_size", "wide")):
        with pytest.raises(DataError, match=key):
            to_shape({**LLAMA, key: value})


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LLAMA, "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        (LLAMA, "rope_scaling", {"rope_type": "linear", "type": "yarn", "factor": 2.0}),
        (LLAMA, "rope_scaling", {"type": "linear", "factor": 0.5}),
        (LLAMA, "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        (
            LLAMA,
            "rope_scaling",
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "mscale": 1},
        ),
        (LLAMA, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        (LLAMA, "rope_parameters", {"full_attention": {"rope_type": "default"}}),
        (LLAMA, "partial_rotary_factor", 0.25),
        (LLAMA, "hidden_act", "gelu_fast"),
        (LLAMA, "layer_types", ["full_attention", "full_attention"]),
        (LLAMA, "pretraining_tp", 2),
        (LLAMA, "sliding_window", 4096),
        (LLAMA, "num_local_experts", 8),
        (LLAMA, "quantization_config", {"bits": 4}),
        (LLAMA, "architectures", ["LlamaForSequenceClassification"]),
        (QWEN3, "mlp_bias", True),
        (QWEN3, "layer_types", ["full_attention", "sliding_attention"]),
        (QWEN3, "layer_types", ["full_attention"]),
        (QWEN3, "layer_types", ["full_attention", "chunked_attention"]),
        (GPT2, "activation_function", "gelu_fast"),
        (GPT2, "scale_attn_weights", False),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "reorder_and_upcast_attn", True),
        (GPT2, "add_cross_attention", True),
        (GPT2, "embd_pdrop", 0.0),
        (GPT2, "n_ctx", 512),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_value(base: dict[str, Any], key: str, value: Any) -> None:
    to_shape(base)  # passes without it
    with pytest.raises(DataError) as refused:
        to_shape({**base, key: value})
    assert_names(refused.value, f"{key}={value!r}")


def test_everything_wrong_is_reported_at_once() -> None:
    with pytest.raises(DataError) as refused:
        to_shape({**LLAMA, "hidden_act": "tanh", "num_experts": 4, "hidden_size": None})
    assert_names(refused.value, "hidden_act='tanh'", "num_experts=4", "hidden_size")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "deepseek_v3"}, ["model_type='deepseek_v3'"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"head_dim": 7}, ["head_dim=7"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers=-1"]),
        ({"vocab_size": "many"}, ["vocab_size='many'"]),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        to_shape({**LLAMA, **changes})
    assert_names(refused.value, *names)


def test_qwen3_must_state_what_its_class_has_defaults_of_its_own_for() -> None:
    with pytest.raises(DataError, match="head_dim"):
        to_shape({**QWEN3, "head_dim": None})


def test_a_key_that_changes_nothing_may_be_passed_over_by_name() -> None:
    config = {**LLAMA, "transformers.js_config": {"dtype": "q4"}}
    with pytest.raises(DataError, match="--ignore-key"):
        to_shape(config)
    assert to_shape(config, ["transformers.js_config"]) == to_shape(LLAMA)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500_000.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("sliding_window", 128),
        ("attn_logit_softcapping", 50.0),
        ("num_experts", 4),
        ("rms_norm_eps", 1e-3),
    ],
)
def test_a_key_that_changes_numbers_is_never_passed_over(key: str, value: Any) -> None:
    with pytest.raises(DataError) as refused:
        to_shape({**LLAMA, key: value}, [key])
    assert_names(refused.value, "--ignore-key", f"{key}={value!r}")
    if key in ("rope_parameters", "rms_norm_eps"):  # these are read
        return
    with pytest.raises(DataError) as refused:
        to_shape({**LLAMA, key: value})
    assert "--ignore-key" not in str(refused.value), "it is not offered either"


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (ModelSection(style="gpt2", qk_norm=True, **SIZES), ["model.qk_norm=true"]),
        (ModelSection(style="gpt2", num_key_value_heads=2, **SIZES), ["model.num_key_value_heads=2"]),
        (ModelSection(style="gpt2", head_dim=16, **SIZES), ["model.head_dim=16"]),
        (ModelSection(attention_sinks=True, **SIZES), ["model.attention_sinks=true", "LlamaForCausalLM"]),
        (ModelSection(mup_base_width=16, **SIZES), ["model.mup_base_width=16", "LlamaForCausalLM"]),
        (ModelSection(normalization="layer_norm", **SIZES), ['model.normalization="layer_norm"']),
        (
            ModelSection(qk_norm=True, parallel_residual=True, embedding_scale=2.0, **SIZES),
            ["model.parallel_residual=true", "model.embedding_scale=2.0", "Qwen3ForCausalLM"],
        ),
        (ModelSection(style="gpt2", position_embedding_type="none", **SIZES), ['model.position_embedding_type="none"']),
        (
            ModelSection(sliding_window=8, full_attention_layers=2, rope_local_theta=10.0, **SIZES),
            ["model.rope_local_theta=10.0", "SmolLM3ForCausalLM"],
        ),
        (
            ModelSection(attention_output_bias=True, head_dim=8, **{**SIZES, "num_attention_heads": 6}),
            ["model.attention_output_bias=true", "MistralForCausalLM"],
        ),
    ],
)
def test_what_they_have_no_model_for_is_refused(section: ModelSection, names: list[str]) -> None:
    with pytest.raises(CheckpointError) as refused:
        family_of(shape_of(section))
    assert_names(refused.value, *names)
    for other in SECTIONS.values():
        family_of(shape_of(other))
