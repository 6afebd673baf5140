"""What becomes of each training step: applied, let pass, skipped, or the run stopped or set back.

The verdict is a pure function of (loss, gradient norm) and of the steps before, which every rank has alike; the
engine asks for it once a step, before anything is updated, and joins the ranks' answers.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megalm.config.schema import GuardSection
from megalm.engine.interface import Finding, StepResult, UpdateVerdict
from megalm.runs.metrics_log import Row, live_rows

# What a spike is: a loss or a gradient norm far above those of the steps before.
#
# Median and MAD (median absolute deviation) stand for mean and standard deviation, because one spike among the window's
# numbers must not move what the next one is measured by. Norms are compared by their logarithm: they differ by factors.

# MAD x 1.4826 is the standard deviation of a normal distribution.
_MAD_TO_SIGMA = 1.4826


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


Action = Literal["go on", "let pass", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What to do after a step, and why.

    Attributes:
        finding: the number that was out of bounds, None where the step was in order.
        why: for `stop`: what made an end of it.
    """

    action: Action
    finding: Finding | None = None
    why: str = ""


class SpikeGuard:
    """Judges steps as `guard.*` says.

    The engine calls `judge` before each update, the trainer `respond` after each step.
    """

    def __init__(self, settings: GuardSection) -> None:
        self._settings = settings
        self.history = History(
            Thresholds(
                window=settings.window,
                warmup_steps=settings.warmup_steps,
                loss_sigmas=settings.loss_sigmas,
                loss_rise=settings.loss_rise,
                norm_sigmas=settings.norm_sigmas,
                norm_factor=settings.norm_factor,
            )
        )
        self._refused_in_a_row = 0
        self._let_pass_step: int | None = None

    def judge(self, loss: float, grad_norm: float) -> UpdateVerdict:
        """Before the update; remembers nothing."""
        finding = self.history.judge(loss, grad_norm)
        return UpdateVerdict(refuses=finding is not None and self._settings.policy != "off", finding=finding)

    def respond(self, result: StepResult, step: int, rollbacks: int) -> Verdict:
        """After the step, to the verdict on its update; remembers the step.

        Args:
            rollbacks: how many there were.
        """
        if result.verdict is None:  # an overflow at this loss scale, which is no news of the model
            return Verdict("go on")
        finding = result.verdict.finding
        if finding is None and result.refused:
            finding = Finding("loss", result.loss)  # another rank saw what this one did not
        if finding is not None:
            return self._act_on(finding, result, step, rollbacks)
        self._refused_in_a_row = 0
        self.history.accept(result.loss, result.grad_norm)
        return self._limit(result.loss, step)

    def suspicion(self, step: int) -> str | None:
        """Why a checkpoint of this step is not to be trusted; None: it is."""
        if self._refused_in_a_row:
            return f"the last {self._refused_in_a_row} update(s) were refused as spikes"
        if self._let_pass_step is not None and step < self._let_pass_step + self._settings.window:
            return f"a spike at step {self._let_pass_step} was let pass (guard.policy=off)"
        return None

    def steps_of(self, rows: Iterable[Row], step: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of a run's steps up to `step`, as its metrics tell them, for `history.restart`.

        Left out is what the run itself left out: refused updates and overflows, of the attempt that they were in.
        """
        live = live_rows(rows)
        left_out = {
            (row.get("attempt"), row.get("at_step", row["step"]))
            for row in live
            if row.get("event") in ("spike", "skip") and row.get("decided") != "let pass"
        }
        return [
            (row["loss"], row["grad_norm"])
            for row in live
            if row["kind"] == "train" and row["step"] <= step and (row.get("attempt"), row["step"]) not in left_out
        ][-self._settings.window :]

    def forget_refusals(self) -> None:
        """After a rollback: what was refused is not in the state any more."""
        self._refused_in_a_row = 0

    def _act_on(self, finding: Finding, result: StepResult, step: int, rollbacks: int) -> Verdict:
        settings = self._settings
        if settings.policy == "off" and not result.refused:
            # The window takes it too: a loss that has come to stay is no spike for ever.
            self.history.accept(result.loss, result.grad_norm)
            self._let_pass_step = step
            return Verdict("let pass", finding)
        self._refused_in_a_row += 1
        if settings.policy == "skip":
            if self._refused_in_a_row <= settings.max_skips_in_a_row:
                return Verdict("skip", finding)
            most = settings.max_skips_in_a_row
            return Verdict("stop", finding, f"{most + 1} in a row (guard.max_skips_in_a_row={most})")
        if settings.policy == "rollback":
            if rollbacks < settings.max_rollbacks:
                return Verdict("rollback", finding)
            return Verdict(
                "stop", finding, f"after {rollbacks} rollbacks (guard.max_rollbacks={settings.max_rollbacks})"
            )
        return Verdict("stop", finding, f"guard.policy={settings.policy}")

    def _limit(self, loss: float, step: int) -> Verdict:
        """`guard.stop_above`: a run that does not learn."""
        limit = self._settings.stop_above
        if limit is None or step <= (self._settings.after_step or 0):
            return Verdict("go on")
        median = self.history.median_loss(loss)
        if median <= limit:
            return Verdict("go on")
        why = f"guard.stop_above={limit:g}, guard.after_step={self._settings.after_step}"
        return Verdict("stop", Finding("loss", loss, median, None, limit), why)
