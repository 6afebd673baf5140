"""What the training loop sees of an engine and of the other ranks: no deepspeed, no torch.distributed.

train/setup.py alone knows the classes behind these protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megalm.checkpoint.shard_spec import HasFragment
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch

T = TypeVar("T")

# (loss of the global batch, global gradient norm before clipping) -> whether the update may be applied. Both numbers
# are finite and the same on every rank.
Accept = Callable[[float, float], bool]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Args:
        loss: nats per target, averaged over the global batch.
        grad_norm: L2 norm of the whole gradient before clipping; inf or nan where it overflowed.
        loss_scale: 1.0 without loss scaling.
        skipped: the update was not applied, because gradients overflowed at this loss scale (fp16).
        refused: the update was not applied, because `accept` said no or a number is not finite: weights, moments and
            step count are what they were.
    """

    loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    refused: bool = False


class Engine(Protocol):
    """A model being trained. Every method is collective: all ranks call it with the same arguments."""

    def train_step(
        self, batch: GlobalBatch, step: int, learning_rate: float, accept: Accept | None = None
    ) -> StepResult:
        """Forward and backward over the micro-batches, then one update; `step` counts from 1.

        `accept` is asked before anything is updated; the ranks' answers are joined, one refusal is everybody's.
        """
        ...

    def refused_gradients(self) -> dict[str, float]:
        """Canonical name -> gradient norm before clipping of the step just refused; empty where it was no number."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Sum of losses in nats over this rank's micro-batches, summed over all data-parallel ranks."""
        ...

    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """[B, T] tokens, [B] positions -> fp32 logits [B, V] of what follows each position."""
        ...

    def fragments(self) -> Iterator[HasFragment]:
        """This rank's part of the fp32 masters and moments."""
        ...

    def counters(self) -> dict[str, Any]:
        """JSON: `optimizer_step`, `skipped_steps`, `loss_scaler`."""
        ...

    def restore(self, read: Any, counters: dict[str, Any], step: int) -> None:
        """Take masters and moments from `read` (FragmentKey -> tensor) and go on from `step`."""
        ...

    def reset(self) -> None:
        """Forget the optimizer's moments and all counters; the weights stay."""
        ...

    def peak_memory_bytes(self) -> int:
        """Highest memory of this rank so far: the device's allocator, or the process on a CPU."""
        ...

    def close(self) -> None:
        """After the last use: what it kept on disks is removed."""
        ...
