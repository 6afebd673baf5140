"""`config.json`: a ModelConfig as Hugging Face says it, and theirs as a ModelConfig, or refused by name.

What theirs can say and ours cannot do is never passed over: a key is taken over, or must have the one value that our
model computes, or is known to change no number of a forward pass; any other key is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ValidationError

from megalm.config.schema import ModelSection
from megalm.errors import CheckpointError, DataError
from megalm.model.model_config import ModelConfig, build_model_config

Config = Mapping[str, Any]
Accepts = Callable[[Any], bool]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
_HEADLESS = {"llama": "LlamaModel", "qwen3": "Qwen3Model", "gpt2": "GPT2Model"}

# Of files, of generation, of outputs and of other heads: no number of a forward pass depends on them.
_WITHOUT_EFFECT_WORDS = (
    "_num_labels do_sample max_length min_length num_beams predict_special_tokens repetition_penalty temperature top_k "
    "top_p torchscript use_bfloat16 "
    "_name_or_path _attn_implementation_autoset architectures bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "gradient_checkpointing id2label is_decoder is_llama_config label2id max_window_layers model_type num_labels "
    "output_attentions output_hidden_states output_past pad_token_id problem_type return_dict summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params "
    "tokenizer_class torch_dtype transformers_version use_cache"
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


# What our model computes; a key that is not stated has this value there as well.
_LLAMA_MUST: dict[str, Accepts] = {
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
_QWEN3_MUST = {
    **{key: accepts for key, accepts in _LLAMA_MUST.items() if key != "pretraining_tp"},
    "use_sliding_window": _is(False),
    "layer_types": _all_full,
}
_GPT2_MUST: dict[str, Accepts] = {
    "activation_function": _is("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": _is(True),
    "scale_attn_by_inverse_layer_idx": _is(False),
    "reorder_and_upcast_attn": _is(False),
    "add_cross_attention": _is(False),
    "n_special": _is(0),
    "is_encoder_decoder": _is(False),
}

# Our field -> (their key, what it is where their class has it unstated; ... where it must be stated).
_LLAMA_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "hidden_size": ("hidden_size", ...),
    "num_hidden_layers": ("num_hidden_layers", ...),
    "num_attention_heads": ("num_attention_heads", ...),
    "num_key_value_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "intermediate_size": ("intermediate_size", ...),
    "max_position_embeddings": ("max_position_embeddings", ...),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "rope_theta": ("rope_theta", 10_000.0),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
}
# Their class has its own default for both, which no other model shares.
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
    "llama": (_LLAMA_FIELDS, _LLAMA_MUST),
    "qwen3": (_QWEN3_FIELDS, _QWEN3_MUST),
    "gpt2": (_GPT2_FIELDS, _GPT2_MUST),
}


def family_of(shape: ModelConfig) -> str:
    """`model_type` of the model there; Qwen3 is Llama with a norm on each head's queries and keys."""
    return "qwen3" if shape.style == "llama" and shape.qk_norm else shape.style


def refuse_what_they_lack(shape: ModelConfig) -> None:
    """Raises: CheckpointError: no model of transformers computes what this one does."""
    problem = ""
    divided = shape.num_attention_heads * shape.head_dim == shape.hidden_size
    if shape.style == "gpt2" and shape.qk_norm:
        problem = "model.qk_norm=true of style gpt2: their GPT-2 has no norm on queries and keys"
    elif shape.style == "gpt2" and shape.num_key_value_heads != shape.num_attention_heads:
        problem = f"model.num_key_value_heads={shape.num_key_value_heads} of style gpt2: theirs has one for each head"
    elif not divided and shape.style == "gpt2":
        problem = f"model.head_dim={shape.head_dim} of style gpt2: theirs is hidden_size / num_attention_heads"
    elif family_of(shape) == "llama" and shape.hidden_size % shape.num_attention_heads:
        problem = (
            f"model.num_attention_heads={shape.num_attention_heads} does not divide "
            f"model.hidden_size={shape.hidden_size}, which their Llama refuses"
        )
    if problem:
        raise CheckpointError(
            f"the model has no Hugging Face form ({problem}); `megalm checkpoint convert` writes its weights by name"
        )


