"""Weights from a checkpoint of any layout to safetensors in Hugging Face form, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.safetensors_file import TensorEntry, write_tensors
from megalm.errors import CheckpointError
from megalm.huggingface.weight_mapping import TheirTensor, their_tensors
from megalm.model.model_config import ModelConfig
from megalm.utils.atomic_files import write_atomically

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_model(
    reader: CheckpointReader,
    shape: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    largest_file_bytes: int,
    tell: Callable[[], None],
) -> int:
    """Write the fp32 masters into `folder`, rounded to `dtype` (fp32 or bf16); bytes of tensors written.

    Args:
        largest_file_bytes: where the tensors are more, several files and an index are written; a file holds at least
            one tensor.
        tell: called when a tensor is written.

    Raises:
        CheckpointError: the checkpoint has other parameters than the model, holes, or numbers that are not finite.
        OSError: the folder cannot be written.
    """
    if reader.shapes() != shape.parameters():
        different = sorted(set(reader.shapes().items()) ^ set(shape.parameters().items()))
        raise CheckpointError(
            f"{reader.path}: {different[0][0]} is not as its own model section says; it cannot be used"
        )
    tensors = their_tensors(shape)
    files = _shared_out(tensors, dtype, largest_file_bytes)
    for name, members in files.items():
        entries = [TensorEntry(tensor.name, tensor.shape, dtype) for tensor in members]
        values = _told(reader, members, dtype, tell)
        write_atomically(folder / name, partial(write_tensors, entries=entries, tensors=values))
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor.name: name for name, members in files.items() for tensor in members},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def to_theirs(tensor: TheirTensor, parts: Sequence[Tensor]) -> Tensor:
    """Our parameters as their tensor."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.t() if tensor.transposed else whole


def to_ours(tensor: TheirTensor, whole: Tensor, part: str) -> Tensor:
    """One of our parameters out of their tensor, a view."""
    straight = whole.t() if tensor.transposed else whole
    start = 0
    for name, shape in tensor.parts:
        if name == part:
            return straight[start : start + shape[0]]
        start += shape[0]
    raise AssertionError(part)


def _told(
    reader: CheckpointReader, tensors: Sequence[TheirTensor], dtype: torch.dtype, tell: Callable[[], None]
) -> Iterator[Tensor]:
    for tensor in tensors:
        yield to_theirs(tensor, [reader.read_finite(name, shape) for name, shape in tensor.parts])
        tell()


def _shared_out(tensors: Sequence[TheirTensor], dtype: torch.dtype, largest: int) -> dict[str, list[TheirTensor]]:
    """File name -> its tensors, in order."""
    groups: list[list[TheirTensor]] = [[]]
    room = largest
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = largest
        groups[-1].append(tensor)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}
