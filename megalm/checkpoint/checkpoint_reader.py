"""Reading a checkpoint into any layout: a fragment is put together from whatever fragments the files hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.manifest import StoredFragment, advice, damaged_file, read_manifest, wrong_file
from megalm.checkpoint.safetensors_file import tensor_name
from megalm.checkpoint.shard_overlap import chunks_of, overlap
from megalm.checkpoint.shard_spec import WEIGHTS, FragmentKey
from megalm.errors import CheckpointError


class CheckpointReader:
    """An open checkpoint. Files are mapped into memory: a fragment costs the bytes that it is made of.

    Raises:
        CheckpointError: no manifest, an unknown format, a missing file or one of the wrong size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        if problem := wrong_file(path, self.manifest):
            raise CheckpointError(problem)
        self._files: dict[str, Any] = {}

    def close(self) -> None:
        """Let go of the files: one that is deleted while it is mapped still takes its room on the disk."""
        self._files.clear()

    @property
    def holds_weights_only(self) -> bool:
        """It was no run's state: there are masters and no moments."""
        return self.manifest.holds == WEIGHTS

    def verify(self, part: int = 0, parts: int = 1, tell: Callable[[], None] = lambda: None) -> str:
        """Compare every `parts`-th file from `part` with its SHA-256; the first difference in words, or ''.

        Args:
            tell: called for each `HASH_BLOCK_BYTES` that are read, and for the rest of a file.
        """
        return damaged_file(self.path, self.manifest, part, parts, tell)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.manifest.tensors.items()}

    def read(self, key: FragmentKey) -> Tensor:
        """The fragment's values, fp32 [stop - start].

        Raises:
            CheckpointError: the parameter is not in the checkpoint, has another shape, or has holes.
        """
        entry = self.manifest.tensors.get(key.name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no parameter {key.name}; it is of another model")
        if entry.shape != key.shape:
            raise CheckpointError(
                f"{self.path}: {key.name} has shape {entry.shape}, the model's has {key.shape}; it is of another model"
            )
        result = torch.empty(key.stop - key.start)
        covered = 0
        wanted = chunks_of(key)
        for stored in (each for each in entry.fragments if each.kind == key.kind):
            there = chunks_of(self._key(key, stored))
            meeting = [(a, b, corners) for a in there for b in wanted if (corners := overlap(a, b)) is not None]
            if not meeting:
                continue
            values = self._stored(stored.file, tensor_name(key), stored.stop - stored.start)
            for source, target, (first, last) in meeting:
                place = target.view(result, first, last)
                place.copy_(source.view(values, first, last))
                covered += place.numel()
        if covered != key.stop - key.start:
            raise CheckpointError(
                f"{self.path}: {covered} of {key.stop - key.start} values of {tensor_name(key)} found"
            )
        return result

    def read_weights(self, key: FragmentKey) -> Tensor:
        """As `read`, but moments are zeros: for who starts with the weights alone."""
        return self.read(key) if key.kind == "master" else torch.zeros(key.stop - key.start)

    def model(self) -> dict[str, Tensor]:
        """The whole fp32 model by canonical name."""
        whole = {name: FragmentKey(name, "master", shape, 0, math.prod(shape)) for name, shape in self.shapes().items()}
        return {name: self.read(key).view(key.shape) for name, key in whole.items()}

    def _key(self, wanted: FragmentKey, stored: StoredFragment) -> FragmentKey:
        """What the manifest says of a stored fragment of the parameter that is wanted.

        Raises:
            CheckpointError: it does not lie in the parameter.
        """
        sides = stored.rectangle or tuple((0, size) for size in wanted.shape)
        count = math.prod(last - first for first, last in sides)
        fits = len(sides) == len(wanted.shape) and all(
            first < last <= size for (first, last), size in zip(sides, wanted.shape, strict=True)
        )
        if not fits or not stored.start <= stored.stop <= count:
            raise CheckpointError(f"{self.path}: {tensor_name(wanted)} has a part outside of it; {advice(self.path)}")
        return replace(wanted, start=stored.start, stop=stored.stop, rectangle=sides)

    def _stored(self, file: str, name: str, length: int) -> Tensor:
        """A stored fragment, fp32 [length].

        Raises:
            CheckpointError: the file is no safetensors file of the manifest's files, or holds something else.
        """
        if file not in self.manifest.files:
            raise CheckpointError(f"{self.path}: {name} is said to be in {file}, which is none of its files")
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
