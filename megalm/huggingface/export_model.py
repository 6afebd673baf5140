"""Exports a checkpoint as a folder that transformers loads: configuration, weights, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import shape_of
from megalm.data.tokenizers.tokenizer import BYTES, Tokenizer, tokenizer_of
from megalm.errors import CheckpointError
from megalm.huggingface.config_json import require_exportable, to_config
from megalm.huggingface.export_tokenizer import ExportedTokenizer, write_tokenizer
from megalm.huggingface.export_weights import write_model
from megalm.huggingface.model_card import Card
from megalm.huggingface.output_folder import complete_folder, require_free, require_room
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
    bytes: int


@dataclass(frozen=True)
class Exported:
    """The bytes of the weights and the tokenizer that an export has written."""

    bytes: int
    tokenizer: ExportedTokenizer


def plan_export(reader: CheckpointReader, target: Path, dtype: torch.dtype, tokenizer: str | None) -> ExportPlan:
    """Check an export before any tensor of the checkpoint is read.

    Args:
        dtype: fp32, which is exact, or bf16.
        tokenizer: the tokenizer's path, if it has moved since training.

    Raises:
        CheckpointError: transformers has no such model, or the tokenizer is not the run's.
        ConfigError: `target` is not free.
        DataError: the tokenizer is missing, or the disk has too little space.
    """
    require_free(target)
    manifest = reader.manifest
    shape = shape_of(reader.path, manifest)
    require_exportable(shape)
    used = tokenizer_of(reader.path, manifest.tokenizer, manifest.fingerprints.tokenizer, manifest.eod_id, tokenizer)
    if used.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{used.spec} has {used.vocab_size:,} ids, but the model has {shape.vocab_size:,}; name the right tokenizer"
        )
    size = _OVERHEAD_BYTES + shape.parameter_count() * dtype.itemsize
    if used.spec != BYTES:
        size += _TOKENIZER_TIMES * Path(used.spec).stat().st_size
    require_room(target, size)
    return ExportPlan(reader, target, dtype, shape, used, size)


def export_checkpoint(plan: ExportPlan, largest_file_bytes: int, name: str, advance: Callable[[], None]) -> Exported:
    """Write the model to the plan's target folder, which is complete or absent.

    Args:
        name: the model's name in its card.
        advance: called after each tensor is written.

    Raises:
        CheckpointError: parameters are missing or not finite.
        ConfigError: the target is no longer free.
        DataError: the disk is full.
    """
    reader, shape, used = plan.reader, plan.shape, plan.tokenizer
    dtype = str(plan.dtype).removeprefix("torch.")

    def fill(folder: Path) -> Exported:
        made = write_tokenizer(used, folder, shape.max_position_embeddings)
        config = to_config(shape, used.eod_id, made.pad_id, dtype)
        write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("eos_token_id", "pad_token_id") if config[key] is not None}
        if undecodable := [*np.flatnonzero(~used.known_ids()).tolist(), *range(used.vocab_size, shape.vocab_size)]:
            ids["suppress_tokens"] = undecodable
        write_json(folder / "generation_config.json", ids)
        card = Card(name, reader.path, reader.manifest, shape, dtype, made, reader.ema)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        return Exported(write_model(reader, shape, folder, plan.dtype, largest_file_bytes, advance), made)

    return complete_folder(plan.target, plan.bytes, fill)
