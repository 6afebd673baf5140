"""The manifest of a checkpoint: what makes it complete, and what its files are held to. JSON only, no torch.

It is written last, and sealed: a SHA-256 of its own content stands in it, so that a flipped bit in the step or in the
data position is found like one in a tensor. Nothing that a manifest says is trusted as a path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalm.errors import CheckpointError
from megalm.utils.atomic_files import write_durably

FORMAT = 2
MANIFEST = "manifest.json"

Status = Literal["good", "suspect", "bad"]
STATUSES: tuple[Status, ...] = get_args(Status)

_SEAL = "seal"
HASH_BLOCK_BYTES = 1 << 24

# A plain name in the checkpoint's own folder: no separator, no "..", not hidden.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=0)]


class _StoredFile(BaseModel):
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _StoredFragment(BaseModel):
    file: FileName
    kind: str
    start: Count
    stop: Count
    rectangle: list[tuple[Count, Count]] | None = None


class _StoredTensor(BaseModel):
    shape: list[Count]
    fragments: list[_StoredFragment]


class _Contents(BaseModel):
    """What every reader relies on; what else a manifest says is its writer's business."""

    model_config = ConfigDict(extra="allow")

    files: dict[FileName, _StoredFile]
    tensors: dict[str, _StoredTensor]
    step: Count
    attempt: Count = 1
    status: Status


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Seal `facts` and make them the folder's manifest, atomically and on disk."""
    content = {name: value for name, value in facts.items() if name != _SEAL}
    content = json.loads(
        json.dumps({"format": FORMAT, "status": "good", "status_reason": None, **content})
    )  # as a reader will see it
    # A line each: as short as the fragments of thousands of ranks want it, as legible as a person wants the rest.
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**content, _SEAL: _seal(content)}.items()]
    write_durably(folder / MANIFEST, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is absent, not JSON, of another format, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {advice(folder)}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path} holds no JSON object; {advice(folder)}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')}, this version of megalm reads {FORMAT}; use the "
            "version that wrote it, or another checkpoint"
        )
    content = {name: value for name, value in manifest.items() if name != _SEAL}
    expected, found = manifest.get(_SEAL), _seal(content)
    if expected != found:
        raise CheckpointError(
            f"{path} was altered: its SHA-256 is {found[:16]}..., it says {str(expected)[:16]}...; {advice(folder)}"
        )
    try:
        _Contents.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}; {advice(folder)}") from None
    return content


def set_status(folder: Path, status: Status, reason: str | None) -> None:
    """Mark a checkpoint, atomically.

    Raises:
        CheckpointError: its manifest cannot be read.
    """
    write_manifest(folder, {**read_manifest(folder), "status": status, "status_reason": reason})


def mark_of(manifest: Mapping[str, Any]) -> str:
    """`marked bad (REASON)`, or suspect; "" for a good one."""
    if manifest["status"] == "good":
        return ""
    reason = manifest.get("status_reason")
    return f"marked {manifest['status']}{f' ({reason})' if reason else ''}"


def wrong_file(folder: Path, manifest: Mapping[str, Any]) -> str:
    """The first file that is not there in full size, in words; '' where all are."""
    for name, facts in manifest["files"].items():
        file = folder / name
        if file.is_symlink():
            return f"{file} is a link to {os.readlink(file)}, a checkpoint holds its files itself; {advice(folder)}"
        if not file.is_file():
            return f"{file} is missing; {advice(folder)}"
        if file.stat().st_size != facts["bytes"]:
            found = file.stat().st_size
            return f"{file} has {found} bytes, the manifest says {facts['bytes']}; {advice(folder)}"
    return ""


def damaged_file(
    folder: Path, manifest: Mapping[str, Any], part: int = 0, parts: int = 1, tell: Callable[[], None] = lambda: None
) -> str:
    """Compare every `parts`-th file from `part` with its SHA-256; the first difference in words, or ''.

    Args:
        tell: called for each `HASH_BLOCK_BYTES` that are read, and for the rest of a file.
    """
    for name in sorted(manifest["files"])[part::parts]:
        try:
            found = file_sha256(folder / name, tell)
        except OSError as error:
            return f"{folder / name} cannot be read ({error}); {advice(folder)}"
        expected = manifest["files"][name]["sha256"]
        if found != expected:
            return (
                f"{folder / name}: SHA-256 is {found[:16]}..., the manifest says {expected[:16]}...; {advice(folder)}"
            )
    return ""


def hashed_blocks(manifest: Mapping[str, Any], part: int = 0, parts: int = 1) -> int:
    """How often `damaged_file` tells that it has come further, where nothing is damaged."""
    names = sorted(manifest["files"])[part::parts]
    return sum(-(-manifest["files"][name]["bytes"] // HASH_BLOCK_BYTES) for name in names)


def file_sha256(path: Path, tell: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            tell()
    return digest.hexdigest()


def advice(folder: Path) -> str:
    return f"choose an earlier one with --resume (megalm checkpoint list {folder.parent.parent})"


def without_advice(problem: str, folder: Path) -> str:
    """What is wrong alone, for where an earlier checkpoint has been chosen already."""
    return problem.removesuffix(f"; {advice(folder)}")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
