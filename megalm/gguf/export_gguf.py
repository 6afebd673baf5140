"""Writes a checkpoint as one GGUF file, which llama.cpp and the programs built on it run.

Names, keys and the order of query and key rows are those of llama.cpp's classes (src/models/ and conversion/ there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megalm.config.schema import RopeScaling
from megalm.config.validation import shown
from megalm.errors import CheckpointError
from megalm.gguf.gguf_tokenizer import GGUFTokenizer, to_gguf
from megalm.huggingface.config_json import family_of
from megalm.huggingface.export_model import ExportPlan
from megalm.huggingface.output_folder import complete_folder
from megalm.model.model_config import ModelConfig
from megalm.model.modules import rotary_frequencies
from megalm.utils.process_setup import require_extra

GGUF_FILE = "model.gguf"
_ROUTER = "ffn_gate_inp"
# Canonical names of a block, without `.weight` and `.bias` -> llama.cpp's.
_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.router": _ROUTER,
    "mlp_output_norm": "post_ffw_norm",
}
_OUTSIDE = {
    "embedding.tokens": "token_embd",
    "embedding.positions": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
}
_QKV = ("attention.query", "attention.key", "attention.value")
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Architecture:
    """A class of llama.cpp.

    Attributes:
        name: `general.architecture`.
        needs: field of ModelConfig -> the values that it computes; it reads no key for them.
        scalings: kinds of `rope_scaling` that it computes.
        window_every: it has windows, and every n-th layer is full; 0: it has none.
        needs_window: it has them always.
        window_theta: base of the rotations in windows; None: that of the others.
        wide_scale_layers: with this many layers scores are scaled by the width of a head's share of the model.
        no_rope_every: every n-th layer does not rotate; 0: all rotate.
        fuses_qkv: query, key and value are one tensor.
        rotates_neighbours: it rotates neighbouring rows of a head, megalm (as transformers) the two halves of a head.
    """

    name: str
    needs: Mapping[str, tuple[Any, ...]]
    scalings: tuple[str, ...] = ("linear", "yarn")
    window_every: int = 0
    needs_window: bool = False
    window_theta: float | None = None
    wide_scale_layers: int = 0
    no_rope_every: int = 0
    fuses_qkv: bool = False
    rotates_neighbours: bool = False


_SILU = {"hidden_act": ("silu",)}
_TANH = {"hidden_act": ("gelu_pytorch_tanh",)}
_NO_BIAS = {"qkv_bias": (False,), "attention_output_bias": (False,), "mlp_bias": (False,)}
_LLAMA = _Architecture("llama", _SILU, ("linear", "llama3", "yarn"), rotates_neighbours=True)
# By the family that a model is exported as.
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen3_moe": _Architecture("qwen3moe", {**_SILU, **_NO_BIAS, "norm_topk_prob": (True,)}),
    "olmoe": _Architecture("olmoe", {**_SILU, **_NO_BIAS, "norm_topk_prob": (False,), "tie_word_embeddings": (False,)}),
    "qwen2": _Architecture("qwen2", _SILU),
    "qwen3": _Architecture("qwen3", {**_SILU, **_NO_BIAS}),
    "olmo2": _Architecture("olmo2", {**_SILU, **_NO_BIAS, "tie_word_embeddings": (False,)}),
    "olmo3": _Architecture("olmo2", {**_SILU, **_NO_BIAS, "tie_word_embeddings": (False,)}, window_every=4),
    "smollm3": _Architecture("smollm3", {**_SILU, **_NO_BIAS}, no_rope_every=4, rotates_neighbours=True),
    "gemma2": _Architecture(
        "gemma2",
        {**_TANH, **_NO_BIAS, "tie_word_embeddings": (True,)},
        scalings=(),
        window_every=2,
        needs_window=True,
        wide_scale_layers=46,
    ),
    "gemma3_text": _Architecture(
        "gemma3",
        {**_TANH, **_NO_BIAS},
        scalings=("linear",),
        window_every=6,
        window_theta=10_000.0,
        wide_scale_layers=62,
    ),
    # Its GELU is the tanh form, also where the model has the exact one.
    "gpt_neox": _Architecture(
        "gptneox",
        {"hidden_act": ("gelu", "gelu_pytorch_tanh"), "qkv_bias": (True,), "tie_word_embeddings": (False,)},
        fuses_qkv=True,
    ),
    "gpt2": _Architecture("gpt2", _TANH, fuses_qkv=True),
}


def _architecture(shape: ModelConfig) -> _Architecture:
    return _ARCHITECTURES[family_of(shape).name]


def gguf_tensors(shape: ModelConfig) -> dict[str, tuple[str, ...]]:
    """llama.cpp's tensor name -> megalm's parameters that it concatenates, in the model's order."""
    found: dict[str, tuple[str, ...]] = {}
    fused = _architecture(shape).fuses_qkv
    for name in shape.parameters():
        whole, _, kind = name.rpartition(".")
        if not whole.startswith("layers."):
            found[f"{_OUTSIDE[whole]}.{kind}"] = (name,)
            continue
        _, layer, part = whole.split(".", 2)
        if part == "mlp.experts":
            found[f"blk.{layer}.ffn_{kind}_exps.weight"] = (name,)
        elif fused and part in _QKV:
            parts = tuple(f"layers.{layer}.{each}.{kind}" for each in _QKV)
            found[f"blk.{layer}.attn_qkv.{kind}"] = parts
        else:
            found[f"blk.{layer}.{_BLOCK[part]}.{kind}"] = (name,)
    return found


