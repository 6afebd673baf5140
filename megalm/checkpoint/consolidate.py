"""Consolidate a checkpoint's weights into one safetensors file: full parameters by canonical name."""

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
    reader: CheckpointReader, target: Path, dtype: torch.dtype, on_progress: Callable[[], None] = lambda: None
) -> int:
    """Write the fp32 masters to `target`, rounded to `dtype` (fp32 or bf16); return the bytes written.

    The file is complete or absent. One parameter is in memory at a time, whatever layout wrote the checkpoint.

    Args:
        on_progress: called after each parameter.

    Raises:
        CheckpointError: a parameter is incomplete, or a file cannot be read.
        OSError: the target cannot be written.
    """
    shapes = reader.shapes()
    entries = [TensorEntry(name, shape, dtype) for name, shape in shapes.items()]

    def wholes() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            yield read_whole(reader, name, shape)
            on_progress()

    write_atomically(target, lambda file: write_tensors(file, entries, wholes()))
    sync_directory(target.parent)
    return target.stat().st_size


def read_whole(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read a parameter's fp32 master in its shape.

    Raises:
        CheckpointError: it is missing, has another shape, or is incomplete.
    """
    return reader.read(FragmentKey(name, "master", shape, 0, math.prod(shape))).view(shape)


def read_finite(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> Tensor:
    """As `read_whole`, but refuse NaN and infinity: a model with them fails elsewhere, or is wrong in silence.

    Raises:
        CheckpointError: as `read_whole`, or the parameter has NaN or infinity.
    """
    found = read_whole(reader, name, shape)
    if not is_finite(found):
        raise CheckpointError(
            f"{reader.path}: {name} has NaN or infinite values; choose a checkpoint from before the run diverged"
        )
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Uses min and max, which propagate NaN, so it allocates no mask."""
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
