"""What a run tells, on rank 0 only: the rows of metrics.jsonl, and on the console facts, progress and results.

A terminal gets a bar, a file plain lines. Everything printed is also written to log.txt, with the time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from megalm.checkpoint.discovery import step_of
from megalm.data.readers.questions import task_name
from megalm.planning.recipe_claims import Expectation, Quantity, Span, documented_losses
from megalm.runs.metrics_log import LOSS_OF, TOTAL, Row, describe_unbalanced_experts
from megalm.utils.atomic_files import still_names
from megalm.utils.formatting import PrintableFormatter, format_duration, printable
from megalm.utils.progress import ProgressBar, counts

if TYPE_CHECKING:  # a plan imports this module and does not load torch
    from megalm.checkpoint.checkpointer import Saved
    from megalm.engine.interface import RoutingStatistics, StepResult
    from megalm.train.evaluator import Evaluation
    from megalm.train.resume.training_progress import TrainingProgress
    from megalm.train.trainer import TrainerComponents

log = logging.getLogger("megalm")

# Of the load at which all experts of a layer have equally many tokens.
_DEAD, _OVERLOADED = 0.02, 4.0
# An expert that every token is sent to has E/K times the equal load, which may be less than `_OVERLOADED`.
_OF_ALL_TOKENS = 0.95


class _Console(Console):
    """A console that ignores a full disk or a terminal that has gone: log.txt has everything.

    `keep_standard_streams` has made standard output one that drops later text.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **options)


class _LogFile(logging.FileHandler):
    """log.txt: on a full disk lines are left out, which is said once.

    Args:
        notice: shows a line to the person.
    """

    def __init__(self, path: Path, notice: Callable[[str], None]) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
        self._path, self._notice = path, notice
        self._has_failed = False
        self._can_compare = not self._is_gone()

    def reopen_if_gone(self) -> None:
        """Continue in a new file if the file was deleted or replaced."""
        if not self._can_compare or not self._is_gone():
            return
        try:
            deleted = self.setStream(self._open())
        except OSError as error:
            self._report_once(error)
            return
        if deleted is not None:
            deleted.close()
        self._notice(f"WARNING: {self._path} was deleted or replaced; the log continues in a new file")

    def _is_gone(self) -> bool:
        return self.stream is not None and not still_names(self._path, self.stream.fileno())

    def handleError(self, record: logging.LogRecord) -> None:
        self._report_once(sys.exc_info()[1])

    def _report_once(self, error: BaseException | None) -> None:
        if isinstance(error, OSError) and not self._has_failed:
            self._has_failed = True
            self._notice(f"WARNING: cannot write {self._path} ({error.strerror}); it lacks lines from here on")