def to_config(shape: ModelConfig, eod_id: int, pad_id: int | None, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        eod_id: what ends a document is their end of a sequence.
        pad_id: the padding token, where the tokenizer has one.
        dtype: of the stored weights, as torch names it.
    """
    family = family_of(shape)
    fields, musts = _FAMILIES[family]
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    config |= {key: getattr(shape, field) for field, (key, _) in fields.items()}
    if family == "gpt2":
        config |= {"embd_pdrop": shape.dropout, "activation_function": "gelu_new"}
    else:
        # rope_theta by itself and in rope_parameters: transformers before and from version 5 read one of them each.
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}, "hidden_act": "silu"}
        config |= {key: False for key in ("attention_bias", "mlp_bias", "use_sliding_window") if key in musts}
    config |= {"bos_token_id": None, "eos_token_id": eod_id, "pad_token_id": pad_id}
    return {**config, "dtype": dtype, "use_cache": True}


def to_shape(config: Config, ignored: Collection[str] = ()) -> ModelConfig:
    """The model that config.json describes.

    Args:
        ignored: keys of it that a person knows to change nothing.

    Raises:
        DataError: it is of another kind of model, or says what our model cannot do: all of it, by name and value.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise DataError(
            f"model_type={config.get('model_type')!r} of config.json is none that megalm has; it reads "
            f"{', '.join(_FAMILIES)}"
        )
    stated = {key: value for key, value in config.items() if key not in ignored}
    fields, musts = _FAMILIES[family]
    problems = [
        *_wrong_architecture(stated, family),
        *_not_ours(stated, musts),
        *_unknown(stated, family),
        *_missing(stated, fields),
        *_contradictions(stated),
    ]
    if problems:
        raise DataError(
            f"config.json says what megalm's model cannot do, or cannot know: {'; '.join(problems)} "
            "(--ignore-key KEY passes over one that you know to change nothing)"
        )
    values: dict[str, Any] = {
        field: default if stated.get(key) is None and default is not ... else stated.get(key)
        for field, (key, default) in fields.items()
    }
    if family != "gpt2":
        values["rope_theta"] = next(iter(_thetas(stated).values()), 10_000.0)
    try:
        section = ModelSection(style="gpt2" if family == "gpt2" else "llama", qk_norm=family == "qwen3", **values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"config.json: {first['loc'][-1]}={first['input']!r}: {first['msg']}") from None
    shape = build_model_config(section, vocab_size=0, sequence_length=0)  # both are stated
    _refuse_odd_heads(shape)
    return shape


def section_of(shape: ModelConfig) -> dict[str, Any]:
    """The `model:` section of a run that trains this shape, nothing left to a default."""
    names = ModelSection.model_fields
    return {name: getattr(shape, name) for name in names}


def _wrong_architecture(config: Config, family: str) -> list[str]:
    stated = config.get("architectures") or []
    named = stated if isinstance(stated, list) else [stated]
    known = (ARCHITECTURES[family], _HEADLESS[family])
    return [f"architectures={named!r} (it reads {known[0]})" for name in named[:1] if name not in known]


def _not_ours(config: Config, musts: Mapping[str, Accepts]) -> list[str]:
    return [f"{key}={config[key]!r}" for key, accepts in musts.items() if key in config and not accepts(config[key])]


def _unknown(config: Config, family: str) -> list[str]:
    fields, musts = _FAMILIES[family]
    known = _WITHOUT_EFFECT | musts.keys() | {key for key, _ in fields.values()}
    known |= {"embd_pdrop", "n_ctx"} if family == "gpt2" else set()
    # Qwen3 names the width of a window also where it uses none.
    known |= {"sliding_window"} if family == "qwen3" else set()
    return [f"{key}={value!r}" for key, value in config.items() if key not in known and value is not None]


def _missing(config: Config, fields: Mapping[str, tuple[str, Any]]) -> list[str]:
    return [f"{key} is not stated" for key, default in fields.values() if default is ... and config.get(key) is None]


def _contradictions(config: Config) -> list[str]:
    """Two keys for one number of ours."""
    found = []
    pairs = (("embd_pdrop", "resid_pdrop", 0.1), ("n_ctx", "n_positions", config.get("n_positions")))
    for one, other, default in pairs:
        values = config.get(one, default), config.get(other, default)
        if values[0] != values[1]:
            found.append(f"{one}={values[0]!r} beside {other}={values[1]!r}")
    thetas = list(_thetas(config).items())
    if any(value != thetas[0][1] for _, value in thetas):
        found.append(" beside ".join(f"{place}={value!r}" for place, value in thetas))
    return found


def _thetas(config: Config) -> dict[str, Any]:
    """Where it is stated, in some of three places."""
    nested = {
        key: value for key in ("rope_parameters", "rope_scaling") if isinstance(value := config.get(key), Mapping)
    }
    places = {"rope_theta": config, **{f"{key}.rope_theta": value for key, value in nested.items()}}
    return {place: values["rope_theta"] for place, values in places.items() if values.get("rope_theta") is not None}


def _refuse_odd_heads(shape: ModelConfig) -> None:
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise DataError(
            f"config.json: num_key_value_heads={shape.num_key_value_heads} does not divide "
            f"num_attention_heads={shape.num_attention_heads}"
        )
    if shape.style == "llama" and shape.head_dim % 2:
        raise DataError(f"config.json: head_dim={shape.head_dim} is odd, rotary positions want pairs")
