"""A checkpoint as a folder that transformers loads: configuration, weights, tokenizer, card. Complete or absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import shape_of
from megalm.data.tokenizers.tokenizer import BYTES, Tokenizer, tokenizer_of
from megalm.errors import CheckpointError
from megalm.huggingface.config_json import family_of, refuse_what_they_lack, to_config
from megalm.huggingface.export_tokenizer import ExportedTokenizer, write_tokenizer
from megalm.huggingface.export_weights import write_model
from megalm.huggingface.model_card import Card
from megalm.huggingface.output_folder import complete_folder, require_free, require_room
from megalm.huggingface.weight_mapping import their_tensors
from megalm.model.model_config import ModelConfig
from megalm.utils.atomic_files import write_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


# Card and headers; the tokenizer's file is kept and said again, in longer words.
_BYTES_BESIDE = 1 << 20
_TOKENIZER_TIMES = 8


@dataclass(frozen=True)
class Plan:
    """What will be written: about so many bytes, and so many tensors."""

    shape: ModelConfig
    tokenizer: Tokenizer
    bytes: int
    tensors: int


@dataclass(frozen=True)
class Exported:
    """What was written."""

    family: str  # model_type there
    parameters: int
    bytes: int
    tokenizer: ExportedTokenizer


def export_checkpoint(
    reader: CheckpointReader,
    target: Path,
    dtype: torch.dtype,
    largest_file_bytes: int,
    name: str,
    tokenizer: str | None,
    tell: Callable[[], None],
) -> Exported:
    """Write the model of a verified checkpoint to the folder `target`.

    Args:
        dtype: fp32, which is exact, or bf16.
        name: of the model, in its card.
        tokenizer: where the checkpoint's is now, if it moved.
        tell: called when a tensor is written.

    Raises:
        CheckpointError, ConfigError, DataError: as of `exportable`; or the disk has become full.
    """
    plan = exportable(reader, target, dtype, tokenizer)
    shape, used = plan.shape, plan.tokenizer
    stored = str(dtype).removeprefix("torch.")
    results: list[Exported] = []

    def fill(folder: Path) -> None:
        made = write_tokenizer(used, folder, shape.max_position_embeddings)
        write_json(folder / CONFIG, to_config(shape, used.eod_id, made.pad_id, stored))
        ids = {"bos_token_id": None, "eos_token_id": used.eod_id, "pad_token_id": made.pad_id}
        write_json(folder / GENERATION_CONFIG, {key: value for key, value in ids.items() if value is not None})
        card = Card(name, reader.path, reader.manifest, shape, stored, made)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        written = write_model(reader, shape, folder, dtype, largest_file_bytes, tell)
        results.append(Exported(family_of(shape), shape.parameter_count(), written, made))

    complete_folder(target, plan.bytes, fill)
    return results[0]


def exportable(reader: CheckpointReader, target: Path, dtype: torch.dtype, tokenizer: str | None) -> Plan:
    """What an export will write, known before any file of the checkpoint is read. Arguments as of `export_checkpoint`.

    Raises:
        CheckpointError: transformers has no such model, or the tokenizer is another than the run's.
        ConfigError: `target` is not free.
        DataError: the tokenizer is gone, or the disk too full.
    """
    require_free(target)
    manifest = reader.manifest
    shape = shape_of(reader.path, manifest)
    refuse_what_they_lack(shape)
    used = tokenizer_of(reader.path, manifest.tokenizer, manifest.fingerprints.tokenizer, tokenizer)
    if used.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{used.spec} has {used.vocab_size:,} ids, the model {shape.vocab_size:,}; name the right one"
        )
    size = _BYTES_BESIDE + shape.parameter_count() * dtype.itemsize
    if used.spec != BYTES:
        size += _TOKENIZER_TIMES * Path(used.spec).stat().st_size
    plan = Plan(shape, used, size, len(their_tensors(shape)))
    require_room(target, plan.bytes)
    return plan
