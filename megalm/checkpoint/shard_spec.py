"""Fragments: the unit in which an engine passes training state to and from a checkpoint. Independent of DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # planning reads checkpoints without torch
    from collections.abc import Callable

    from torch import Tensor

# The fp32 master, moments of Adam or Muon, a moving average of the master: a parameter has what its optimizer keeps.
FragmentKind = Literal["master", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema"]
# The manifest's "holds" for a checkpoint with masters only, such as an imported model.
WEIGHTS = "weights"
# And for one with Adam's moments and the step too, but without a position in data and schedule.
WEIGHTS_AND_MOMENTS = "weights_and_moments"


@dataclass(frozen=True)
class FragmentKey:
    """Elements [start, stop) of a parameter's rectangle, flattened in row-major order.

    Args:
        name: canonical name of the unsharded parameter.
        shape: its full shape.
        rectangle: per dimension the [first, last) rows that the tensor-parallel shard holds; None: the full parameter.
    """

    name: str
    kind: FragmentKind
    shape: tuple[int, ...]
    start: int
    stop: int
    rectangle: tuple[tuple[int, int], ...] | None = None

    @property
    def tensor_name(self) -> str:
        """In a file, e.g. `master/layers.0.mlp.up.weight`; unique there: a rank owns one range of a parameter."""
        return f"{self.kind}/{self.name}"

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Fragment:
    """The values of a key, fp32 [stop - start].

    Args:
        values: a tensor, or what reads one, so that a checkpoint does not hold them all in memory.
    """

    key: FragmentKey
    values: Tensor | Callable[[], Tensor]

    @property
    def tensor(self) -> Tensor:
        """The values; what is read, is read at each access."""
        return self.values() if callable(self.values) else self.values