def _obstacles(shape: ModelConfig) -> Iterator[str]:
    """The choices of a model that llama.cpp would compute otherwise, without a word."""
    architecture, layers = _architecture(shape), range(shape.num_hidden_layers)
    for field, values in architecture.needs.items():
        if getattr(shape, field) not in values:
            yield f"model.{field}={shown(getattr(shape, field))}"
    if shape.moe_layers and len(shape.moe_layers) < len(layers):
        yield f"model.moe_layers={shown(list(shape.moe_layers))}"
    if architecture.name == "olmoe" and shape.num_key_value_heads != shape.num_attention_heads:
        yield f"model.num_key_value_heads={shape.num_key_value_heads}"
    windowed = [layer for layer in layers if shape.window(layer) is not None]
    if windowed != _others(architecture.window_every, layers) and (windowed or architecture.needs_window):
        yield f"model.sliding_window={shown(shape.sliding_window)} on layers {shown(windowed)}"
    local = shape.rope_local_theta or shape.rope_theta
    if windowed and local != (architecture.window_theta or shape.rope_theta):
        yield f"model.rope_local_theta={shown(shape.rope_local_theta)}"
    rotating = [layer for layer in layers if shape.rotates(layer)]
    every = architecture.no_rope_every
    if shape.position_embedding_type == "rope" and rotating != (_others(every, layers) if every else [*layers]):
        yield f"model.no_rope_layers={shown(list(shape.no_rope_layers))}"
    is_wide = len(layers) == architecture.wide_scale_layers
    theirs = (shape.hidden_size // shape.num_attention_heads if is_wide else shape.head_dim) ** -0.5
    scale = shape.head_dim**-0.5 if shape.attention_scale is None else shape.attention_scale
    if not math.isclose(scale, theirs, rel_tol=1e-6):
        yield f"model.attention_scale={shape.attention_scale}"
    scaling = shape.rope_scaling
    if scaling is not None and not (scaling.rope_type in architecture.scalings and _is_plain(scaling)):
        yield f"model.rope_scaling={shown(scaling.model_dump(exclude_defaults=True))}"


def _others(every: int, layers: range) -> list[int]:
    """The layers that are not every n-th; none for 0."""
    return [layer for layer in layers if every and (layer + 1) % every]


def _is_plain(scaling: RopeScaling) -> bool:
    """YaRN with the numbers of its paper."""
    own = 0.1 * math.log(scaling.factor) + 1
    is_papers = math.isclose(scaling.attention_factor or own, own, rel_tol=1e-6)
    betas = scaling.beta_fast, scaling.beta_slow, scaling.truncate
    return scaling.rope_type != "yarn" or (is_papers and betas == (32, 1, True))


def check_gguf(plan: ExportPlan) -> GGUFTokenizer:
    """Check what an export as GGUF needs; return its tokenizer.

    Raises:
        CheckpointError: llama.cpp has no model with this computation.
        ConfigError: the package gguf is not installed.
        DataError: llama.cpp would give other ids than the run's tokenizer.
    """
    require_extra("gguf", "--to gguf")
    if obstacles := list(_obstacles(plan.shape)):
        raise CheckpointError(
            f"llama.cpp's {_architecture(plan.shape).name} does not compute {', '.join(obstacles)}; export the model "
            "without --to gguf, for transformers"
        )
    made = to_gguf(plan.tokenizer, plan.shape.vocab_size)
    return made if plan.template is None else replace(made, template=plan.template.template)


def export_gguf(plan: ExportPlan, tokenizer: GGUFTokenizer, name: str, advance: Callable[[], None]) -> int:
    """Write the plan's target folder with one GGUF file, complete or absent; return the bytes of all tensors.

    Args:
        tokenizer: of `check_gguf`.
        name: of the model.
        advance: called after each tensor is written.

    Raises:
        CheckpointError: parameters are missing or not finite.
        ConfigError: the target is no longer free.
        DataError: the disk is full.
    """

    def fill(folder: Path) -> None:
        _write(plan, tokenizer, folder / GGUF_FILE, name, advance)

    complete_folder(plan.target, plan.bytes, fill)
    return gguf_bytes(plan)


def gguf_bytes(plan: ExportPlan) -> int:
    """The bytes of all tensors."""
    sizes = _sizes(plan.shape).items()
    return sum(math.prod(size) * _stored_dtype(name, size, plan.dtype).itemsize for name, size in sizes)


def _stored_dtype(name: str, size: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Of llama.cpp's tensor: that of matrices, fp32 for vectors and routers."""
    return dtype if len(size) > 1 and _ROUTER not in name else torch.float32


def _sizes(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """llama.cpp's tensor name -> its shape."""
    sizes = shape.parameters()
    return {
        target: (sum(sizes[part][0] for part in parts), *sizes[parts[0]][1:])
        for target, parts in gguf_tensors(shape).items()
    }


def _write(plan: ExportPlan, tokenizer: GGUFTokenizer, path: Path, name: str, advance: Callable[[], None]) -> None:
    """Write the file, one tensor in memory at a time."""
    import gguf

    reader, shape, dtype = plan.reader, plan.shape, plan.dtype
    writer = gguf.GGUFWriter(path, _architecture(shape).name)
    _describe_model(writer, gguf, shape, name, dtype)
    _describe_tokenizer(writer, tokenizer)
    sizes = shape.parameters()
    if reader.shapes() != sizes:
        raise CheckpointError(f"{reader.path} does not match the model section of its manifest; use another checkpoint")
    factors = _rope_factors(shape)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, tuple(factors.shape), _as_numpy(factors).dtype, factors.nbytes)
    for target, size in _sizes(shape).items():
        stored = _stored_dtype(target, size, dtype)
        count = math.prod(size) * stored.itemsize
        kind = gguf.GGMLQuantizationType.BF16 if stored == torch.bfloat16 else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(target, size, _as_numpy(torch.empty(0, dtype=stored)).dtype, count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(_as_numpy(factors))
    for target, parts in gguf_tensors(shape).items():
        whole = torch.cat([_rows(reader.read_finite(part, sizes[part]), part, shape) for part in parts])
        stored = _stored_dtype(target, tuple(whole.shape), dtype)
        writer.write_tensor_data(_as_numpy(whole.to(stored).contiguous()))
        advance()
    writer.close()


def _rows(values: Tensor, name: str, shape: ModelConfig) -> Tensor:
    """A parameter as llama.cpp reads it: its order of rows, and gains of norms around 1."""
    part = name.split(".")[-2]
    if shape.norm_zero_centered and part.endswith("_norm"):
        return values + 1
    heads = {"query": shape.num_attention_heads, "key": shape.num_key_value_heads}.get(part)
    if heads is None or not _architecture(shape).rotates_neighbours:
        return values
    return values.view(heads, 2, shape.head_dim // 2, -1).transpose(1, 2).reshape(values.shape)


def _rope_factors(shape: ModelConfig) -> Tensor | None:
    """Of Llama 3's scaling: how much slower each frequency is; llama.cpp has no keys for it."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    plain, _ = rotary_frequencies(shape.rotary_dim, shape.rope_theta, None)
    return (plain / rotary_frequencies(shape.rotary_dim, shape.rope_theta, scaling)[0]).float()


def _as_numpy(values: Tensor) -> Any:
    """numpy has no bf16; the library takes its bits, with the size in elements."""
    return values.view(torch.float16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _describe_model(writer: Any, gguf: ModuleType, shape: ModelConfig, name: str, dtype: torch.dtype) -> None:
    writer.add_name(name)
    writer.add_type("model")
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_BF16 if dtype == torch.bfloat16 else kinds.ALL_F32)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.moe_intermediate_size or shape.intermediate_size)
    if shape.num_experts is not None:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.num_experts_per_token)
        writer.add_expert_feed_forward_length(shape.moe_intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    if shape.normalization == "layer_norm":
        writer.add_layer_norm_eps(shape.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    if shape.position_embedding_type != "rope":
        return
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.rotary_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    if shape.normalization == "layer_norm":
        writer.add_parallel_residual(shape.parallel_residual)
    scaling = shape.rope_scaling
    if scaling is not None and scaling.rope_type != "llama3":
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings or shape.max_position_embeddings)
    if shape.sliding_window is not None:
        writer.add_sliding_window(shape.sliding_window)
        layers = range(shape.num_hidden_layers)
        writer.add_sliding_window_pattern([shape.window(layer) is not None for layer in layers])
    if shape.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(shape.attn_logit_softcapping)
    if shape.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(shape.final_logit_softcapping)


def _describe_tokenizer(writer: Any, tokenizer: GGUFTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.model == "gpt2":
        writer.add_token_merges(tokenizer.merges)
    else:
        writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer.adds_bos)  # llama.cpp has its own default for each model
    writer.add_add_eos_token(False)
    writer.add_eos_token_id(tokenizer.special["eos"])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("unknown", writer.add_unk_token_id),
        ("padding", writer.add_pad_token_id),
    ):
        if name in tokenizer.special:
            add(tokenizer.special[name])
    if tokenizer.template is not None:
        writer.add_chat_template(tokenizer.template)
