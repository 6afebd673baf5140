"""What a run tells of its steps: rows of metrics.jsonl and lines for the person, on rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megalm.checkpoint.writer import Saved
from megalm.engine.protocol import StepResult
from megalm.train.evaluate import TOTAL, Evaluation
from megalm.train.expected import Quantity, expectations
from megalm.train.parts import Parts
from megalm.train.position import Position
from megalm.train.report import StepLine


@dataclass
class Record:
    """Every method is told where the run stands."""

    parts: Parts
    _doubts_peak: bool = field(default=False, init=False)

    def event(self, position: Position, name: str, **fields: Any) -> None:
        if self.parts.metrics is not None:
            self.parts.metrics.row("event", event=name, step=position.step, attempt=position.attempt, **fields)

    def step(self, position: Position, result: StepResult, rate: float, seconds: float) -> None:
        """The step that `position` has just come to, which took so many `seconds`."""
        parts = self.parts
        tokens_per_second = parts.run.tokens_per_step / seconds
        mfu = parts.flops_per_token * tokens_per_second / parts.peak_flops
        if result.skipped:
            self.event(position, "skip", reason="gradient overflow", loss_scale=result.loss_scale)
            parts.reporter.say(
                f"step {position.step}: update skipped, gradients overflowed at scale {result.loss_scale:g}"
            )
        if position.step % parts.run.config.train.log_interval_steps == 0 and parts.metrics is not None:
            parts.metrics.row(
                "train",
                step=position.step,
                tokens=position.tokens,
                samples=position.samples,
                loss=result.loss,
                lr=rate,
                grad_norm=result.grad_norm,
                loss_scale=result.loss_scale,
                tokens_per_second=tokens_per_second,
                step_seconds=seconds,
                mfu=mfu,
                memory_bytes=parts.engine.peak_memory_bytes(),
                attempt=position.attempt,
            )
        if mfu > 1 and not self._doubts_peak:
            self._doubts_peak = True
            self._warn(
                position,
                f"MFU above 100%: the peak of {parts.peak_flops / 1e12:.2f} TFLOP/s is too low, as a measured one is "
                "where other programs were at work just then; tokens/s are right",
            )
        parts.reporter.step(StepLine(position.step, result.loss, rate, result.grad_norm, tokens_per_second, mfu))
        self._hold_against_document(position, "training_loss", lambda: parts.guard.history.median_loss(result.loss))

    def evaluation(self, position: Position, result: Evaluation, whole: bool) -> None:
        """One set's, or that of all together."""
        parts = self.parts
        if parts.metrics is not None:
            parts.metrics.row(
                "eval",
                step=position.step,
                tokens=position.tokens,
                loss=result.loss,
                perplexity=result.perplexity,
                bits_per_byte=result.bits_per_byte,
                dataset=result.dataset,
                targets=result.targets,
                whole=whole,
                attempt=position.attempt,
            )
        of_set = "" if result.dataset == TOTAL else f" on {result.dataset}"
        parts.reporter.say(f"step {position.step}: validation{of_set} {result}")
        if result.dataset == TOTAL:
            self._hold_against_document(position, "validation_loss", lambda: result.loss)

    def checkpoint(self, position: Position, saved: Saved) -> None:
        """One that has become complete."""
        fields = {"path": saved.path.name, "seconds": saved.write_seconds, "stall_seconds": saved.stall_seconds}
        self.event(position, "checkpoint", **fields, bytes=saved.bytes, saved_step=saved.step, pruned=saved.pruned)
        times = f"{saved.write_seconds:.1f} s, training waited {saved.stall_seconds:.2f} s"
        self.parts.reporter.say(f"step {saved.step}: checkpoint {saved.path} ({times})")
        if saved.notice:
            self.parts.reporter.say(f"WARNING: {saved.notice}")

    def _warn(self, position: Position, text: str) -> None:
        self.event(position, "warning", text=text)
        self.parts.reporter.say(f"WARNING: {text}")

    def _hold_against_document(self, position: Position, quantity: Quantity, loss: Callable[[], float]) -> None:
        """Tell what a recipe's document had at this step, if it says."""
        parts = self.parts
        for found in expectations(parts.run.config.documented, quantity, position.step, loss):
            self.event(
                position,
                "expected",
                quantity=quantity,
                loss=found.loss,
                low=found.low,
                high=found.high,
                met=found.is_met,
            )
            parts.reporter.say(str(found))
