"""How the ranks of a tensor group hold the residual stream between the sharded layers.

Whole on every rank, or, with `parallel.sequence`, one slice of the sequence each: then norms, dropout and residuals
are computed and kept once in the group, not once a rank. Shapes: B batch, T sequence, S = T / ranks, H hidden.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megalm.parallel import collectives
from megalm.parallel.collectives import Finish
from megalm.parallel.process_groups import AxisGroup


class ResidualLayout(Protocol):
    group: AxisGroup
    is_sequence_sharded: bool

    def whole(self, hidden: Tensor) -> Tensor:
        """The stream as [B, T, H]; gradients that the ranks find for it are summed."""
        ...

    def join(self, addend: Tensor) -> Tensor:
        """The ranks' addends [B, T, H], summed, as the stream."""
        ...

    def begin_whole(self, hidden: Tensor) -> Finish:
        """`whole` without a gradient, under way."""
        ...

    def begin_gradient(self, addend: Tensor) -> Finish:
        """From this rank's part of the gradient of `whole` [B, T, H] to the stream's gradient, under way."""
        ...


class ReplicatedResidual:
    """[B, T, H] on every rank."""

    is_sequence_sharded = False

    def __init__(self, group: AxisGroup) -> None:
        self.group = group

    def whole(self, hidden: Tensor) -> Tensor:
        return collectives.SumGradient.apply(hidden, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def join(self, addend: Tensor) -> Tensor:
        return collectives.Sum.apply(addend, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def begin_whole(self, hidden: Tensor) -> Finish:
        return lambda: hidden

    def begin_gradient(self, addend: Tensor) -> Finish:
        return collectives.begin_sum(addend, self.group)


class SequenceShardedResidual:
    """[B, S, H]: each rank holds the slice of the sequence that its place in the group says."""

    is_sequence_sharded = True

    def __init__(self, group: AxisGroup) -> None:
        self.group = group

    def whole(self, hidden: Tensor) -> Tensor:
        return collectives.GatherSequence.apply(hidden, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def join(self, addend: Tensor) -> Tensor:
        return collectives.ScatterSum.apply(addend, self.group)  # type: ignore[no-untyped-call]  # torch: untyped

    def begin_whole(self, hidden: Tensor) -> Finish:
        return collectives.begin_gather_sequence(hidden, self.group)

    def begin_gradient(self, addend: Tensor) -> Finish:
        return collectives.begin_scatter_sum(addend, self.group)
