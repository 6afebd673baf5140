"""Exports a checkpoint as a folder that transformers loads: configuration, weights, tokenizer, model card."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import shape_of
from megalm.checkpoint.safetensors_file import TensorEntry, write_tensors
from megalm.data.tokenizers.chat_template import ChatTemplate, load_chat_template
from megalm.data.tokenizers.tokenizer import BYTES, Tokenizer, tokenizer_of
from megalm.errors import CheckpointError
from megalm.huggingface.config_json import family_of, to_config
from megalm.huggingface.export_tokenizer import GENERATION_CONFIG, ExportedTokenizer, write_tokenizer
from megalm.huggingface.model_card import Card
from megalm.huggingface.output_folder import complete_folder, require_free, require_room
from megalm.huggingface.weight_mapping import INDEX, WEIGHTS, HFTensor, hf_tensors, to_hf
from megalm.model.model_config import ModelConfig
from megalm.utils.atomic_files import write_json

# Upper bounds for the card and the file headers, and for the exported tokenizer as a multiple of the original's size.
_OVERHEAD_BYTES = 1 << 20
_TOKENIZER_TIMES = 8


@dataclass(frozen=True)
class ExportPlan:
    """A checked export; `bytes` is an upper estimate."""

    reader: CheckpointReader
    target: Path
    dtype: torch.dtype
    shape: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    bytes: int


@dataclass(frozen=True)
class Exported:
    """The bytes of the weights and the tokenizer that an export has written."""

    bytes: int
    tokenizer: ExportedTokenizer


class FoldedReader(CheckpointReader):
    """Reads a model with `mup_base_width` as one without, which transformers and llama.cpp have, of the same logits.

    The final norm, which only the head reads, takes the logits' multiplier; queries, or the gains of their norm, what
    the attention scale is beside the usual 1/sqrt(head_dim).
    """

    def __init__(self, reader: CheckpointReader, shape: ModelConfig) -> None:
        super().__init__(reader.path, reader.ema)
        assert shape.attention_scale is not None
        self._logits = 1 / shape.width_multiplier
        self._scores = shape.attention_scale * math.sqrt(shape.head_dim)
        self._scaled = (".query_norm.weight",) if shape.qk_norm else (".query.weight", ".query.bias")
        self._offset = 1.0 if shape.norm_zero_centered else 0.0  # of a norm's stored gain
        self.shape = replace(shape, mup_base_width=None, attention_scale=None)

    def read_finite(self, name: str, shape: tuple[int, ...], row: int | None = None) -> Tensor:
        values = super().read_finite(name, shape, row)
        if name.startswith("final_norm."):
            factor = self._logits
        elif name.endswith(self._scaled):
            factor = self._scores
        else:
            return values
        offset = self._offset if name.endswith("norm.weight") else 0.0
        return ((values.double() + offset) * factor - offset).float()


def plan_export(
    reader: CheckpointReader, target: Path, dtype: torch.dtype, tokenizer: str | None, chat_template: Path | None = None
) -> ExportPlan:
    """Check an export before any tensor of the checkpoint is read.

    Args:
        dtype: fp32, which is exact, or bf16.
        tokenizer: the tokenizer's path, if it has moved since training.
        chat_template: a file with one; None: the tokenizer's own, if any.

    Raises:
        CheckpointError: transformers has no such model, or the tokenizer is not the run's.
        ConfigError: `target` is not free.
        DataError: the tokenizer is missing, the template is no valid one, or the disk has too little space.
    """
    require_free(target)
    manifest = reader.manifest
    shape = shape_of(reader.path, manifest)
    if shape.mup_base_width is not None:
        reader = folded = FoldedReader(reader, shape)
        shape = folded.shape
    family_of(shape)  # refuses a model that transformers does not have
    ends = manifest.bos_id, manifest.eod_id
    used = tokenizer_of(reader.path, manifest.tokenizer, manifest.fingerprints.tokenizer, ends, tokenizer)
    if used.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{used.spec} has {used.vocab_size:,} ids, but the model has {shape.vocab_size:,}; name the right tokenizer"
        )
    size = _OVERHEAD_BYTES + shape.parameter_count() * dtype.itemsize
    if used.spec != BYTES:
        size += _TOKENIZER_TIMES * Path(used.spec).stat().st_size
    require_room(target, size)
    template = None if chat_template is None else load_chat_template(chat_template, used.spec)
    return ExportPlan(reader, target, dtype, shape, used, template, size)


def export_checkpoint(plan: ExportPlan, largest_file_bytes: int, name: str, advance: Callable[[], None]) -> Exported:
    """Write the model to the plan's target folder, which is complete or absent.

    Args:
        largest_file_bytes: more bytes are split into several files with an index; each file has at least one tensor.
        name: the model's name in its card.
        advance: called after each tensor is written.

    Raises:
        CheckpointError: parameters are missing or not finite.
        ConfigError: the target is no longer free.
        DataError: the disk is full.
    """

    def fill(folder: Path) -> Exported:
        made = _write_small_files(plan, folder, name)
        return Exported(_write_weights(plan, folder, largest_file_bytes, advance), made)

    return complete_folder(plan.target, plan.bytes, fill)


def planned_files(plan: ExportPlan, largest_file_bytes: int, name: str) -> dict[str, int]:
    """File name -> bytes of what an export writes, about: headers of the weights' files are not counted."""
    files = _split(hf_tensors(plan.shape), plan.dtype, largest_file_bytes)
    weights = {name: _bytes_of(members, plan.dtype) for name, members in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        _write_small_files(plan, Path(folder), name)
        return {**{path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}, **weights}


def _write_small_files(plan: ExportPlan, folder: Path, name: str) -> ExportedTokenizer:
    """Write everything but the weights."""
    shape, used = plan.shape, plan.tokenizer
    dtype = str(plan.dtype).removeprefix("torch.")
    sizes = shape.max_position_embeddings, shape.vocab_size
    made = write_tokenizer(used, folder, *sizes, family_of(shape).name, plan.template)
    write_json(folder / "config.json", to_config(shape, used.eod_id, made.special, dtype))
    write_json(folder / GENERATION_CONFIG, _generation_config(used, shape.vocab_size, made.special))
    card = Card(name, plan.reader.path, plan.reader.manifest, shape, dtype, made, plan.reader.ema)
    (folder / "README.md").write_text(card.text(), encoding="utf-8")
    return made


def _generation_config(tokenizer: Tokenizer, rows: int, special: Mapping[str, int]) -> dict[str, Any]:
    """The sampling defaults of an imported model, with the ids of this tokenizer, and those that have no token."""
    read = tokenizer.beside(GENERATION_CONFIG)
    found = {key: value for key, value in read.items() if key not in ("transformers_version", "_from_model_config")}
    found |= {key.replace("token", "token_id"): token for key, token in special.items() if key != "unk_token"}
    ends = read.get("eos_token_id")
    found["eos_token_id"] = ends if isinstance(ends, list) and tokenizer.eod_id in ends else tokenizer.eod_id
    if undecodable := [*np.flatnonzero(~tokenizer.known_ids()).tolist(), *range(tokenizer.vocab_size, rows)]:
        found["suppress_tokens"] = undecodable
    return found


def _write_weights(plan: ExportPlan, folder: Path, largest_file_bytes: int, advance: Callable[[], None]) -> int:
    """Write the fp32 masters, rounded to the plan's dtype, one tensor in memory at a time; return their bytes."""
    reader, dtype, sizes = plan.reader, plan.dtype, plan.shape.parameters()
    if reader.shapes() != sizes:
        different = sorted(set(reader.shapes().items()) ^ set(sizes.items()))
        raise CheckpointError(
            f"{reader.path}: {different[0][0]} does not match the model section of its manifest; use another checkpoint"
        )
    files = _split(hf_tensors(plan.shape), dtype, largest_file_bytes)

    def values(members: Sequence[HFTensor]) -> Iterator[Tensor]:
        for tensor in members:
            yield to_hf(tensor, [reader.read_finite(name, sizes[name], tensor.expert) for name, _ in tensor.parts])
            advance()

    for name, members in files.items():
        entries = [TensorEntry(tensor.name, tensor.shape, dtype) for tensor in members]
        with (folder / name).open("wb") as file:
            write_tensors(file, entries, values(members))
    total = sum(_bytes_of(members, dtype) for members in files.values())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor.name: name for name, members in files.items() for tensor in members},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _bytes_of(tensors: Sequence[HFTensor], dtype: torch.dtype) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize


def _split(tensors: Sequence[HFTensor], dtype: torch.dtype, largest: int) -> dict[str, list[HFTensor]]:
    """File name -> its tensors, in order."""
    groups: list[list[HFTensor]] = [[]]
    free = largest
    for tensor in tensors:
        size = _bytes_of([tensor], dtype)
        if size > free and groups[-1]:
            groups.append([])
            free = largest
        groups[-1].append(tensor)
        free -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}
