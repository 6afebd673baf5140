"""Writes a checkpoint as one GGUF file, which llama.cpp and the programs built on it run.

Names, keys and the order of query and key rows are those of llama.cpp's classes for Llama, Qwen3 and GPT-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.errors import CheckpointError
from megalm.gguf.gguf_tokenizer import GGUFTokenizer, to_gguf
from megalm.huggingface.config_json import model_type
from megalm.huggingface.export_model import ExportPlan
from megalm.huggingface.output_folder import complete_folder
from megalm.model.model_config import ModelConfig
from megalm.utils.process_setup import require_extra

GGUF_FILE = "model.gguf"
# Canonical names of a block, without `.weight` and `.bias` -> llama.cpp's.
_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_OUTSIDE = {
    "embedding.tokens": "token_embd",
    "embedding.positions": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
}
_QKV = ("attention.query", "attention.key", "attention.value")


def gguf_tensors(shape: ModelConfig) -> dict[str, tuple[str, ...]]:
    """llama.cpp's tensor name -> megalm's parameters that it concatenates, in the model's order."""
    found: dict[str, tuple[str, ...]] = {}
    fused = shape.style == "gpt2"  # query, key and value are one tensor there
    for name in shape.parameters():
        whole, _, kind = name.rpartition(".")
        if not whole.startswith("layers."):
            found[f"{_OUTSIDE[whole]}.{kind}"] = (name,)
            continue
        _, layer, part = whole.split(".", 2)
        if fused and part in _QKV:
            parts = tuple(f"layers.{layer}.{each}.{kind}" for each in _QKV)
            found[f"blk.{layer}.attn_qkv.{kind}"] = parts
        else:
            found[f"blk.{layer}.{_BLOCK[part]}.{kind}"] = (name,)
    return found


def check_gguf(plan: ExportPlan) -> GGUFTokenizer:
    """Check what an export as GGUF needs; return its tokenizer.

    Raises:
        ConfigError: the package gguf is not installed.
        DataError: llama.cpp would give other ids than the run's tokenizer.
    """
    require_extra("gguf", "--to gguf")
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

    def fill(folder: Path) -> int:
        return write_gguf(plan.reader, plan.shape, tokenizer, folder / GGUF_FILE, plan.dtype, name, advance)

    return complete_folder(plan.target, plan.bytes, fill)


def gguf_bytes(plan: ExportPlan) -> int:
    """The bytes of all tensors."""
    return sum(
        math.prod(size) * (plan.dtype if len(size) > 1 else torch.float32).itemsize
        for size in _sizes(plan.shape).values()
    )


def _sizes(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    """llama.cpp's tensor name -> its shape."""
    sizes = shape.parameters()
    return {
        target: (sum(sizes[part][0] for part in parts), *sizes[parts[0]][1:])
        for target, parts in gguf_tensors(shape).items()
    }


def write_gguf(
    reader: CheckpointReader,
    shape: ModelConfig,
    tokenizer: GGUFTokenizer,
    path: Path,
    dtype: torch.dtype,
    name: str,
    advance: Callable[[], None],
) -> int:
    """Write the file, one tensor in memory at a time; return the bytes of all tensors.

    Args:
        dtype: of the matrices, fp32 (exact) or bf16; vectors are always fp32.
        name: of the model.
        advance: called after each tensor is written.

    Raises:
        CheckpointError: parameters are missing or not finite.
        OSError: the file cannot be written.
    """
    import gguf

    family = model_type(shape)
    writer = gguf.GGUFWriter(path, family)
    _describe_model(writer, gguf, shape, name, dtype)
    _describe_tokenizer(writer, tokenizer)
    sizes = shape.parameters()
    tensors = gguf_tensors(shape)
    if reader.shapes() != sizes:
        raise CheckpointError(f"{reader.path} does not match the model section of its manifest; use another checkpoint")
    total = 0
    for target, size in _sizes(shape).items():
        stored = dtype if len(size) > 1 else torch.float32
        count = math.prod(size) * stored.itemsize
        kind = gguf.GGMLQuantizationType.BF16 if stored == torch.bfloat16 else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(target, size, _as_numpy(torch.empty(0, dtype=stored)).dtype, count, raw_dtype=kind)
        total += count
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for parts in tensors.values():
        whole = torch.cat([_rows(reader.read_finite(part, sizes[part]), part, shape) for part in parts])
        writer.write_tensor_data(_as_numpy(whole.to(dtype if whole.dim() > 1 else torch.float32).contiguous()))
        advance()
    writer.close()
    return total


def _rows(values: Tensor, name: str, shape: ModelConfig) -> Tensor:
    """llama.cpp rotates neighbouring rows of a Llama's heads, megalm (as transformers) the two halves of a head."""
    heads = {"query": shape.num_attention_heads, "key": shape.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or model_type(shape) != "llama":
        return values
    return values.view(heads, 2, shape.head_dim // 2, -1).transpose(1, 2).reshape(values.shape)


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
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    if shape.style == "gpt2":
        writer.add_layer_norm_eps(shape.norm_epsilon)
        return
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)


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
