"""What the training loop sees of an engine and of the other ranks: no deepspeed, no torch.distributed.

train/setup.py alone knows the classes behind these protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megalm.checkpoint.shard_spec import HasFragment
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch

T = TypeVar("T")

Quantity = Literal["loss", "gradient norm"]


@dataclass(frozen=True)
class Finding:
    """One number of a step that is out of bounds.

    Attributes:
        value: what was seen; may be no finite number.
        median, sigma, limit: of the steps before, None where they decided nothing: the value is not finite.
    """

    quantity: Quantity
    value: float
    median: float | None = None
    sigma: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        if self.limit is None:
            return f"{self.quantity} {self.value}"
        return f"{self.quantity} {self.value:.4g} above {self.limit:.4g} (median {self.median:.4g})"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class UpdateVerdict:
    """What is said of a step's numbers before they change anything.

    Args:
        refuses: the update is not to be applied.
        finding: what is out of bounds; None: nothing is.
    """

    refuses: bool
    finding: Finding | None = None


# (loss of the global batch, global gradient norm before clipping), the same on every rank -> the verdict. It changes
# nothing: an engine asks it about preflight steps, too.
JudgeUpdate = Callable[[float, float], UpdateVerdict]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Args:
        loss: nats per target, averaged over the global batch.
        grad_norm: L2 norm of the whole gradient before clipping; inf or nan where it overflowed.
        loss_scale: 1.0 without loss scaling.
        verdict: of all ranks on this update; None where nobody was asked.
    """

    loss: float
    grad_norm: float
    loss_scale: float
    verdict: UpdateVerdict | None

    @property
    def skipped(self) -> bool:
        """The update was not applied, because gradients overflowed at this loss scale (fp16)."""
        return self.verdict is None

    @property
    def refused(self) -> bool:
        """The update was not applied, because of its numbers: weights, moments and step count are what they were."""
        return self.verdict is not None and self.verdict.refuses


class Engine(Protocol):
    """A model being trained. Every method is collective: all ranks call it with the same arguments.

    Each update is judged before it changes anything, by the `JudgeUpdate` that the engine was built with. The ranks'
    verdicts are joined: one refusal is everybody's. What is not finite is always refused.
    """

    def train_step(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        """Forward and backward over the micro-batches, then one update; `step` counts from 1."""
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