class RunConsole:
    """Progress and messages of a run.

    Args:
        active: true on rank 0 only; otherwise all methods do nothing.
        log_file: log.txt of the run folder.
    """

    def __init__(self, active: bool, log_file: Path | None = None) -> None:
        self._active = active
        self._console = _Console(highlight=False, markup=False)
        self._bar: ProgressBar | None = None
        self._log_file: _LogFile | None = None
        if active and log_file is not None:
            self._log_file = _LogFile(log_file, lambda line: self._console.print(line, soft_wrap=True))
            log.addHandler(self._log_file)
            log.setLevel(logging.INFO)
            log.propagate = False

    def info(self, text: str = "") -> None:
        """Print a line or several."""
        if not self._active:
            return
        text = printable(text)
        self._console.print(text, soft_wrap=True)
        if text:
            log.info("%s", text)

    def reopen_log_if_gone(self) -> None:
        """Continue log.txt in a new file if it was deleted or replaced. Call while the run folder has its name."""
        if self._log_file is not None:
            self._log_file.reopen_if_gone()

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print aligned `name  value` lines."""
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.info(f"  {name:<{width}}  {value}")

    def start(self, first_step: int, total_steps: int, work: Callable[[int], int] = lambda steps: steps) -> None:
        """Start the progress display; `first_step` steps are already done.

        Args:
            work: steps -> what they take together, in any unit, from which the time left follows.
        """
        if self._active:
            self._step, self._last_step, self._counted, self._work = first_step, total_steps, False, work
            self._bar = ProgressBar(
                "step",
                work(total_steps),
                done=work(first_step),
                console=self._console,
                shown=lambda *_: counts(self._step, self._last_step),
                transient=False,
            )
            self._bar.start()

    def step(self, step: int, text: str) -> None:
        """Show a step's numbers. A log file gets the first step, the last one, and one every few seconds."""
        if self._bar is None:
            return
        self._step = step
        self._bar.update(self._work(step), text, line_now=not self._counted or step == self._last_step)
        self._counted = True
        log.info("%s", self._bar.line)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ExpertWatch:
    """Adds up the tokens of each expert, and reports them every `interval_steps`.

    An expert without tokens learns nothing, and one that gets most of them learns alone.
    """

    def __init__(self, interval_steps: int) -> None:
        self._interval = interval_steps
        self._counts: Any = None  # [L, E]
        self._steps = 0
        self._dropped = 0.0
        self._known: dict[str, list[list[int]]] = {"dead": [], "overloaded": []}

    def add(self, step: int, routing: RoutingStatistics, top: int) -> dict[str, dict[str, Any]]:
        """Add a step; where a report is due, return its events by name.

        These are `experts`, and `unbalanced_experts` where others than in the report before are dead or overloaded.

        Args:
            top: experts of a token.
        """
        counts = np.array(routing.counts, dtype=np.float64)
        self._counts = counts if self._counts is None else self._counts + counts
        self._steps += 1
        self._dropped += (routing.dropped or 0.0) * counts.sum()
        if self._steps < self._interval:
            return {}
        loads = self._counts / self._counts.mean(axis=1, keepdims=True)
        limit = min(_OVERLOADED, _OF_ALL_TOKENS * loads.shape[1] / top)
        before, self._known = (
            self._known,
            {
                name: [[routing.layers[row], int(expert)] for row, expert in np.argwhere(found)]
                for name, found in (("dead", loads < _DEAD), ("overloaded", loads >= limit))
            },
        )
        steps = {"first_step": step - self._steps + 1, "last_step": step}
        load = {str(layer): of_layer for layer, of_layer in zip(routing.layers, loads.round(4).tolist(), strict=True)}
        experts = {**steps, "load": load}
        if routing.dropped is not None:
            experts["dropped_tokens"] = round(float(self._dropped / self._counts.sum()), 4)
        self._counts, self._steps, self._dropped = None, 0, 0.0
        return {"experts": experts} | ({"unbalanced_experts": steps | self._known} if self._known != before else {})


def _routing_columns(routing: RoutingStatistics | None) -> dict[str, float]:
    """The columns of a model with experts; loads are 1 where a layer's experts have equally many tokens."""
    if routing is None:
        return {}
    loads = [count * len(counts) / sum(counts) for counts in routing.counts for count in counts]
    return {
        "expert_load_max": max(loads),
        "expert_load_min": min(loads),
        "router_entropy": routing.entropy,
        "router_aux_loss": routing.balance_loss,
        "router_z_loss": routing.z_loss,
        **({} if routing.dropped is None else {"dropped_tokens": routing.dropped}),
    }


