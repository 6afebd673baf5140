"""The training loop, and the preflight before step 1.

Uses the engine through its protocol only. Everything here is collective: all ranks run the same steps and make the same
decisions; only rank 0 writes metrics and console lines.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megalm.checkpoint.manifest import Status
from megalm.communicator import Communicator
from megalm.data.sampling.batch_loader import PREFETCHED_BATCHES, BatchLoader
from megalm.engine.interface import Engine, StepResult
from megalm.errors import EXIT_DONE, EXIT_START_AGAIN, TrainingError, is_out_of_memory
from megalm.nodes.straggler_watch import StragglerWatch
from megalm.planning.lr_schedule import rate_at
from megalm.planning.resolve import ResolvedRun
from megalm.runs.metrics_log import MetricsWriter, wall_limit
from megalm.runs.run_folder import RunFolder
from megalm.runs.run_lock import LostFolder, RunLock
from megalm.train.console import MetricsRecorder, RunConsole
from megalm.train.evaluator import Evaluator
from megalm.train.lifecycle.shutdown import StopRequest
from megalm.train.lifecycle.time_limits import TimeLimits
from megalm.train.multiple_choice import NO_CHOICES, Choices
from megalm.train.resume.training_progress import TrainingProgress
from megalm.train.run_checkpointer import RunCheckpointer
from megalm.train.spikes.spike_guard import SpikeGuard, Verdict
from megalm.train.spikes.spike_report import SpikeReport, SpikeReportWriter
from megalm.train.step_diagnostics import StepDiagnostics, phase_of_step
from megalm.train.text_samples import SampleWriter
from megalm.utils.formatting import format_clock


@dataclass(frozen=True)
class TrainerComponents:
    """Everything that the trainer uses; `TrainingProgress` has the state."""

    run: ResolvedRun
    comm: Communicator
    engine: Engine
    batches: BatchLoader
    evaluator: Evaluator
    checkpoints: RunCheckpointer
    sampler: SampleWriter
    metrics: MetricsWriter | None  # rank 0's
    lock: RunLock | None  # rank 0's
    reporter: RunConsole
    stop: StopRequest
    guard: SpikeGuard
    incidents: SpikeReportWriter
    limits: TimeLimits
    flops_per_token: Callable[[int], float]  # by sequence length
    peak_flops: float  # of all ranks together
    datasets: tuple[str, ...] = ()  # their names, of a mixture
    choices: Choices = NO_CHOICES
    diagnostics: StepDiagnostics | None = None  # where the run asks for measurements
    stragglers: StragglerWatch | None = None  # where there are several ranks

    def close(self) -> None:
        """Stop the watchdog and the read-ahead, and remove offloaded state from local disks."""
        self.limits.stop_watching()
        self.batches.close()
        self.engine.close()


@dataclass
class Trainer:
    parts: TrainerComponents
    position: TrainingProgress
    record: MetricsRecorder = field(init=False)
    _saved_step: int = field(default=0, init=False)
    _saved_path: Path | None = field(default=None, init=False)
    _last_spike: int = field(default=-1, init=False)
    _lost: LostFolder | None = field(default=None, init=False)  # on rank 0

    def __post_init__(self) -> None:
        self.record = MetricsRecorder(self.parts)

    def fit(self) -> int:
        """Train to the last step, or to a stop request; return the exit code."""
        parts, config = self.parts, self.parts.run.config
        if self.position.step >= config.train.steps:
            self.event("end", status="finished", exit_code=EXIT_DONE)
            parts.reporter.info(
                f"the run has reached step {self.position.step} already; raise train.steps to train longer"
            )
            return EXIT_DONE
        self._saved_step = self.position.step
        parts.reporter.start(self.position.step, config.train.steps, parts.run.stages.tokens)
        started = time.monotonic()
        try:
            with garbage_collected_every(config.train.gc_interval_steps) as collect_garbage:
                while self.position.step < config.train.steps:
                    if not self._train_step():
                        continue  # rolled back to a step whose evaluation and saves are done
                    collect_garbage(self.position.step)
                    if self._writes_files() and parts.comm.max([self._lost_folder()])[0]:
                        self._leave_folder()
                        return EXIT_START_AGAIN
                    if self.position.step == config.train.steps:
                        break  # _finish does the rest, on the complete validation set
                    self._between_steps()
                    if self._has_stopped_learning():
                        break
                    if self._should_stop():
                        return EXIT_START_AGAIN
        finally:
            parts.reporter.stop()
        self._finish(time.monotonic() - started)
        return EXIT_DONE

    def _train_step(self) -> bool:
        """Train one step, measured if it is one to be measured; return False if the guard rolled the run back."""
        diagnostics, step = self.parts.diagnostics, self.position.step + 1
        if diagnostics is None:
            return self._run_step(step)
        with diagnostics.observed(step):
            is_trained = self._run_step(step)
        diagnostics.report(step, self.event, self.parts.reporter.info)
        return is_trained

    def _run_step(self, step: int) -> bool:
        parts, position = self.parts, self.position
        if (stage := parts.run.stages.at(step)) != position.stage:
            position.begin_stage(stage, parts.checkpoints.order_at(position.samples))
        rate = rate_at(position.schedule.segments, step)
        watch = parts.stragglers
        if watch is not None:
            watch.begin_step()
        start = time.perf_counter()
        with self._phase("data"):
            stages = [parts.run.stages.at(step + ahead) for ahead in range(1 + PREFETCHED_BATCHES)]
            batch = parts.batches.batch(position.samples, [(each.samples, each.parts) for each in stages])
        data_seconds = time.perf_counter() - start
        tokens = stages[0].tokens - batch.padding
        result = parts.engine.train_step(batch, step, rate)
        seconds = time.perf_counter() - start
        if watch is not None:
            watch.end_step(seconds, data_seconds)
        verdict = parts.guard.respond(result, step, position.rollbacks)
        if verdict.finding is not None:
            report = self._report_spike(verdict, result, rate)
            if verdict.action == "rollback":
                self._roll_back()
                return False
            if verdict.action == "stop":
                self._stop_at(verdict, result, report, tokens)
        self._advance(tokens)
        with self._phase("logging"):
            self.record.step(self.position, result, rate, tokens, seconds)
        if watch is not None:
            for straggler in watch.exchange(step):
                self.event("straggler", **straggler.fields())
                parts.reporter.info(f"WARNING: {straggler}")
        return True

    def _phase(self, name: str) -> AbstractContextManager[object]:
        """Mark a phase of the step where a profile may see it."""
        return nullcontext() if self.parts.diagnostics is None else phase_of_step(name)

    def _advance(self, tokens: int) -> None:
        position = self.position
        position.step += 1
        position.samples += position.stage.samples
        position.tokens += tokens
        position.evaluation = None

    def _report_spike(self, verdict: Verdict, result: StepResult, rate: float) -> Path | None:
        """Record the spike in the step after `position`: an event, a console line and a report; return its path."""
        parts, position, finding = self.parts, self.position, verdict.finding
        assert finding is not None
        first, step = position.samples, position.step + 1
        incident = SpikeReport(
            step=step,
            attempt=position.attempt,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            verdict=verdict,
            window=parts.guard.history.statistics(),
            samples=(first, first + position.stage.samples),
            saved_step=self._saved_step,
        )
        # One report per series of spikes: a diverging run that continues would fill the disk.
        is_series = verdict.action == "let pass" and self._last_spike == step - 1
        report = None if is_series else parts.incidents.write(parts.engine, incident)
        self._last_spike = step
        numbers = {"loss": result.loss, "grad_norm": result.grad_norm, "limit": finding.limit, "median": finding.median}
        of = {"at_step": step, "quantity": finding.quantity, "decided": verdict.action, "why": verdict.why}
        self.event("spike", **of, **numbers, first_sample=first, report=report.name if report else None)
        if verdict.action == "skip":
            self.event("skip", at_step=step, reason=str(finding))
        parts.reporter.info(f"step {step}: {finding}: {verdict.action}{f'; {report}' if report else ''}")
        return report

    def _stop_at(self, verdict: Verdict, result: StepResult, report: Path | None, tokens: int) -> NoReturn:
        """End the run; save its state as suspect.

        Raises:
            TrainingError: always.
        """
        step, first = self.position.step + 1, self.position.samples
        end = first + self.position.stage.samples
        if not result.refused:
            self._advance(tokens)
        if self._saved_step != self.position.step:
            self._save("suspect", f"the guard stopped the run at step {step}: {verdict.finding}")
        self._log_completed_saves(wait=True)
        raise TrainingError(
            f"step {step}: {verdict.finding} ({verdict.why}; samples {first} to "
            f"{end - 1}); the guard stops the run, see {report}"
        )

    def _roll_back(self) -> None:
        """Go back to the newest good checkpoint, and skip all data up to and including the spike's step."""
        parts, old = self.parts, self.position
        self._log_completed_saves(wait=True)
        next_sample = old.samples + old.stage.samples
        attempt = old.attempt + 1
        path, position = parts.checkpoints.roll_back(parts.engine, parts.guard, next_sample, attempt)
        position.schedule, position.attempt, position.rollbacks = old.schedule, attempt, old.rollbacks + 1
        self.position, self._saved_step, self._saved_path = position, position.step, path
        skipped = position.data_history[-1].samples_skipped
        self.event(
            "rollback", path=path.name, at_step=old.step + 1, samples_skipped=skipped, rollbacks=position.rollbacks
        )
        parts.reporter.info(
            f"rolled back to step {position.step} ({path.name}); the run skips {skipped:,} samples, attempt "
            f"{position.attempt} begins"
        )

    def _writes_files(self) -> bool:
        """Return whether anything besides metrics and log is written at this step."""
        config, step = self.parts.run.config, self.position.step
        intervals = (config.evaluate.interval_steps, config.sample.interval_steps, config.checkpoint.interval_steps)
        return step == config.train.steps or any(_due(step, interval) for interval in intervals)

    def _lost_folder(self) -> float:
        """On rank 0: return 1 if the run folder is lost; else write a deleted log or metrics file anew."""
        lock, metrics = self.parts.lock, self.parts.metrics
        if lock is None or metrics is None:
            return 0.0
        self._lost = lock.lost()
        if self._lost is not None:
            return 1.0
        self.parts.reporter.reopen_log_if_gone()
        if metrics.reopen_if_gone():
            self.record.warn(self.position, f"{metrics.path} was deleted, replaced or emptied; it continues from here")
        return 0.0

    def _leave_folder(self) -> None:
        """Save and stop, because the run folder is not the one that this job opened.

        Raises:
            TrainingError: another folder has its name, and where it is now is not known.
        """
        parts = self.parts
        lost = parts.comm.broadcast(self._lost)
        assert lost is not None
        if lost.place is None:
            raise TrainingError(f"{lost.why}, so step {self.position.step} cannot be saved; move it back, then resume")
        parts.checkpoints.move_to(RunFolder(lost.place))
        self._saved_step = -1  # the save of this step may have been among what could not be written
        self._stop_early("warning", lost.why, text=lost.why)

    def _between_steps(self) -> None:
        config, step = self.parts.run.config, self.position.step
        if _due(step, config.evaluate.tasks_interval_steps):
            self._answer(whole=False)  # before validation, which may save: a resume from there does not return here
        if _due(step, config.evaluate.interval_steps):
            self._evaluate(whole=False)
        if _due(step, config.sample.interval_steps):
            self.parts.sampler.write(self.parts.engine, step, show=False)
        if _due(step, config.checkpoint.interval_steps) and self._saved_step != step:
            self._save()
        self._log_completed_saves()

    def _evaluate(self, whole: bool) -> None:
        parts, position = self.parts, self.position
        result = parts.evaluator.evaluate(parts.engine, whole)
        if result is None:
            return
        position.evaluation = result
        for each in (*result.parts, result):
            self.record.evaluation(position, each, whole)
        if not whole or parts.run.config.evaluate.max_samples is None:  # only losses over the same samples compare
            self._compare_with_best(result.loss)

    def _answer(self, whole: bool) -> None:
        """Answer the questions of evaluate.tasks, all of them or evaluate.max_samples of each file."""
        for result in self.parts.choices[whole].rows(self.parts.engine, self.parts.limits.heartbeat):
            self.record.task(self.position, result, whole)

    def _needs_selection_eval(self) -> bool:
        """Return whether the last step also needs validation on the samples that select the best checkpoint."""
        config, position = self.parts.run.config, self.position
        wanted = config.checkpoint.best and config.evaluate.max_samples is not None
        return wanted and position.evaluation is None and _due(position.step, config.evaluate.interval_steps)

    def _compare_with_best(self, loss: float) -> None:
        position = self.position
        if not loss < (math.inf if position.best_loss is None else position.best_loss):  # also true for nan
            position.stale_evaluations += 1
            return
        position.best_loss, position.stale_evaluations = loss, 0
        if self.parts.run.config.checkpoint.best:
            self.parts.checkpoints.mark_best(self._save())

    def _has_stopped_learning(self) -> bool:
        patience = self.parts.run.config.evaluate.patience
        if patience is None or self.position.stale_evaluations < patience:
            return False
        self.event("early_stop", best_loss=self.position.best_loss)
        self.parts.reporter.info(
            f"step {self.position.step}: the last {patience} validations have no loss below "
            f"{self.position.best_loss:.4f} (evaluate.patience); the run ends"
        )
        return True

    def _save(self, status: Status = "good", reason: str | None = None) -> Path:
        if reason is None and (reason := self.parts.guard.suspicion(self.position.step)) is not None:
            status = "suspect"
        with self.parts.stop.saving():
            path = self.parts.checkpoints.save(self.parts.engine, self.position, status, reason)
        self._saved_step, self._saved_path = self.position.step, path
        self._log_completed_saves()
        return path

    def _log_completed_saves(self, wait: bool = False) -> None:
        """Record the checkpoints that were completed; collective."""
        parts = self.parts
        for saved in parts.checkpoints.completed(wait):
            parts.limits.saved(saved.write_seconds)
            self.record.checkpoint(self.position, saved)
        self.record.copies(self.position)

    def _should_stop(self) -> bool:
        """Return whether to stop: any rank's signal or time limit makes all ranks save the same step and leave."""
        parts, step = self.parts, self.position.step
        growth = parts.run.stages.at(step + 1).tokens / self.position.stage.tokens
        late_here = parts.limits.boundary(step, growth)
        number, late, lost = parts.comm.max([float(parts.stop.signal or 0), float(late_here), self._lost_folder()])
        if lost:
            self._leave_folder()
        elif number:
            self._stop_early("signal", f"signal {int(number)}", signal=int(number))
        elif late:
            limit = parts.run.config.train.max_wall_time
            self._stop_early("wall_time", f"{wall_limit(limit)} is almost over", limit=limit)
        return bool(lost or number or late)

    def _stop_early(self, event: str, why: str, **fields: Any) -> None:
        parts = self.parts
        parts.stop.reached_boundary()
        self.event(event, **fields)
        parts.reporter.info(f"{why}: the run saves step {self.position.step} and exits")
        if self._saved_step != self.position.step:
            self._save()
        self._log_completed_saves(wait=True)
        self.event("end", status="stopped", exit_code=EXIT_START_AGAIN)
        parts.reporter.info("stopped; --resume auto resumes from here")

    def _finish(self, seconds: float) -> None:
        parts = self.parts
        parts.stop.reached_boundary()
        path = self._saved_path if self._saved_step == self.position.step else None
        path = path or self._save()  # before anything slow or interruptible
        if self._needs_selection_eval():
            self._evaluate(whole=False)
        self._evaluate(whole=True)
        self._answer(whole=True)
        self._log_completed_saves(wait=True)
        if self.position.evaluation is not None:
            parts.checkpoints.note_evaluation(path, self.position.evaluation)
        parts.sampler.write(parts.engine, self.position.step, show=True)
        self.event("end", status="finished", exit_code=EXIT_DONE, seconds=seconds)
        parts.reporter.info(f"trained to step {self.position.step} in {format_clock(seconds)}")

    def event(self, name: str, **fields: Any) -> None:
        self.record.event(self.position, name, **fields)


