"""Read a checkpoint into any layout, or consolidate it into one safetensors file of full parameters.

A fragment is assembled from the stored fragments that overlap it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.manifest import advice, damaged_file, read_manifest, wrong_file
from megalm.checkpoint.safetensors_file import TensorEntry, write_tensors
from megalm.checkpoint.shard_spec import WEIGHTS, FragmentKey, FragmentKind
from megalm.errors import CheckpointError
from megalm.utils.atomic_files import sync_directory, write_atomically


class CheckpointReader:
    """An open checkpoint. Files are memory-mapped, so reading a fragment reads only its own bytes.

    Args:
        ema: whole parameters are read from the moving average of the weights.

    Raises:
        CheckpointError: no manifest, an unknown format, a missing file or a file of the wrong size; or no average.
    """

    def __init__(self, path: Path, ema: bool = False) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        if problem := wrong_file(path, self.manifest):
            raise CheckpointError(problem)
        if ema and not self.manifest.has_ema:
            raise CheckpointError(
                f"{path} has no moving average of the weights: it was saved without train.ema_decay; leave out --ema"
            )
        self.ema = ema
        self._files: dict[str, Any] = {}

    def close(self) -> None:
        """Unmap the files: a file that is deleted while mapped still occupies disk space."""
        self._files.clear()

    @property
    def holds_weights_only(self) -> bool:
        """Whether the checkpoint has masters but no moments, as an imported model does."""
        return self.manifest.holds == WEIGHTS

    def verify(self, part: int = 0, parts: int = 1, on_progress: Callable[[], None] = lambda: None) -> str:
        """Check every `parts`-th file from `part` against its SHA-256; return the first mismatch in words, or ''.

        Args:
            on_progress: called after each `HASH_BLOCK_BYTES` read, and after the rest of a file.
        """
        return damaged_file(self.path, self.manifest, part, parts, on_progress)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.manifest.tensors.items()}

    def kinds(self, name: str) -> tuple[FragmentKind, ...]:
        """Return what the checkpoint holds of a parameter, the master first."""
        return self.manifest.tensors[name].kinds

    def read(self, key: FragmentKey) -> Tensor:
        """Return the fragment's values, fp32 [stop - start].

        Moments of a parameter that was frozen are zeros. Without a moving average the weights stand for it: so it
        begins, and of a frozen parameter it is them.

        Raises:
            CheckpointError: the parameter is missing, has another shape, or is incomplete.
        """
        entry = self.manifest.tensors.get(key.name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no parameter {key.name}; it belongs to another model")
        if entry.shape != key.shape:
            raise CheckpointError(
                f"{self.path}: {key.name} has shape {entry.shape}, here {key.shape}; it belongs to another model"
            )
        if key.kind == "ema" and "ema" not in entry.kinds:
            key = replace(key, kind="master")
        if key.kind != "master" and key.name in self.manifest.frozen:
            return torch.zeros(key.count)
        result = torch.empty(key.count)
        covered = 0
        wanted = chunks_of(key)
        for stored in (each for each in entry.fragments if each.kind == key.kind):
            there = chunks_of(replace(key, start=stored.start, stop=stored.stop, rectangle=stored.rectangle))
            meeting = [(a, b, corners) for a in there for b in wanted if (corners := overlap(a, b)) is not None]
            if not meeting:
                continue
            values = self._stored(stored.file, key.tensor_name, stored.stop - stored.start)
            for source, target, (first, last) in meeting:
                place = target.view(result, first, last)
                place.copy_(source.view(values, first, last))
                covered += place.numel()
        if covered != key.count:
            raise CheckpointError(f"{self.path} has only {covered} of the {key.count} values of {key.tensor_name}")
        return result

    def read_weights(self, key: FragmentKey) -> Tensor:
        """As `read`, but moments are zeros, and an average begins: for starting from the weights alone."""
        if key.kind in ("master", "ema"):
            return self.read(replace(key, kind="master"))
        return torch.zeros(key.count)

    def model(self) -> dict[str, Tensor]:
        """Return all fp32 parameters by canonical name."""
        return {name: self.read_parameter(name, shape) for name, shape in self.shapes().items()}

    def read_parameter(
        self, name: str, shape: tuple[int, ...], kind: FragmentKind | None = None, row: int | None = None
    ) -> Tensor:
        """Read a full parameter, or another kind of its state, in its shape; errors as for `read`.

        Args:
            row: read this index of the first dimension alone.
        """
        kind = kind or ("ema" if self.ema else "master")
        if row is None:
            return self.read(FragmentKey(name, kind, shape, 0, math.prod(shape))).view(shape)
        rectangle = ((row, row + 1), *((0, size) for size in shape[1:]))
        return self.read(FragmentKey(name, kind, shape, 0, math.prod(shape[1:]), rectangle)).view(shape[1:])

    def read_finite(self, name: str, shape: tuple[int, ...], row: int | None = None) -> Tensor:
        """As `read_parameter`, but refuse NaN and infinity: a model with them fails elsewhere, or is wrong in silence.

        Raises:
            CheckpointError: as `read`, or the parameter has NaN or infinity.
        """
        found = self.read_parameter(name, shape, row=row)
        if not is_finite(found):
            raise CheckpointError(
                f"{self.path}: {name} has NaN or infinite values; choose a checkpoint from before the run diverged"
            )
        return found

    def write_weights(self, target: Path, dtype: torch.dtype, on_progress: Callable[[], None] = lambda: None) -> int:
        """Write the fp32 masters to `target`, rounded to `dtype` (fp32 or bf16); return the bytes written.

        The file is complete or absent. One parameter is in memory at a time, whatever layout wrote the checkpoint.

        Args:
            on_progress: called after each parameter.

        Raises:
            CheckpointError: as for `read`.
            OSError: the target cannot be written.
        """
        shapes = self.shapes()
        entries = [TensorEntry(name, shape, dtype) for name, shape in shapes.items()]

        def parameters() -> Iterator[Tensor]:
            for name, shape in shapes.items():
                yield self.read_parameter(name, shape)
                on_progress()

        write_atomically(target, lambda file: write_tensors(file, entries, parameters()))
        sync_directory(target.parent)
        return target.stat().st_size

    def _stored(self, file: str, name: str, length: int) -> Tensor:
        """Read a stored fragment, fp32 [length].

        Raises:
            CheckpointError: the file cannot be read, or its tensor has another dtype or length.
        """
        try:
            if file not in self._files:
                self._files[file] = safe_open(self.path / file, framework="pt")
            values = self._files[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file}: {name} cannot be read ({error}); {advice(self.path)}") from None
        if values.dtype != torch.float32 or values.numel() != length:
            raise CheckpointError(
                f"{self.path / file}: {name} is {values.dtype} [{values.numel()}], the manifest says fp32 [{length}]"
            )
        return values.view(-1)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. Uses min and max, which propagate NaN, so it allocates no mask."""
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


