"""What becomes of each training step: applied, let pass, skipped, or the run stopped or set back.

The judgement is a pure function of (loss, gradient norm) and of the steps before, which every rank has alike; the
engine joins the ranks' answers before anything is updated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megalm.config.schema import GuardSection
from megalm.engine.protocol import StepResult
from megalm.tracking.metrics import Row, live_rows
from megalm.train.spikes import Finding, History, Thresholds

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

    `accept` goes to the engine, `verdict` follows each step.
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

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Before the update, of finite numbers: may it be applied?"""
        return self._settings.policy == "off" or self.history.judge(loss, grad_norm) is None

    def verdict(self, result: StepResult, step: int, rollbacks: int) -> Verdict:
        """After the step; remembers it.

        Args:
            rollbacks: how many there were.
        """
        if result.skipped:  # an overflow at this loss scale, which is no news of the model
            return Verdict("go on")
        finding = self.history.judge(result.loss, result.grad_norm)
        if finding is None and result.refused:
            finding = Finding("loss", result.loss)  # another rank saw what this one did not
        if finding is not None:
            return self._respond(finding, result, step, rollbacks)
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

    def _respond(self, finding: Finding, result: StepResult, step: int, rollbacks: int) -> Verdict:
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