@contextmanager
def garbage_collected_every(interval_steps: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to call after each step: inside, Python collects its garbage there and nowhere else.

    All ranks wait for one that collects, so all collect at once. What exists at the start is never searched.

    Args:
        interval_steps: None: Python collects when it pleases.
    """
    if interval_steps is None:
        yield lambda step: None
        return

    def collect(step: int) -> None:
        if step % interval_steps == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def memory_errors_named(phase: str) -> Iterator[None]:
    """Turn running out of memory into a `TrainingError` that names the phase and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory in {phase} ({str(error).splitlines()[0] if str(error) else 'MemoryError'}). Try a smaller "
            "train_micro_batch_size_per_gpu in the DeepSpeed JSON, train.checkpoint_activations_every=1, or a higher "
            "ZeRO stage (ds_configs/zero3.json, zero3_offload.json); megalm plan shows the memory of each"
        ) from error


def run_preflight(parts: TrainerComponents) -> None:
    """Run each phase once before step 1, so that what would fail hours later fails now; collective.

    Runs a training step at learning rate zero, a validation batch, one token of each sample and a checkpoint write.
    Afterwards the engine is unchanged: rate zero changes no weight, and moments and counters are cleared. Call before
    a resumed state is loaded.

    Raises:
        TrainingError: out of memory, with the phase.
        OSError: a checkpoint cannot be written.
    """
    engine, largest = parts.engine, parts.run.stages.longest
    with memory_errors_named("the training step"):
        engine.train_step(parts.batches.batch(0, [(largest.samples, largest.parts)]), step=1, learning_rate=0.0)
    with memory_errors_named("validation"):
        parts.evaluator.preflight(engine)
        parts.choices[True].preflight(engine)
    with memory_errors_named("sampling"):
        parts.sampler.preflight(engine)
    engine.reset()
    with memory_errors_named("writing a checkpoint"):
        parts.checkpoints.preflight(engine)


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
