"""Converts a ModelConfig to Hugging Face's `config.json` and back, by the tables of `families.py`.

No key is ignored in silence: a key is converted, or must have the one value that megalm's model computes, or is known
to change no number of a forward pass. Any other key is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from megalm.config.schema import ModelSection
from megalm.config.validation import shown
from megalm.errors import CheckpointError, DataError
from megalm.huggingface.config_rules import Config, Values, plain_scaling
from megalm.huggingface.families import FAMILIES, Family
from megalm.model.model_config import ModelConfig, build_model_config, model_settings

# Keys about files, generation, outputs and other heads: no number of a forward pass depends on them.
_WITHOUT_EFFECT_WORDS = (
    "_attn_implementation_autoset _name_or_path _num_labels architectures bos_token_id chunk_size_feed_forward "
    "do_sample dtype eos_token_id gradient_checkpointing id2label is_decoder is_llama_config label2id max_length "
    "max_window_layers min_length model_type num_beams num_labels output_attentions output_hidden_states output_past "
    "output_router_logits pad_token_id predict_special_tokens problem_type repetition_penalty return_dict "
    "router_aux_loss_coef summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version use_bfloat16 use_cache"
)
_WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT_WORDS.split())
# Keys that change what some model of transformers computes: none of them may be ignored.
_ELSEWHERE = (
    "alibi attention_chunk_size attention_multiplier attn_type embedding_multiplier expert_layer_offset "
    "expert_layer_period first_k_dense_replace kv_lora_rank logit_scale logits_scaling n_routed_experts "
    "n_shared_experts original_max_position_embeddings parallel_attn q_lora_rank qk_norm quantization_config "
    "residual_multiplier use_qk_norm"
)
_DECISIVE = frozenset(_ELSEWHERE.split()).union(*(family.keys for family in FAMILIES.values()))
# What acts in training only, and what only names the choices.
_NOT_COMPUTED = ("style", "dropout", "attention_dropout", "initializer_range")


@functools.lru_cache
def family_of(shape: ModelConfig) -> Family:
    """The first family that computes the model; its name is the `model_type` of config.json.

    Raises:
        CheckpointError: none does; the message names the choices that the nearest one lacks.
    """
    nearest: tuple[Family, list[str]] | None = None
    for family in FAMILIES.values():
        obstacles = _obstacles(shape, family)
        if not obstacles:
            return family
        if nearest is None or len(obstacles) < len(nearest[1]):
            nearest = family, obstacles
    assert nearest is not None
    raise CheckpointError(
        f"the model cannot be exported to Hugging Face format: the nearest class, {nearest[0].classes[0]} "
        f"({nearest[0].name}), does not have {'; '.join(nearest[1])}. `megalm checkpoint convert` writes its weights "
        "as one safetensors file"
    )


def _obstacles(shape: ModelConfig, family: Family) -> list[str]:
    """The choices of the model that do not come back from the family's config.json."""
    plain = _without_idle_choices(shape)
    # An MLP that no layer has keeps its size: some families have a key for it.
    idle = (*_NOT_COMPUTED, *(["intermediate_size"] if len(shape.moe_layers) == shape.num_hidden_layers else []))
    values, problems = _read(_written(plain, family), family)
    # A choice that no rule knows has to be the one that models are made with otherwise.
    values = {name: ModelSection.model_fields[name].default for name in vars(plain).keys() - values.keys()} | values
    obstacles = [
        f"model.{name}={shown(getattr(shape, name))}"
        for name, value in values.items()
        if name not in idle and not _is_same(value, getattr(plain, name))
    ]
    if family.heads_divide_hidden and shape.hidden_size % shape.num_attention_heads:
        obstacles.append(f"model.num_attention_heads={shape.num_attention_heads} of hidden_size={shape.hidden_size}")
    return obstacles + problems


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)  # of roots that are written as their squares
    return bool(one == other)


