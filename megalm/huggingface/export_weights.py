"""Writes the weights of a checkpoint of any layout as Hugging Face safetensors, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.safetensors_file import TensorEntry, write_tensors
from megalm.errors import CheckpointError
from megalm.huggingface.weight_mapping import HFTensor, hf_tensors
from megalm.model.model_config import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_model(
    reader: CheckpointReader,
    shape: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    largest_file_bytes: int,
    advance: Callable[[], None],
) -> int:
    """Write the fp32 masters into `folder`, rounded to `dtype` (fp32 or bf16), and return the bytes of all tensors.

    Args:
        largest_file_bytes: more bytes are split into several files with an index; each file has at least one tensor.
        advance: called after each tensor is written.

    Raises:
        CheckpointError: the checkpoint's parameters are not the model's, are incomplete or are not finite.
        OSError: the folder cannot be written.
    """
    sizes = shape.parameters()
    if reader.shapes() != sizes:
        different = sorted(set(reader.shapes().items()) ^ set(sizes.items()))
        raise CheckpointError(
            f"{reader.path}: {different[0][0]} does not match the model section of its manifest; use another checkpoint"
        )
    tensors = hf_tensors(shape)
    files = _split(tensors, dtype, largest_file_bytes)

    def values(members: Sequence[HFTensor]) -> Iterator[Tensor]:
        for tensor in members:
            yield to_hf(tensor, [reader.read_finite(name, sizes[name], tensor.expert) for name, _ in tensor.parts])
            advance()

    for name, members in files.items():
        entries = [TensorEntry(tensor.name, tensor.shape, dtype) for tensor in members]
        with (folder / name).open("wb") as file:
            write_tensors(file, entries, values(members))
    total = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor.name: name for name, members in files.items() for tensor in members},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def weight_files(shape: ModelConfig, dtype: torch.dtype, largest_file_bytes: int) -> dict[str, int]:
    """File name -> bytes of its tensors, as `write_model` writes them."""
    files = _split(hf_tensors(shape), dtype, largest_file_bytes)
    return {
        name: sum(math.prod(tensor.shape) for tensor in members) * dtype.itemsize for name, members in files.items()
    }


def to_hf(tensor: HFTensor, parts: Sequence[Tensor]) -> Tensor:
    """Concatenate megalm's parameters to a Hugging Face tensor."""
    if tensor.heads:
        whole = torch.cat([part.unflatten(0, (tensor.heads, -1)) for part in parts], dim=1).flatten(0, 1)
    else:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.t() if tensor.transposed else whole


def from_hf(tensor: HFTensor, whole: Tensor, part: str) -> Tensor:
    """One of megalm's parameters of a Hugging Face tensor, as a view of it unless heads are apart there."""
    straight = whole.t() if tensor.transposed else whole
    rows = straight.unflatten(0, (tensor.heads or 1, -1))
    start = 0
    for name, shape in tensor.parts:
        size = shape[0] // (tensor.heads or 1)
        if name == part:
            return rows[:, start : start + size].flatten(0, 1)
        start += size
    raise AssertionError(part)


def read_part(tensors: Sequence[HFTensor], part: str, load: Callable[[HFTensor], Tensor]) -> Tensor:
    """One of megalm's parameters, fp32, of the tensors that hold it; experts are stacked one after the other."""
    first = from_hf(tensors[0], load(tensors[0]), part).float()
    if tensors[0].expert is None:
        return first
    stacked = first.new_empty(len(tensors), *first.shape)
    stacked[0] = first
    for row, tensor in enumerate(tensors[1:], 1):
        stacked[row] = load(tensor)
    return stacked


def _split(tensors: Sequence[HFTensor], dtype: torch.dtype, largest: int) -> dict[str, list[HFTensor]]:
    """File name -> its tensors, in order."""
    groups: list[list[HFTensor]] = [[]]
    free = largest
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if size > free and groups[-1]:
            groups.append([])
            free = largest
        groups[-1].append(tensor)
        free -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}
