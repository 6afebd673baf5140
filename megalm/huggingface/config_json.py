"""Converts a ModelConfig to Hugging Face's `config.json` and back.

No key is ignored in silence: a key is converted, or must have the one value that megalm's model computes, or is known
to change no number of a forward pass. Any other key is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megalm.config.schema import ModelSection
from megalm.errors import CheckpointError, DataError
from megalm.model.model_config import ModelConfig, build_model_config, model_settings

Config = Mapping[str, Any]
Accepts = Callable[[Any], bool]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
_HEADLESS = {"llama": "LlamaModel", "qwen3": "Qwen3Model", "gpt2": "GPT2Model"}

# Keys about files, generation, outputs and other heads: no number of a forward pass depends on them.
_WITHOUT_EFFECT_WORDS = (
    "_attn_implementation_autoset _name_or_path _num_labels architectures bos_token_id chunk_size_feed_forward "
    "do_sample dtype eos_token_id gradient_checkpointing id2label is_decoder is_llama_config label2id max_length "
    "max_window_layers min_length model_type num_beams num_labels output_attentions output_hidden_states output_past "
    "pad_token_id predict_special_tokens problem_type repetition_penalty return_dict summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params temperature "
    "tokenizer_class top_k top_p torch_dtype torchscript transformers_version use_bfloat16 use_cache"
)
_WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT_WORDS.split())


def _is(*values: Any) -> Accepts:
    return lambda value: value in values


def _plain_rope(value: Any) -> bool:
    """Rotary positions without scaling, on all dimensions of a head."""
    if not value:
        return True
    if not isinstance(value, Mapping) or value.get("partial_rotary_factor", 1) != 1:
        return False
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    kinds = (value.get("rope_type", "default"), value.get("type", "default"))
    return value.keys() <= known and kinds == ("default", "default")


def _all_full(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value))


# The values that megalm's model computes; each is also the default of a missing key in transformers.
_LLAMA_REQUIRED: dict[str, Accepts] = {
    "hidden_act": _is("silu", "swish"),
    "attention_bias": _is(False),
    "mlp_bias": _is(False),
    "rope_scaling": _plain_rope,
    "rope_parameters": _plain_rope,
    "partial_rotary_factor": _is(1),
    "rope_interleaved": _is(False),
    "pretraining_tp": _is(1),
    "is_encoder_decoder": _is(False),
}
_QWEN3_REQUIRED = {
    **{key: accepts for key, accepts in _LLAMA_REQUIRED.items() if key != "pretraining_tp"},
    "use_sliding_window": _is(False),
    "layer_types": _all_full,
}
_GPT2_REQUIRED: dict[str, Accepts] = {
    "activation_function": _is("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": _is(True),
    "scale_attn_by_inverse_layer_idx": _is(False),
    "reorder_and_upcast_attn": _is(False),
    "add_cross_attention": _is(False),
    "n_special": _is(0),
    "is_encoder_decoder": _is(False),
}

# ModelConfig field -> (key of config.json, default of the transformers class; ... for a key that is required here).
_LLAMA_FIELDS: dict[str, tuple[str, Any]] = {
    **{name: (name, ...) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{name: (name, ...) for name in ("intermediate_size", "max_position_embeddings")},
    "num_key_value_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "rope_theta": ("rope_theta", 10_000.0),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
}
# The Qwen3 class has its own defaults for both; no other model shares them.
_QWEN3_FIELDS = {**_LLAMA_FIELDS, "num_key_value_heads": ("num_key_value_heads", ...), "head_dim": ("head_dim", ...)}
_GPT2_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "hidden_size": ("n_embd", ...),
    "num_hidden_layers": ("n_layer", ...),
    "num_attention_heads": ("n_head", ...),
    "intermediate_size": ("n_inner", None),
    "max_position_embeddings": ("n_positions", ...),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "dropout": ("resid_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
_FAMILIES = {
    "llama": (_LLAMA_FIELDS, _LLAMA_REQUIRED),
    "qwen3": (_QWEN3_FIELDS, _QWEN3_REQUIRED),
    "gpt2": (_GPT2_FIELDS, _GPT2_REQUIRED),
}
# Keys that change what some model of transformers computes: none of them may be ignored.
_ELSEWHERE = (
    "alibi attention_chunk_size attention_multiplier attn_logit_softcapping attn_type clip_qkv embedding_multiplier "
    "expert_layer_offset expert_layer_period final_logit_softcapping first_k_dense_replace hidden_activation "
    "kv_lora_rank layer_norm_eps layer_types logit_scale logits_scaling moe_intermediate_size n_routed_experts "
    "n_shared_experts no_rope_layers norm_topk_prob num_experts num_experts_per_tok num_local_experts "
    "parallel_attn q_lora_rank qk_norm quantization_config query_pre_attn_scalar residual_multiplier "
    "rope_local_base_freq rotary_emb_base rotary_pct sliding_window sliding_window_pattern use_parallel_residual "
    "use_qk_norm"
)
_DECISIVE = frozenset(
    {"embd_pdrop", "n_ctx", *_ELSEWHERE.split()}.union(
        *(({key for key, _ in fields.values()} | required.keys()) for fields, required in _FAMILIES.values())
    )
)


def model_type(shape: ModelConfig) -> str:
    """The `model_type` of config.json; Qwen3 is Llama with a norm on each head's queries and keys."""
    return "qwen3" if shape.style == "llama" and shape.qk_norm else shape.style


