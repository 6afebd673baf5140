"""What is wrong with a model section: sizes and choices that do not fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalm.config.schema import ROPE_SCALING_KEYS, ModelSection, RopeScaling
from megalm.cost_model.memory import BYTES
from megalm.model.model_config import ModelConfig
from megalm.planning.batch_size import nearest_multiples
from megalm.planning.engine_checks import CheckContext, Need, Rule, is_divided, runs_compiled, unmet


def sizes_divide(case: CheckContext) -> Iterator[str]:
    model, length = case.config.model, case.config.data.sample_length
    heads, groups, entries = model.num_attention_heads, model.num_key_value_heads, model.vocab_size
    multiple, positions = model.vocab_multiple, model.max_position_embeddings
    if entries is not None and multiple is not None and entries % multiple:
        yield (
            f"model.vocab_size={entries} is not a multiple of model.vocab_multiple={multiple}; remove one of them, or "
            f"set model.vocab_size={math.ceil(entries / multiple) * multiple}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size={model.hidden_size} does not divide into model.num_attention_heads={heads}; change one "
            "of them or set model.head_dim"
        )
    if groups is not None and heads % groups:
        yield (
            f"model.num_attention_heads={heads} does not divide into model.num_key_value_heads={groups}; use equally "
            "many heads for each key/value head"
        )
    if positions is not None and length > positions:
        yield (
            f"data.sequence_length={length} is longer than model.max_position_embeddings={positions}; shorten the one "
            "or raise the other"
        )


_OF_EXPERTS = (
    *("num_experts_per_token", "moe_intermediate_size", "num_shared_experts", "moe_layers", "num_dense_layers"),
    *("router_scores", "norm_topk_prob", "routed_scaling_factor", "expert_bias"),
)
_NEEDS: tuple[Need, ...] = (
    ("model.full_attention_layers", "names layers without a window", "model.sliding_window", "4096"),
    ("model.rope_local_theta", "is of layers with a window", "model.sliding_window", "4096"),
    ("train.expert_bias_rate", "changes biases of experts", "model.expert_bias", "true"),
    ("train.expert_capacity_factor", "is of experts", "model.num_experts", "8"),
    *((f"model.{name}", "is of experts", "model.num_experts", "8") for name in _OF_EXPERTS),
)


def model_choices_fit(case: CheckContext) -> Iterator[str]:
    model, shape, last = case.config.model, case.shape, case.shape.num_hidden_layers - 1
    yield from unmet(case.config, _NEEDS)
    for name in ("no_rope_layers", "full_attention_layers", "moe_layers"):
        for layer in getattr(shape, name):
            if layer > last:
                yield f"model.{name} names layer {layer}, but the model has the layers 0 to {last}"
    if shape.position_embedding_type != "rope":
        given = [name for name in ("rope_local_theta", "rope_scaling", "no_rope_layers") if getattr(model, name)]
        given += ["partial_rotary_factor"] if model.partial_rotary_factor != 1 else []
        yield from (f"model.{name} needs model.position_embedding_type=rope" for name in given)
    elif shape.rotary_dim % 2 or not shape.rotary_dim:
        part = model.partial_rotary_factor
        what = f"head_dim={shape.head_dim} (model.hidden_size / model.num_attention_heads)"
        what += f" x model.partial_rotary_factor={part}" if part != 1 else ""
        yield f"{what}: rotary positions need an even number of dimensions"
    yield from _idle_layer_choices(model, shape)
    if model.mup_base_width is not None and model.attention_scale is not None:
        yield (
            f"model.attention_scale={model.attention_scale:g} beside model.mup_base_width={model.mup_base_width}, "
            "which sets it to 1/head_dim: remove one of them"
        )
    if shape.norm_zero_centered and shape.normalization != "rms_norm":
        yield "model.norm_zero_centered needs model.normalization=rms_norm"
    if shape.rope_scaling is not None:
        yield from _scaling_problems(shape.rope_scaling, shape.rope_theta)


def experts_fit(case: CheckContext) -> Iterator[str]:
    model, shape = case.config.model, case.shape
    if model.num_experts is None:
        return
    if model.num_experts_per_token > model.num_experts:
        yield (
            f"model.num_experts_per_token={model.num_experts_per_token} is more than model.num_experts="
            f"{model.num_experts}"
        )
    if not shape.moe_layers:
        yield (
            f"model.num_experts={model.num_experts}: model.moe_layers and model.num_dense_layers="
            f"{model.num_dense_layers} leave no layer with experts"
        )
    if shape.mlp_bias:
        yield "model.num_experts with model.mlp_bias=true: experts have no biases; set model.mlp_bias=false"
    yield from _experts_not_proven(case)
    inner, degree = shape.moe_intermediate_size or 0, case.config.parallel.tensor
    if inner % degree:
        yield f"parallel.tensor={degree} does not divide the experts' inner size, {inner}"
    row = 16 // BYTES[case.precision]
    of_tensor_group = f" (parallel.tensor={degree} x {row})" * (degree > 1)
    for name, size, multiple, why in (
        ("hidden_size", shape.hidden_size, row, ""),
        ("moe_intermediate_size", inner, row * degree, of_tensor_group),
    ):
        if size % multiple:
            yield (
                f"model.num_experts in {case.precision}: model.{name}={size} is not a multiple of {multiple}{why}, as "
                f"the grouped product needs; use {nearest_multiples(size, multiple)}"
            )


def _experts_not_proven(case: CheckContext) -> Iterator[str]:
    """Combinations with experts that no test compares with one plain rank."""
    config, name = case.config, f"model.num_experts={case.config.model.num_experts}"
    for refused, reason in (
        (config.precision.float8, "precision.float8=true: experts multiply in no float8; remove it"),
        (
            config.model.mup_base_width is not None,
            "model.mup_base_width: how a router's rate follows the width is not known; remove one of them",
        ),
        (
            config.train.mlp_chunk_tokens is not None,
            "train.mlp_chunk_tokens: a tile is no whole sequence, whose experts are balanced; remove it",
        ),
        (
            config.parallel.balance == "time" and config.parallel.pipeline > 1,
            "parallel.balance=time: it measures one block for all; remove it",
        ),
        (
            runs_compiled(config, case.device, case.zero) and is_divided(config, case.zero),
            "compiled blocks: each half of a block with experts is compiled by itself, not proven with ZeRO 3, tensor, "
            "context and expert groups and pipelines; set compile=false",
        ),
    ):
        if refused:
            yield f"{name} with {reason}"


def _idle_layer_choices(model: ModelSection, shape: ModelConfig) -> Iterator[str]:
    """Choices of layers that change nothing, or leave nothing of what they are an exception from."""
    layers = shape.num_hidden_layers
    for name in ("no_rope_layers", "full_attention_layers"):
        choice = getattr(model, name)
        if isinstance(choice, int) and choice > layers:
            yield f"model.{name}={choice}: the model's {layers} layers have no {choice}th; lower it or remove it"
    if shape.position_embedding_type == "rope" and set(shape.no_rope_layers) >= set(range(layers)):
        yield "model.no_rope_layers names every layer; set model.position_embedding_type=none in its place"
    windows = {shape.window(layer) for layer in range(layers)}
    if shape.sliding_window is not None and windows == {None}:
        yield "model.full_attention_layers names every layer; remove it and model.sliding_window"
    if shape.rope_scaling is not None and None not in windows:
        yield (
            "model.rope_scaling acts on layers without a sliding window, and every layer has one; remove it, or set "
            "model.full_attention_layers"
        )


def _scaling_problems(scaling: RopeScaling, theta: float) -> Iterator[str]:
    kind = scaling.rope_type
    needed, further = ROPE_SCALING_KEYS[kind]
    for name, field in RopeScaling.model_fields.items():
        if name not in ("rope_type", *needed, *further) and getattr(scaling, name) != field.default:
            yield f"model.rope_scaling: {kind} does not read {name}; remove it"
    if kind != "linear" and scaling.original_max_position_embeddings is None:
        yield f"model.rope_scaling: {kind} needs original_max_position_embeddings"
    if kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield "model.rope_scaling: low_freq_factor is not below high_freq_factor"
    if kind == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        yield "model.rope_scaling: beta_slow is not below beta_fast"
    if kind == "yarn" and theta <= 1:
        yield f"model.rope_scaling: yarn needs model.rope_theta above 1, not {theta:g}"


MODEL_RULES: tuple[Rule, ...] = (sizes_divide, model_choices_fit, experts_fit)
