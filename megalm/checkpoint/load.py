"""Reading a checkpoint into any layout: a fragment is put together from whatever ranges the files hold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megalm.checkpoint.fragment import FragmentKey
from megalm.checkpoint.layout import MANIFEST
from megalm.checkpoint.save import FORMAT
from megalm.checkpoint.shard import tensor_name
from megalm.errors import CheckpointError

_HASH_BLOCK_BYTES = 1 << 24


class CheckpointReader:
    """An open checkpoint. Files are mapped into memory: a fragment costs the bytes that it is made of.

    Raises:
        CheckpointError: no manifest, an unknown format, a missing file or one of the wrong size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        for name, facts in self.manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; {_advice(path)}")
            if file.stat().st_size != facts["bytes"]:
                raise CheckpointError(
                    f"{file} has {file.stat().st_size} bytes, the manifest says {facts['bytes']}; {_advice(path)}"
                )
        self._files: dict[str, Any] = {}

    def verify(self, part: int = 0, parts: int = 1) -> str:
        """Compare every `parts`-th file from `part` with its SHA-256; the first difference in words, or ''."""
        for name in sorted(self.manifest["files"])[part::parts]:
            found, expected = _sha256(self.path / name), self.manifest["files"][name]["sha256"]
            if found != expected:
                return (
                    f"{self.path / name}: SHA-256 is {found[:16]}..., the manifest says {expected[:16]}...; "
                    + _advice(self.path)
                )
        return ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["tensors"].items()}

    def read(self, key: FragmentKey) -> Tensor:
        """The fragment's values, fp32 [stop - start].

        Raises:
            CheckpointError: the parameter is not in the checkpoint, has another shape, or has holes.
        """
        entry = self.manifest["tensors"].get(key.name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no parameter {key.name}; it is of another model")
        if tuple(entry["shape"]) != key.shape:
            raise CheckpointError(
                f"{self.path}: {key.name} has shape {tuple(entry['shape'])}, the model's has {key.shape}; "
                "it is of another model"
            )
        result = torch.empty(key.stop - key.start)
        covered = 0
        for stored in entry["fragments"]:
            start, stop = max(stored["start"], key.start), min(stored["stop"], key.stop)
            if stored["kind"] != key.kind or start >= stop:
                continue
            values = self._open(stored["file"]).get_tensor(tensor_name(key)).view(-1)
            result[start - key.start : stop - key.start] = values[start - stored["start"] : stop - stored["start"]]
            covered += stop - start
        if covered != key.stop - key.start:
            raise CheckpointError(
                f"{self.path}: {covered} of {key.stop - key.start} values of {tensor_name(key)} found"
            )
        return result

    def model(self) -> dict[str, Tensor]:
        """The whole fp32 model by canonical name."""
        whole = {name: FragmentKey(name, "master", shape, 0, math.prod(shape)) for name, shape in self.shapes().items()}
        return {name: self.read(key).view(key.shape) for name, key in whole.items()}

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]


def read_manifest(path: Path) -> Mapping[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is absent, not JSON, or of a later format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST} is not JSON ({error}); {_advice(path)}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def _advice(path: Path) -> str:
    return f"choose an earlier one with --resume (megalm checkpoint list {path.parent.parent})"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