def require_exportable(shape: ModelConfig) -> None:
    """Raises: CheckpointError: transformers has no model with this computation."""
    problem = ""
    if shape.style == "gpt2" and shape.qk_norm:
        problem = "model.qk_norm=true with style gpt2: GPT2LMHeadModel has no norm on queries and keys"
    elif shape.style == "gpt2" and shape.num_key_value_heads != shape.num_attention_heads:
        problem = (
            f"model.num_key_value_heads={shape.num_key_value_heads} with style gpt2: GPT2LMHeadModel has one key/value "
            "head per attention head"
        )
    elif shape.style == "gpt2" and shape.num_attention_heads * shape.head_dim != shape.hidden_size:
        problem = (
            f"model.head_dim={shape.head_dim} with style gpt2: GPT2LMHeadModel uses hidden_size / num_attention_heads"
        )
    elif model_type(shape) == "llama" and shape.hidden_size % shape.num_attention_heads:
        problem = (
            f"model.num_attention_heads={shape.num_attention_heads} does not divide "
            f"model.hidden_size={shape.hidden_size}, which LlamaForCausalLM refuses"
        )
    if problem:
        raise CheckpointError(
            f"the model cannot be exported to Hugging Face format ({problem}); `megalm checkpoint convert` writes its "
            "weights as one safetensors file"
        )


