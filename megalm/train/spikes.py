"""What a spike is: a loss or a gradient norm far above those of the steps before. Pure: no engine, no clock.

Median and MAD (median absolute deviation) stand for mean and standard deviation, because one spike among the window's
numbers must not move what the next one is measured by. Norms are compared by their logarithm: they differ by factors.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# MAD x 1.4826 is the standard deviation of a normal distribution.
_MAD_TO_SIGMA = 1.4826
Quantity = Literal["loss", "gradient norm"]


@dataclass(frozen=True)
class Thresholds:
    """When a number is a spike. Both of a pair must be exceeded: one follows the noise, the other what matters.

    Args:
        window: accepted steps that a number is compared with, the last ones.
        warmup_steps: nothing finite is judged before so many of them are known.
        loss_sigmas, loss_rise: deviations, and nats, above the median loss.
        norm_sigmas, norm_factor: deviations of the logarithm, and times the median norm.
    """

    window: int
    warmup_steps: int
    loss_sigmas: float
    loss_rise: float
    norm_sigmas: float
    norm_factor: float


@dataclass(frozen=True)
class Finding:
    """One number that is out of bounds.

    Attributes:
        value: what was seen; may be no finite number.
        median, sigma, limit: of the window, None where it decided nothing: the value is not finite.
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


class History:
    """Losses and norms of the steps that were applied, as far back as the window reaches."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._steps: deque[tuple[float, float]] = deque(maxlen=thresholds.window)

    def accept(self, loss: float, norm: float) -> None:
        """Remember a step whose update was applied and which was no spike."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._steps.append((loss, norm))

    def restart(self, steps: Iterable[tuple[float, float]]) -> None:
        """Forget everything but these (loss, norm), oldest first."""
        self._steps.clear()
        for loss, norm in steps:
            self.accept(loss, norm)

    def judge(self, loss: float, norm: float) -> Finding | None:
        """What is wrong with these numbers, the loss first; None: nothing is."""
        rule = self._thresholds
        for quantity, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return Finding(quantity, value)  # type: ignore[arg-type]
        if len(self._steps) < rule.warmup_steps:
            return None
        losses = [loss for loss, _ in self._steps]
        median, sigma = _robust(losses)
        limit = median + max(rule.loss_sigmas * sigma, rule.loss_rise)
        if loss > limit:
            return Finding("loss", loss, median, sigma, limit)
        median, sigma = self._log_norms()
        limit = math.exp(median + max(rule.norm_sigmas * sigma, math.log(rule.norm_factor)))
        if norm > limit:
            return Finding("gradient norm", norm, math.exp(median), sigma, limit)
        return None

    def median_loss(self, loss: float) -> float:
        """Of the window and this step's loss."""
        return statistics.median([*(loss for loss, _ in self._steps), loss])

    def statistics(self) -> dict[str, float | int | None]:
        """The window in numbers, for a report, as `judge` measures by them: grad_norm_sigma is of the logarithm."""
        if not self._steps:
            return {"steps": 0}
        losses, norms = zip(*self._steps, strict=True)
        (loss, loss_sigma), (log_norm, norm_sigma) = _robust(losses), self._log_norms()
        return {
            "steps": len(self._steps),
            "loss_median": loss,
            "loss_sigma": loss_sigma,
            "loss_max": max(losses),
            "grad_norm_median": math.exp(log_norm),
            "grad_norm_sigma": norm_sigma,
            "grad_norm_max": max(norms),
        }

    def _log_norms(self) -> tuple[float, float]:
        tiny = 1e-30  # a norm of zero has no logarithm
        return _robust([math.log(max(norm, tiny)) for _, norm in self._steps])


def _robust(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the standard deviation that the MAD stands for."""
    median = statistics.median(values)
    return median, _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in values)
