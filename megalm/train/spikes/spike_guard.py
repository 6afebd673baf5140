"""The spike guard: detects loss and gradient-norm spikes, and decides whether to skip, roll back or stop.

A spike is a loss or a gradient norm far above those of the steps before. The verdict is a pure function of the step's
and the earlier steps' numbers, which are the same on every rank; the engine requests it once per step, before any
update, and joins the ranks' answers.

Median and MAD (median absolute deviation) replace mean and standard deviation, so that a spike in the window does not
shift what later steps are compared with. Norms are compared by their logarithms, since they differ by factors.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megalm.config.schema import GuardSection
from megalm.engine.interface import Finding, StepResult, UpdateVerdict
from megalm.runs.metrics_log import ATTEMPT_EVENTS, Row

# MAD x 1.4826 is the standard deviation of a normal distribution.
_MAD_TO_SIGMA = 1.4826


class History:
    """Losses and gradient norms of the last `window` accepted steps.

    A number is a spike if it exceeds two limits above the median of the window, one scaled by the noise and one fixed:
    `loss_sigmas` standard deviations and `loss_rise` nats; for a norm `norm_sigmas` of its logarithm and a multiple of
    `norm_factor`.
    """

    def __init__(self, settings: GuardSection) -> None:
        self._settings = settings
        self._steps: deque[tuple[float, float]] = deque(maxlen=settings.window)

    def accept(self, loss: float, norm: float) -> None:
        """Add an accepted step to the window; numbers that are not finite are ignored."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._steps.append((loss, norm))

    def restart(self, steps: Iterable[tuple[float, float]]) -> None:
        """Replace the window by these (loss, norm) pairs, oldest first."""
        self._steps.clear()
        for loss, norm in steps:
            self.accept(loss, norm)

    def judge(self, loss: float, norm: float) -> Finding | None:
        """Return what is out of bounds in these numbers, checking the loss first; None: nothing."""
        rule = self._settings
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
        """Return the median over the window and this step's loss."""
        return statistics.median([*(loss for loss, _ in self._steps), loss])

    def statistics(self) -> dict[str, float | int | None]:
        """Return the window's statistics as `judge` uses them, for a report; grad_norm_sigma is of the logarithm."""
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
    """Return the median, and the standard deviation estimated from the MAD."""
    median = statistics.median(values)
    return median, _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in values)


Action = Literal["continue", "let pass", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What to do after a step, and why.

    Attributes:
        finding: the number that was out of bounds, if any.
        why: for `stop`: the reason.
    """

    action: Action
    finding: Finding | None = None
    why: str = ""


class SpikeGuard:
    """Judges steps by the `guard` section of the configuration.

    The engine calls `judge` before each update, the trainer `respond` after each step.
    """

    def __init__(self, settings: GuardSection) -> None:
        self._settings = settings
        self.history = History(settings)
        self._refused_in_a_row = 0
        self._let_pass_step: int | None = None

    def judge(self, loss: float, grad_norm: float) -> UpdateVerdict:
        """Judge a step before its update; has no side effects."""
        finding = self.history.judge(loss, grad_norm)
        return UpdateVerdict(refuses=finding is not None and self._settings.policy != "off", finding=finding)

    def respond(self, result: StepResult, step: int, rollbacks: int) -> Verdict:
        """Decide what to do after a step, given the verdict on its update; record the step.

        Args:
            rollbacks: the number of rollbacks so far.
        """
        if result.verdict is None:  # an overflow at this loss scale, which says nothing about the model
            return Verdict("continue")
        finding = result.verdict.finding
        if finding is None and result.refused:
            finding = Finding("loss", result.loss)  # another rank saw what this one did not
        if finding is not None:
            return self._act_on(finding, result, step, rollbacks)
        self._refused_in_a_row = 0
        self.history.accept(result.loss, result.grad_norm)
        return self._limit(result.loss, step)

    def suspicion(self, step: int) -> str | None:
        """Return why a checkpoint of this step is suspect; None: it is good."""
        if self._refused_in_a_row:
            return f"the guard refused the last {self._refused_in_a_row} update(s)"
        if self._let_pass_step is not None and step < self._let_pass_step + self._settings.window:
            return f"the guard let the spike at step {self._let_pass_step} pass (guard.policy=off)"
        return None

    def steps_of(self, newest_first: Iterable[Row], step: int) -> list[tuple[float, float]]:
        """Return (loss, gradient norm) of a run's last steps up to `step` from its metrics, for `history.restart`.

        Leaves out refused updates and overflows, as the run itself did.

        Args:
            newest_first: the rows from the last on; no more of them are read than the window needs.
        """
        live_step, found = step, []
        left_out: set[tuple[Any, Any]] = set()  # attempt and step; the events of a step come before its row
        waiting: Row | None = None
        for row in newest_first:
            if row.get("event") in ATTEMPT_EVENTS:  # it withdraws the rows before it of later steps
                live_step = live_step if row.get("step") is None else min(live_step, row["step"])
            elif row.get("event") in ("spike", "skip") and row.get("decided") != "let pass":
                left_out.add((row.get("attempt"), row.get("at_step", row.get("step"))))
            elif row["kind"] == "train" and row["step"] <= live_step:
                found += self._accepted(waiting, left_out)
                waiting = row
                if len(found) == self._settings.window:
                    return found[::-1]
        return [*found, *self._accepted(waiting, left_out)][::-1]

    @staticmethod
    def _accepted(row: Row | None, left_out: set[tuple[Any, Any]]) -> list[tuple[float, float]]:
        if row is None or (row.get("attempt"), row["step"]) in left_out:
            return []
        loss, norm = (math.nan if row.get(name) is None else row[name] for name in ("loss", "grad_norm"))
        return [(loss, norm)]

    def forget_refusals(self) -> None:
        """Reset the count of refused updates after a rollback."""
        self._refused_in_a_row = 0

    def _act_on(self, finding: Finding, result: StepResult, step: int, rollbacks: int) -> Verdict:
        settings = self._settings
        if settings.policy == "off" and not result.refused:
            # Add it to the window too: a loss that stays high must not count as a spike forever.
            self.history.accept(result.loss, result.grad_norm)
            self._let_pass_step = step
            return Verdict("let pass", finding)
        self._refused_in_a_row += 1
        if settings.policy == "skip":
            if self._refused_in_a_row <= settings.max_skips_in_a_row:
                return Verdict("skip", finding)
            most = settings.max_skips_in_a_row
            return Verdict("stop", finding, f"{most + 1} spikes in a row (guard.max_skips_in_a_row={most})")
        if settings.policy == "rollback":
            if rollbacks < settings.max_rollbacks:
                return Verdict("rollback", finding)
            return Verdict(
                "stop", finding, f"after {rollbacks} rollbacks (guard.max_rollbacks={settings.max_rollbacks})"
            )
        return Verdict("stop", finding, f"guard.policy={settings.policy}")

    def _limit(self, loss: float, step: int) -> Verdict:
        """Apply `guard.stop_above`: stop a run that does not learn."""
        limit = self._settings.stop_above
        if limit is None or step <= (self._settings.after_step or 0):
            return Verdict("continue")
        median = self.history.median_loss(loss)
        if median <= limit:
            return Verdict("continue")
        why = f"guard.stop_above={limit:g}, guard.after_step={self._settings.after_step}"
        return Verdict("stop", Finding("loss", loss, median, None, limit), why)