def to_config(shape: ModelConfig, eod_id: int, special: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        eod_id: the end-of-document token, written as `eos_token_id`.
        special: ids of `bos_token` and `pad_token`, as far as the tokenizer has them.
        dtype: torch's name for the dtype of the stored weights.
    """
    family = model_type(shape)
    fields, required = _FAMILIES[family]
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    config |= {key: getattr(shape, field) for field, (key, _) in fields.items()}
    if family == "gpt2":
        # n_ctx: the older name of n_positions, which llama.cpp's converter asks for
        config |= {"n_ctx": shape.max_position_embeddings, "embd_pdrop": shape.dropout}
        config |= {"activation_function": "gelu_new"}
    else:
        # transformers 4 reads rope_theta, transformers 5 reads rope_parameters.
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}, "hidden_act": "silu"}
        config |= {key: False for key in ("attention_bias", "mlp_bias", "use_sliding_window") if key in required}
    config |= {f"{name}_id": special.get(name) for name in ("bos_token", "pad_token")} | {"eos_token_id": eod_id}
    return {**config, "dtype": dtype, "use_cache": True}


def to_shape(config: Config, ignored: Collection[str] = ()) -> ModelConfig:
    """The model that config.json describes.

    Args:
        ignored: unknown keys that the user knows to change nothing.

    Raises:
        DataError: unsupported model type, or unsupported keys; the message lists all of them with their values. Or a
            key is to be ignored of which it is known that it changes numbers.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise DataError(
            f"config.json has model_type={config.get('model_type')!r}, which megalm does not support; supported: "
            f"{', '.join(_FAMILIES)}"
        )
    if decisive := [key for key in ignored if key in _DECISIVE]:
        raise DataError(
            f"--ignore-key {decisive[0]}: {decisive[0]}={config.get(decisive[0])!r} changes what the model computes; "
            "without it the imported model would be another one"
        )
    config = {key: value for key, value in config.items() if key not in ignored}
    unknown = _unknown(config, family)
    if problems := [*_problems(config, family), *(f"{key}={config[key]!r}" for key in unknown)]:
        offer = " (--ignore-key KEY ignores an unknown key of which you know that it changes nothing)"
        raise DataError(
            f"config.json has settings that megalm's model does not support: {'; '.join(problems)}"
            f"{offer if any(key not in _DECISIVE for key in unknown) else ''}"
        )
    values: dict[str, Any] = {
        field: default if config.get(key) is None else config[key]
        for field, (key, default) in _FAMILIES[family][0].items()
    }
    if family != "gpt2":
        values["rope_theta"] = next(iter(_thetas(config).values()), 10_000.0)
    try:
        section = ModelSection(style="gpt2" if family == "gpt2" else "llama", qk_norm=family == "qwen3", **values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"config.json: {first['loc'][-1]}={first['input']!r}: {first['msg']}") from None
    shape = build_model_config(section, vocab_size=0, sequence_length=0)  # the section sets both
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise DataError(
            f"config.json: num_key_value_heads={shape.num_key_value_heads} does not divide "
            f"num_attention_heads={shape.num_attention_heads}"
        )
    if shape.style == "llama" and shape.head_dim % 2:
        raise DataError(
            f"config.json: head_dim={shape.head_dim} is odd; rotary position embeddings need an even number"
        )
    return shape


def section_of(shape: ModelConfig) -> dict[str, Any]:
    """The complete `model:` section of a run configuration for this model, without defaults."""
    return {name: value for name, value in model_settings(shape).items() if name in ModelSection.model_fields}


def _problems(config: Config, family: str) -> Iterator[str]:
    """Settings with which megalm's model computes something else, each with key and value."""
    fields, required = _FAMILIES[family]
    architectures = config.get("architectures") or []
    named = architectures if isinstance(architectures, list) else [architectures]
    if named and named[0] not in (ARCHITECTURES[family], _HEADLESS[family]):
        yield f"architectures={named!r} (supported: {ARCHITECTURES[family]})"
    for key, accepts in required.items():
        if key in config and not accepts(config[key]):
            yield f"{key}={config[key]!r}"
    for key, default in fields.values():
        if default is ... and config.get(key) is None:
            yield f"{key} is missing"
    # Two keys for one number of ModelConfig.
    for one, other, default in (
        ("embd_pdrop", "resid_pdrop", 0.1),
        ("n_ctx", "n_positions", config.get("n_positions")),
    ):
        first, second = config.get(one, default), config.get(other, default)
        if first != second:
            yield f"{one}={first!r} contradicts {other}={second!r}"
    thetas = _thetas(config)
    if any(value != next(iter(thetas.values())) for value in thetas.values()):
        yield " contradicts ".join(f"{place}={value!r}" for place, value in thetas.items())


def _unknown(config: Config, family: str) -> list[str]:
    """The keys whose meaning for this family is not known; a null says nothing."""
    fields, required = _FAMILIES[family]
    known = _WITHOUT_EFFECT | required.keys() | {key for key, _ in fields.values()}
    # Qwen3 files hold the width of a sliding window even if the model uses none.
    known |= {"gpt2": {"embd_pdrop", "n_ctx"}, "qwen3": {"sliding_window"}}.get(family, set())
    return [key for key, value in config.items() if key not in known and value is not None]


def _thetas(config: Config) -> dict[str, Any]:
    """The RoPE base by the place that holds it; there are three."""
    nested = {
        key: value for key in ("rope_parameters", "rope_scaling") if isinstance(value := config.get(key), Mapping)
    }
    places = {"rope_theta": config, **{f"{key}.rope_theta": value for key, value in nested.items()}}
    return {place: values["rope_theta"] for place, values in places.items() if values.get("rope_theta") is not None}
