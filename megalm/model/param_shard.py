"""Which part of a canonical parameter a module's own parameter is. Dense models carry no marks: all of it.

A mark is what initial weights, checkpoints and gradient norms need to know of a split, without knowing ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Rectangle = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ShardedAxis:
    """The mark of a parameter.

    Args:
        shape: of the whole parameter.
        rectangle: per dimension the [first, last) rows held here; None: all of it.
        is_owner: of the ranks that hold this part, exactly one speaks for it: in a norm and in a checkpoint.
    """

    shape: tuple[int, ...]
    rectangle: Rectangle | None
    is_owner: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.rectangle is None:
            return self.shape
        return tuple(last - first for first, last in self.rectangle)

    def cut(self, whole: Tensor) -> Tensor:
        """The part of the whole parameter that is held here, a view."""
        if self.rectangle is None:
            return whole
        return whole[tuple(slice(first, last) for first, last in self.rectangle)]


def annotate_shard(parameter: Tensor, shard: ShardedAxis) -> None:
    parameter.shard = shard  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> ShardedAxis:
    """The parameter's mark; call it while the parameter has its own shape (ZeRO 3 flattens it)."""
    found: ShardedAxis | None = getattr(parameter, "shard", None)
    return found if found is not None else ShardedAxis(tuple(parameter.shape), None, is_owner=True)
