"""Compare two checkpoints: their manifests, and the distance between their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.shard_spec import FragmentKind
from megalm.utils.formatting import flatten_to_text

# Different in any two checkpoints, or compared separately.
_UNCOMPARED = ("files", "tensors", "created")


def different_facts(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (dotted name, first value, second value) of each manifest difference; `-` for a missing value."""
    flat = [
        flatten_to_text({name: value for name, value in manifest.items() if name not in _UNCOMPARED}, numbered=True)
        for manifest in (first, second)
    ]
    names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
    pairs = [(name, flat[0].get(name, "-"), flat[1].get(name, "-")) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def different_shapes(first: CheckpointReader, second: CheckpointReader) -> list[tuple[str, str, str]]:
    """Return (parameter, first shape, second shape) of the parameters that cannot be compared."""
    shapes = first.shapes(), second.shapes()
    names = [*shapes[0], *(name for name in shapes[1] if name not in shapes[0])]
    pairs = [(name, *(str(list(there[name])) if name in there else "-" for there in shapes)) for name in names]
    return [(name, here, there) for name, here, there in pairs if here != there]


def largest_differences(
    first: CheckpointReader, second: CheckpointReader, on_progress: Callable[[], None] = lambda: None
) -> dict[str, dict[FragmentKind, float]]:
    """Return model part (`layers.3`) -> kind -> largest absolute difference, over the state that both have.

    One parameter of each checkpoint is in memory at a time. NaN on one side only counts as infinitely far apart.

    Args:
        on_progress: called after each parameter of the first checkpoint.

    Raises:
        CheckpointError: a file cannot be read.
    """
    result: dict[str, dict[FragmentKind, float]] = {}
    others = second.shapes()
    for name, shape in first.shapes().items():
        if others.get(name) == shape:
            row = result.setdefault(_part(name), {})
            for kind in first.kinds(name):
                if kind in second.kinds(name):
                    here, there = (reader.read_parameter(name, shape, kind) for reader in (first, second))
                    row[kind] = max(row.get(kind, 0.0), _distance(here, there))
        on_progress()
    return result


def _distance(here: Tensor, there: Tensor) -> float:
    difference = (here - there).abs()
    difference[(here == there) | (here.isnan() & there.isnan())] = 0.0  # infinities of the same sign are equal
    return float(difference.nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0


def _part(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
