"""Real checkpoints of a made-up state, without an engine: what tests of files and of kills write and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.checkpoint.shard_spec import Fragment, FragmentKey, FragmentKind
from megalm.communicator import SingleProcessCommunicator

KINDS: tuple[FragmentKind, ...] = ("master", "exp_avg", "exp_avg_sq")
SHAPES: dict[str, tuple[int, ...]] = {"embedding.tokens": (7, 5), "layers.0.up": (5, 3), "norm.weight": (5,)}


def whole(step: int, name: str, kind: str) -> torch.Tensor:
    """The parameter at a step, fp32 [elements]: different for every step, name and kind."""
    count = torch.Size(SHAPES[name]).numel()
    return torch.arange(count, dtype=torch.float32) + 100 * step + 0.25 * KINDS.index(kind)  # type: ignore[arg-type]


def fragments(step: int, rank: int = 0, world_size: int = 1) -> list[Fragment]:
    """What a rank owns: an equal part of every parameter."""
    owned = []
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        start, stop = count * rank // world_size, count * (rank + 1) // world_size
        for kind in KINDS:
            key = FragmentKey(name, kind, shape, start, stop)
            owned.append(Fragment(key, whole(step, name, kind)[start:stop]))
    return owned


def save(checkpoints: Path, step: int, comm: Any = None, copies: tuple[Path, ...] = (), **facts: Any) -> Path:
    comm = comm or SingleProcessCommunicator()
    known = {"attempt": 1, "tokens": 10 * step, "created": "2026-11-20T12:00:00", "validation_loss": None}
    parts = fragments(step, comm.rank, comm.size)
    return save_checkpoint(checkpoints, step, parts, {**known, **facts}, copies, comm)


def assert_holds(path: Path, step: int) -> None:
    """Every file is as it was written, and every tensor is the one of `step`."""
    reader = CheckpointReader(path)
    assert reader.verify() == ""
    assert reader.manifest.step == step
    assert set(reader.shapes()) == set(SHAPES)
    for name, shape in SHAPES.items():
        for kind in KINDS:
            found = reader.read(FragmentKey(name, kind, shape, 0, torch.Size(shape).numel()))
            torch.testing.assert_close(found, whole(step, name, kind), rtol=0, atol=0)
