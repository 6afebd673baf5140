"""The engine as the training loop sees it: the `Engine` protocol, step results and update verdicts.

Imports neither deepspeed nor torch.distributed; only train/setup.py knows the concrete classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megalm.checkpoint.shard_spec import Fragment
from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch

PROFILED_PHASE = "megalm "  # begins the name of a phase of a step in a profile
PROFILED_COMMUNICATION = f"{PROFILED_PHASE}communication "  # and the axis: a collective, or the wait for one

Quantity = Literal["loss", "gradient norm"]


@dataclass(frozen=True)
class Finding:
    """One number of a step that is out of bounds.

    Attributes:
        value: the observed number, possibly not finite.
        median, sigma, limit: of the steps before; None if the value is not finite, which needs no comparison.
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
    """The judgment on a step's numbers before its update.

    Args:
        refuses: the update must not be applied.
        finding: the number that is out of bounds, if any.
    """

    refuses: bool
    finding: Finding | None = None


# (loss of the global batch, global gradient norm before clipping), the same on every rank -> the verdict. Must have no
# side effects: an engine also calls it for preflight steps.
JudgeUpdate = Callable[[float, float], UpdateVerdict]


@dataclass(frozen=True)
class RoutingStatistics:
    """Where the routers of a model with experts sent the tokens of a step.

    Attributes:
        layers: numbers of the layers with experts.
        counts: by layer, the tokens of each expert.
        entropy: nats, of the routers' probabilities, the mean over tokens and layers; log(experts) if all are equal.
        balance_loss, z_loss: of the routers, without their coefficients, the mean over sequences and layers.
        dropped: the share of choices beyond the experts' capacity; None: they have none.
    """

    layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    entropy: float
    balance_loss: float
    z_loss: float
    dropped: float | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Args:
        loss: nats per target, averaged over the global batch.
        grad_norm: global L2 norm of the gradient before clipping; inf or nan after an overflow.
        loss_scale: 1.0 without loss scaling.
        verdict: the joint verdict of all ranks; None if DeepSpeed skipped the update without asking.
        dataset_losses: by dataset of a mixture, nats per target of its samples; None without a target in this step.
        routing: of a model with experts.
    """

    loss: float
    grad_norm: float
    loss_scale: float
    verdict: UpdateVerdict | None
    dataset_losses: tuple[float | None, ...] = ()
    routing: RoutingStatistics | None = None

    @property
    def skipped(self) -> bool:
        """Whether the update was skipped because gradients overflowed at this loss scale (fp16)."""
        return self.verdict is None

    @property
    def refused(self) -> bool:
        """Whether the update was refused because of its numbers; weights, moments and step count did not change."""
        return self.verdict is not None and self.verdict.refuses


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along one axis.

    Args:
        axis: `data`, `tensor` or `pipeline`; `model` (tensor x pipeline); `stage` (data x tensor), Muon's; `control`
            for decisions; else `other`.
        collective: such as `all_reduce`; each end of a transfer has its own, `send` and `recv`.
        bytes: of the whole messages: what is reduced, or what is gathered in the end.
    """

    axis: str
    collective: str
    calls: int
    bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class TrafficMeter(Protocol):
    """Counts the traffic of this rank."""

    def start(self) -> None: ...
    def stop(self) -> list[Traffic]:
        """Return the traffic since `start`."""


class Engine(Protocol):
    """A model being trained. Every method is collective: all ranks call it with the same arguments.

    The `JudgeUpdate` that the engine was built with judges each update before it is applied. If one rank refuses, all
    do. Numbers that are not finite are always refused.
    """

    def train_step(self, batch: GlobalBatch, step: int, learning_rate: float) -> StepResult:
        """Forward and backward over the micro-batches, then one update; `step` counts from 1.

        Steps may differ in the number of micro-batches.
        """

    def refused_gradients(self) -> dict[str, float]:
        """Return canonical name -> gradient norm before clipping of the step just refused; empty if not finite."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Return the sum of losses in nats over the micro-batches of all data-parallel ranks."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the moving average of its weights; for evaluation. The run needs train.ema_decay."""

    def row_losses(self, batch: MicroBatch) -> npt.NDArray[np.float64]:
        """Return the sum of losses in nats of each row [B]; all ranks pass the same rows, which are single texts."""

    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """[B, T] tokens, [B] positions -> fp32 logits [B, V] of the token after each position."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's fragments of the fp32 masters and moments."""

    def counters(self) -> dict[str, Any]:
        """Return `optimizer_step`, `skipped_steps` and `loss_scaler`, ready for JSON."""

    def restore(self, read: Any, counters: dict[str, Any], step: int) -> None:
        """Load masters and moments from `read` (FragmentKey -> tensor) and continue from `step`."""

    def reset(self) -> None:
        """Clear the optimizer's moments and all counters; keep the weights."""

    def phase_seconds(self) -> dict[str, float]:
        """Return this rank's seconds of each phase of the last step; empty without `wall_clock_breakdown`."""

    def peak_memory_bytes(self) -> int:
        """Return this rank's peak memory: of the device's allocator, or of the process on a CPU."""

    def close(self) -> None:
        """Remove offloaded state from local disks; call after the last use."""


@dataclass(frozen=True)
class StalledCollective:
    """A collective, or a message from rank to rank, in which ranks wait for others.

    Attributes:
        collective: such as "all_reduce", "recv".
        number: of its kind in this group.
        missing: the ranks that have not joined it, or have entered another one.
        instead: what they have entered, if they have.
        since_ns: when the first rank entered it, in unix time.
    """

    collective: str
    group: str
    number: int
    waiting: tuple[int, ...]
    missing: tuple[int, ...]
    instead: str | None = None
    since_ns: int = 0
