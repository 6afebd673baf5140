"""Writing a checkpoint: complete or absent, whatever is killed when.

Each rank writes its own file into `step-N.tmp`; rank 0 writes the manifest last, renames the folder and replaces
`latest`. Everything is fsynced before it is named.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megalm.checkpoint.fragment import Fragment
from megalm.checkpoint.layout import LATEST, MANIFEST, PARTIAL_SUFFIX, REPLACED_SUFFIX, folder_name
from megalm.checkpoint.shard import ShardSummary, write_shard
from megalm.durable import complete_file, sync_directory

T = TypeVar("T")

FORMAT = 1


class Ranks(Protocol):
    """What saving needs of the other ranks."""

    rank: int
    is_main: bool

    def gather(self, value: T) -> list[T]: ...
    def barrier(self) -> None: ...


def save_checkpoint(
    checkpoints: Path,
    step: int,
    fragments: Iterable[Fragment],
    facts: dict[str, Any],
    copies: Sequence[Path],
    ranks: Ranks,
) -> Path:
    """Write `checkpoints/step-N`; collective.

    Args:
        step: completed optimizer steps; names the folder.
        fragments: this rank's part of the training state.
        facts: what else the manifest says (JSON): step, tokens, data position, counters, fingerprints, ...
        copies: files to keep beside the tensors (configuration).

    Raises:
        OSError: on every rank, where any rank could not write; what was begun is removed.
    """
    final = checkpoints / folder_name(step)
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    summary: ShardSummary | None = None
    problem = ""
    try:
        summary = write_shard(partial / f"rank-{ranks.rank:05d}.safetensors", list(fragments))
    except OSError as error:
        problem = f"rank {ranks.rank}: {error}"
    results = ranks.gather((summary, problem))
    if not any(problem for _, problem in results):
        problem = ""
        if ranks.is_main:
            try:
                _commit(partial, final, [summary for summary, _ in results if summary is not None], facts, copies)
            except OSError as error:
                problem = f"rank 0: {error}"
        results = ranks.gather((summary, problem))
    problems = [problem for _, problem in results if problem]
    if problems:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} was not written: {problems[0]}")
    return final


def write_durably(path: Path, text: str) -> None:
    """Make the file `path` hold `text`, atomically and on disk."""
    complete_file(path, lambda file: file.write(text.encode()))
    sync_directory(path.parent)


def _commit(
    partial: Path, final: Path, shards: list[ShardSummary], facts: dict[str, Any], copies: Sequence[Path]
) -> None:
    for source in copies:
        write_durably(partial / source.name, source.read_text())
    files = {shard.file: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
    manifest = {"format": FORMAT, **facts, "files": files, "tensors": _tensor_index(shards)}
    write_durably(partial / MANIFEST, json.dumps(manifest, indent=1))
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():  # the same step of an earlier attempt: it goes only when its successor is in place
        final.rename(replaced)
    partial.rename(final)
    sync_directory(final.parent)
    write_durably(final.parent / LATEST, final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)


def _tensor_index(shards: list[ShardSummary]) -> dict[str, Any]:
    """name -> shape and, per kind, which file holds which range."""
    index: dict[str, Any] = {}
    for shard in shards:
        for key in shard.keys:
            entry = index.setdefault(key.name, {"shape": list(key.shape), "fragments": []})
            place = {name: value for name, value in dataclasses.asdict(key).items() if name not in ("name", "shape")}
            entry["fragments"].append({"file": shard.file, **place})
    return index