def _without_idle_choices(shape: ModelConfig) -> ModelConfig:
    """The model with the defaults of choices that change nothing beside the others."""
    layers = range(shape.num_hidden_layers)
    idle: Values = {}
    if not any(shape.rotates(layer) for layer in layers):
        idle |= {"rope_theta": 10_000.0, "rope_local_theta": None, "rope_scaling": None, "partial_rotary_factor": 1.0}
    if shape.position_embedding_type != "rope":
        idle["no_rope_layers"] = ()
    if shape.sliding_window is None or len(shape.full_attention_layers) == len(layers):
        idle |= {"sliding_window": None, "full_attention_layers": (), "rope_local_theta": None}
    elif not shape.full_attention_layers and shape.rope_local_theta is not None:
        idle |= {"rope_theta": shape.rope_local_theta, "rope_local_theta": None, "rope_scaling": None}
    elif shape.rope_local_theta == shape.rope_theta:
        idle["rope_local_theta"] = None
    if shape.attention_scale is not None and _is_same(shape.attention_scale, 1 / math.sqrt(shape.head_dim)):
        idle["attention_scale"] = None
    if shape.embedding_scale == 1:
        idle["embedding_scale"] = None
    return replace(shape, **{"rope_scaling": plain_scaling(shape.rope_scaling), **idle})


def _written(shape: ModelConfig, family: Family) -> Values:
    written: Values = {"architectures": [family.classes[0]], "model_type": family.name}
    for rule in family.rules:
        written |= rule.write(shape)
    return written


def to_config(shape: ModelConfig, eod_id: int, special: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        eod_id: the end-of-document token, written as `eos_token_id`.
        special: ids of `bos_token` and `pad_token`, as far as the tokenizer has them.
        dtype: torch's name for the dtype of the stored weights.
    """
    config = _written(_without_idle_choices(shape), family_of(shape))
    config |= {f"{name}_id": special.get(name) for name in ("bos_token", "pad_token")} | {"eos_token_id": eod_id}
    return {**config, "dtype": dtype, "use_cache": True}


def family_of_config(config: Config) -> Family:
    """Raises: DataError: no family has this `model_type`."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise DataError(
            f"config.json has model_type={config.get('model_type')!r}, which megalm does not support; supported: "
            f"{', '.join(FAMILIES)}"
        )
    return family


def to_shape(config: Config, ignored: Collection[str] = ()) -> ModelConfig:
    """The model that config.json describes.

    Args:
        ignored: unknown keys that the user knows to change nothing.

    Raises:
        DataError: unsupported model type, or unsupported keys; the message lists all of them with their values. Or a
            key is to be ignored of which it is known that it changes numbers.
    """
    family = family_of_config(config)
    if decisive := [key for key in ignored if key in _DECISIVE]:
        raise DataError(
            f"--ignore-key {decisive[0]}: {decisive[0]}={config.get(decisive[0])!r} changes what the model computes; "
            "without it the imported model would be another one"
        )
    config = {key: value for key, value in config.items() if key not in ignored}
    values, problems = _read(config, family)
    unknown = [key for key, value in config.items() if key not in family.keys | _WITHOUT_EFFECT and value is not None]
    if problems := [*problems, *(f"{key}={config[key]!r}" for key in unknown)]:
        offer = " (--ignore-key KEY ignores an unknown key of which you know that it changes nothing)"
        raise DataError(
            f"config.json has settings that megalm's model does not support: {'; '.join(problems)}"
            f"{offer if any(key not in _DECISIVE for key in unknown) else ''}"
        )
    try:
        section = ModelSection(style=family.style, **values)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"config.json: {first['loc'][0]}={first['input']!r}: {first['msg']}") from None
    shape = build_model_config(section, vocab_size=0, sequence_length=0)  # the section sets both
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise DataError(
            f"config.json: num_key_value_heads={shape.num_key_value_heads} does not divide "
            f"num_attention_heads={shape.num_attention_heads}"
        )
    if shape.position_embedding_type == "rope" and (shape.rotary_dim % 2 or not shape.rotary_dim):
        raise DataError(
            f"config.json: of head_dim={shape.head_dim}, {shape.rotary_dim} dimensions rotate; rotary position "
            "embeddings need an even number"
        )
    return _without_idle_choices(shape)


def section_of(shape: ModelConfig) -> dict[str, Any]:
    """The complete `model:` section of a run configuration for this model, without defaults."""
    return {name: value for name, value in model_settings(shape).items() if name in ModelSection.model_fields}


def _read(config: Config, family: Family) -> tuple[Values, list[str]]:
    """The fields of the model, and settings with which megalm's model computes something else, with key and value."""
    values, problems = dict(family.fixed), []
    architectures = config.get("architectures") or []
    named = architectures if isinstance(architectures, list) else [architectures]
    if named and named[0] not in family.classes:
        problems.append(f"architectures={named!r} (supported: {family.classes[0]})")
    for key, accepts in family.required.items():
        if key in config and not accepts(config[key]):
            problems.append(f"{key}={config[key]!r}")
    for rule in family.rules:
        rule.read(config, values, problems)
    return values, problems
