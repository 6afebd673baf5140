"""The unit in which training state passes between an engine and a checkpoint: it knows nothing of DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:  # who plans a run looks at checkpoints without torch
    from torch import Tensor

FragmentKind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[FragmentKind, ...] = get_args(FragmentKind)  # the fp32 master first, then Adam's moments
# What a manifest says of itself under "holds" where there are masters alone: an imported model.
WEIGHTS = "weights"


@dataclass(frozen=True)
class FragmentKey:
    """Elements [start, stop) of a parameter's rectangle, flattened in row-major order.

    Args:
        name: canonical name of the unsharded parameter.
        shape: its full shape.
        rectangle: per dimension the [first, last) rows that the tensor-parallel shard holds; None: all of it.
    """

    name: str
    kind: FragmentKind
    shape: tuple[int, ...]
    start: int
    stop: int
    rectangle: tuple[tuple[int, int], ...] | None = None


class HasFragment(Protocol):
    """A fragment, or what reads its tensor only when it is asked for."""

    @property
    def key(self) -> FragmentKey: ...

    @property
    def tensor(self) -> Tensor: ...


@dataclass(frozen=True)
class Fragment:
    key: FragmentKey
    tensor: Tensor  # fp32, [stop - start]