@dataclass
class MetricsRecorder:
    """Writes metrics.jsonl rows and console lines on rank 0; every method takes the run's progress."""

    parts: TrainerComponents
    _peak_is_reported: bool = field(default=False, init=False)
    _documented: dict[tuple[Quantity, int], list[Span]] = field(init=False)
    _experts: ExpertWatch | None = field(init=False)

    def __post_init__(self) -> None:
        interval = self.parts.run.config.guard.experts_interval_steps
        self._experts = None if interval is None else ExpertWatch(interval)
        self._documented = documented_losses(self.parts.run.config.documented)

    def event(self, position: TrainingProgress, name: str, **fields: Any) -> None:
        self._row("event", position, event=name, **fields)

    def _row(self, kind: str, position: TrainingProgress, **fields: Any) -> None:
        if self.parts.metrics is not None:
            self.parts.metrics.row(kind, step=position.step, **fields, attempt=position.attempt)

    def step(self, position: TrainingProgress, result: StepResult, rate: float, tokens: int, seconds: float) -> None:
        """Record the step that `position` has just reached, which took `seconds` for `tokens`."""
        parts = self.parts
        tokens_per_second = tokens / seconds
        mfu = parts.flops_per_token(position.stage.sequence_length) * tokens_per_second / parts.peak_flops
        if result.skipped:
            self.event(position, "skip", reason="gradient overflow", loss_scale=result.loss_scale)
            parts.reporter.info(
                f"step {position.step}: skipped the update, gradients overflow at loss scale {result.loss_scale:g}"
            )
        if position.step % parts.run.config.train.log_interval_steps == 0 and parts.metrics is not None:
            self._row(
                "train",
                position,
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
                **{LOSS_OF + name: loss for name, loss in zip(parts.datasets, result.dataset_losses, strict=False)},
                **_routing_columns(result.routing),
                **self._phases(),
            )
        if result.routing is not None and self._experts is not None:
            self._watch_experts(position, self._experts, result.routing)
        if mfu > 1 and not self._peak_is_reported:
            self._peak_is_reported = True
            self.warn(
                position,
                f"MFU is above 100%, so the peak of {parts.peak_flops / 1e12:.2f} TFLOP/s is too low: a measured peak "
                "suffers from other programs that run meanwhile; tokens/s are correct",
            )
        parts.reporter.step(
            position.step,
            f"loss {result.loss:.4f}  lr {rate:.2e}  grad {result.grad_norm:.2f}  {tokens_per_second:,.0f} tokens/s  "
            f"MFU {mfu:.1%}",
        )
        self._compare_with_document(position, "training_loss", lambda: parts.guard.history.median_loss(result.loss))

    def _watch_experts(self, position: TrainingProgress, watch: ExpertWatch, routing: RoutingStatistics) -> None:
        events = watch.add(position.step, routing, self.parts.run.config.model.num_experts_per_token)
        for name, fields in events.items():
            self.event(position, name, **fields)
        if (news := events.get("unbalanced_experts")) is not None:
            self.parts.reporter.info(f"step {position.step}: {describe_unbalanced_experts(news)}")

    def _phases(self) -> dict[str, float]:
        if not self.parts.run.diagnostics.phase_times:
            return {}
        return {f"{phase}_seconds": seconds for phase, seconds in self.parts.engine.phase_seconds().items()}

    def evaluation(self, position: TrainingProgress, result: Evaluation, whole: bool) -> None:
        """Record the evaluation of one set, or of all sets together."""
        self._row(
            "eval",
            position,
            tokens=position.tokens,
            loss=result.loss,
            loss_stderr=result.stderr,
            perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte,
            dataset=result.dataset,
            targets=result.targets,
            whole=whole,
            **({} if result.ema_loss is None else {"ema_loss": result.ema_loss}),
        )
        of_set = "" if result.dataset == TOTAL else f" on {result.dataset}"
        self.parts.reporter.info(f"step {position.step}: validation{of_set} {result}")
        if result.dataset == TOTAL:
            self._compare_with_document(position, "validation_loss", lambda: result.loss)

    def task(self, position: TrainingProgress, result: Row, whole: bool) -> None:
        """Record the answers to the questions of one file."""
        name = task_name(result["dataset"])
        self._row("task", position, tokens=position.tokens, task=name, **result, whole=whole)
        error = result["accuracy_error"]
        spread = "" if error is None else f" +- {error:.1%}"
        self.parts.reporter.info(
            f"step {position.step}: {name} accuracy {result['accuracy']:.1%}{spread}, by byte "
            f"{result['byte_accuracy']:.1%}, chance {result['chance']:.1%} ({result['questions']:,} questions)"
        )

    def checkpoint(self, position: TrainingProgress, saved: Saved) -> None:
        """Record a completed checkpoint."""
        fields = {"path": saved.path.name, "seconds": saved.write_seconds, "stall_seconds": saved.stall_seconds}
        self.event(position, "checkpoint", **fields, bytes=saved.bytes, saved_step=saved.step, pruned=saved.pruned)
        times = f"{saved.write_seconds:.1f} s, training waited {saved.stall_seconds:.2f} s"
        self.parts.reporter.info(f"step {saved.step}: checkpoint {saved.path} ({times})")
        if saved.notice:
            self.parts.reporter.info(f"WARNING: {saved.notice}")

    def copies(self, position: TrainingProgress) -> None:
        """Record what the process that copies checkpoints has done since the last call."""
        handle = self.parts.checkpoints.copies
        if handle is None:
            return
        for name, copied in handle.new_copies().items():
            self.event(position, "copied", path=name, bytes=copied.bytes, seconds=copied.seconds)
            self.parts.reporter.info(f"step {step_of(Path(name))}: copied in {format_duration(copied.seconds)}")
        for text in handle.new_warnings():
            self.warn(position, text)

    def warn(self, position: TrainingProgress, text: str) -> None:
        self.event(position, "warning", text=text)
        self.parts.reporter.info(f"WARNING: {text}")

    def _compare_with_document(self, position: TrainingProgress, quantity: Quantity, loss: Callable[[], float]) -> None:
        """Report whether the loss is the one that the recipe's document gives for this step, if it gives one."""
        for documented in self._documented.get((quantity, position.step), ()):
            found = Expectation(position.step, quantity, loss(), documented)
            self.event(
                position,
                "expected",
                quantity=quantity,
                loss=found.loss,
                low=found.documented.low,
                high=found.documented.high,
                met=found.is_met,
            )
            self.parts.reporter.info(str(found))