# A fragment is a flat range of a rectangle, which splits into a few boxes: the end of a row, full rows, the start of a
# row. Boxes intersect in boxes, which are copied as slices, without an index per element.

Corner = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """The box [first, last) of the full parameter, stored at `offset` of a fragment's values."""

    first: Corner
    last: Corner
    offset: int

    @property
    def sizes(self) -> Corner:
        return tuple(last - first for first, last in zip(self.first, self.last, strict=True))

    def view(self, values: Tensor, first: Corner, last: Corner) -> Tensor:
        """View the box [first, last) (in full-parameter coordinates) of a fragment's flat `values`."""
        own = values[self.offset : self.offset + math.prod(self.sizes)].view(self.sizes)
        return own[tuple(slice(a - start, b - start) for a, b, start in zip(first, last, self.first, strict=True))]


def chunks_of(key: FragmentKey) -> list[Chunk]:
    """Split the fragment into boxes, in the order of its values."""
    rectangle = key.rectangle or tuple((0, size) for size in key.shape)
    assert len(rectangle) == len(key.shape), key
    corner = tuple(first for first, _ in rectangle)
    found, offset = [], 0
    for first, last in _ranges(tuple(last - first for first, last in rectangle), key.start, key.stop):
        box = Chunk(_add(corner, first), _add(corner, last), offset)
        offset += math.prod(box.sizes)
        found.append(box)
    return found


def overlap(one: Chunk, other: Chunk) -> tuple[Corner, Corner] | None:
    """Return the corners of the intersection of two boxes; None if they do not overlap."""
    first = tuple(map(max, one.first, other.first))
    last = tuple(map(min, one.last, other.last))
    return (first, last) if all(a < b for a, b in zip(first, last, strict=True)) else None


def _ranges(sizes: Corner, start: int, stop: int) -> Iterator[tuple[Corner, Corner]]:
    """Split the flat elements [start, stop) of an array of `sizes` into boxes, in order."""
    if start >= stop:
        return
    inner = math.prod(sizes[1:])
    row, within = divmod(start, inner)
    if within or stop - start < inner:  # a partial row
        end = min(stop, (row + 1) * inner)
        for first, last in _ranges(sizes[1:], within, end - row * inner):
            yield (row, *first), (row + 1, *last)
        yield from _ranges(sizes, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0 for _ in sizes[1:])), (row + rows, *sizes[1:])
    yield from _ranges(sizes, start + rows * inner, stop)


def _add(one: Corner, other: Corner) -> Corner:
    return tuple(a + b for a, b in zip(one, other, strict=True))
