"""What is wrong with a model section: sizes and choices that do not fit together."""

from __future__ import annotations

import math

from megalm.errors import ConfigError
from megalm.planning.engine_checks import CheckContext, Rule


def hidden_divides_into_heads(case: CheckContext) -> None:
    model = case.config.model
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} does not divide into model.num_attention_heads="
            f"{model.num_attention_heads}; change one of them or set model.head_dim"
        )


def vocabulary_is_a_multiple(case: CheckContext) -> None:
    entries, multiple = case.config.model.vocab_size, case.config.model.vocab_multiple
    if entries is not None and multiple is not None and entries % multiple:
        raise ConfigError(
            f"model.vocab_size={entries} is not a multiple of model.vocab_multiple={multiple}; remove one of them, or "
            f"set model.vocab_size={math.ceil(entries / multiple) * multiple}"
        )


def heads_divide_into_groups(case: CheckContext) -> None:
    heads, groups = case.config.model.num_attention_heads, case.config.model.num_key_value_heads
    if groups is not None and heads % groups:
        raise ConfigError(
            f"model.num_attention_heads={heads} does not divide into model.num_key_value_heads={groups}; "
            "use equally many heads for each key/value head"
        )


def model_choices_fit(case: CheckContext) -> None:
    model, shape = case.config.model, case.shape
    problems = [
        f"model.{name} names layer {layer}, but the model has the layers 0 to {shape.num_hidden_layers - 1}"
        for name in ("no_rope_layers", "full_attention_layers")
        for layer in getattr(shape, name)
        if layer >= shape.num_hidden_layers
    ]
    rotary = ("rope_local_theta", "rope_scaling", "no_rope_layers")
    if shape.position_embedding_type != "rope":
        given = [name for name in rotary if getattr(model, name)]
        given += ["partial_rotary_factor"] if model.partial_rotary_factor != 1 else []
        problems += [f"model.{name} needs model.position_embedding_type=rope" for name in given]
    elif shape.rotary_dim % 2 or not shape.rotary_dim:
        part = model.partial_rotary_factor
        what = f"head_dim={shape.head_dim} (model.hidden_size / model.num_attention_heads)"
        what += f" x model.partial_rotary_factor={part}" if part != 1 else ""
        problems.append(f"{what}: rotary positions need an even number of dimensions")
    if shape.sliding_window is None:
        given = [name for name in ("full_attention_layers", "rope_local_theta") if getattr(model, name)]
        problems += [f"model.{name} needs model.sliding_window" for name in given]
    if model.mup_base_width is not None and model.attention_scale is not None:
        problems.append(
            f"model.attention_scale={model.attention_scale:g} beside model.mup_base_width={model.mup_base_width}, "
            "which sets it to 1/head_dim: remove one of them"
        )
    if shape.norm_zero_centered and shape.normalization != "rms_norm":
        problems.append("model.norm_zero_centered needs model.normalization=rms_norm")
    scaling = shape.rope_scaling
    if scaling is not None and scaling.rope_type != "linear" and scaling.original_max_position_embeddings is None:
        problems.append(f"model.rope_scaling: {scaling.rope_type} needs original_max_position_embeddings")
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        problems.append("model.rope_scaling: low_freq_factor is not below high_freq_factor")
    if problems:
        raise ConfigError(*problems)


def sequence_fits_positions(case: CheckContext) -> None:
    length, positions = case.config.data.sample_length, case.config.model.max_position_embeddings
    if positions is not None and length > positions:
        raise ConfigError(
            f"data.sequence_length={length} is longer than model.max_position_embeddings={positions}; "
            "shorten the one or raise the other"
        )


MODEL_RULES: tuple[Rule, ...] = (
    vocabulary_is_a_multiple,
    hidden_divides_into_heads,
    heads_divide_into_groups,
    model_choices_fit,
    sequence_fits_positions,
)
