"""A checkpoint's weights as one ordinary safetensors file: whole parameters by canonical name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.safetensors_file import TensorEntry, write_tensors
from megalm.checkpoint.shard_spec import FragmentKey
from megalm.errors import CheckpointError
from megalm.utils.atomic_files import sync_directory, write_atomically


def write_weights(
    reader: CheckpointReader, target: Path, dtype: torch.dtype, tell: Callable[[], None] = lambda: None
) -> int:
    """Write the fp32 masters to `target`, rounded to `dtype` (fp32 or bf16); complete or absent, bytes written.

    One parameter is in memory at a time, whatever the layout that wrote the checkpoint.

    Args:
        tell: called after each parameter.

    Raises:
        CheckpointError: a parameter has holes, or a file cannot be read.
        OSError: the target cannot be written.
    """
    shapes = reader.shapes()
    entries = [TensorEntry(name, shape, dtype) for name, shape in shapes.items()]

    def wholes() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            yield read_whole(reader, name, shape)
            tell()

    write_atomically(target, lambda file: write_tensors(file, entries, wholes()))
    sync_directory(target.parent)
    return target.stat().st_size


def read_whole(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's fp32 master in its shape.

    Raises:
        CheckpointError: it is not there, has another shape, or has holes.
    """
    return reader.read(FragmentKey(name, "master", shape, 0, math.prod(shape))).view(shape)


def read_finite(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> Tensor:
    """The same of a model that is to be used: what it says would be wrong in silence, or break somewhere else.

    Raises:
        CheckpointError: as of `read_whole`, or it has NaN or infinity.
    """
    found = read_whole(reader, name, shape)
    if not is_finite(found):
        raise CheckpointError(
            f"{reader.path}: {name} has numbers that are not finite; the run had gone wrong by then, choose an earlier "
            "checkpoint"
        )
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether all its numbers are; NaN is the least and the greatest of whatever it is among. Takes no memory."""
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
