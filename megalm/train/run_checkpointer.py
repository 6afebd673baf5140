"""Save, restore and roll back a run: the facts in a checkpoint's manifest, and the state restored from it."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.checkpointer import CheckpointWriter, Saved
from megalm.checkpoint.copies.copy_process import CopyHandle
from megalm.checkpoint.discovery import resume_candidates
from megalm.checkpoint.manifest import Beginning, Manifest, Status, read_manifest, write_manifest
from megalm.checkpoint.retention import Retention
from megalm.communicator import Communicator
from megalm.data.tokenizers.tokenizer import Tokenizer, eod_or_none
from megalm.engine.interface import Engine
from megalm.errors import TrainingError
from megalm.model.model_config import ModelConfig
from megalm.planning.resolve import ResolvedRun
from megalm.runs.metrics_log import read_newest_first
from megalm.runs.run_folder import RunFolder
from megalm.train.evaluator import Evaluation
from megalm.train.resume.compatibility import (
    DataIdentity,
    continuation_kind,
    identity_of,
    incompatibilities,
    progress_from,
)
from megalm.train.resume.resume_plan import open_verified
from megalm.train.resume.resume_request import LastAttempt, attempt_after_rollback, write_attempt
from megalm.train.resume.training_progress import TrainingProgress, skip_samples
from megalm.train.spikes.spike_guard import SpikeGuard


class RunCheckpointer:
    """Saves a run's state into its folder and restores it from any checkpoint of the same model and data.

    Args:
        start: the checkpoint that this process resumes from, and how; None: it starts at step 0.
        copies: on rank 0, of the process that copies the checkpoints, where the run has one.
    """

    def __init__(
        self,
        folder: RunFolder,
        run: ResolvedRun,
        shape: ModelConfig,
        identity: DataIdentity,
        tokenizer: Tokenizer,
        comm: Communicator,
        start: LastAttempt | None,
        copies: CopyHandle | None = None,
    ) -> None:
        self.copies = copies
        self._folder = folder
        self._run = run
        self._shape = shape
        self._data = identity
        self._tokenizer = tokenizer
        self._comm = comm
        self._request = start
        self._past = set() if start is None else {start.path.resolve()}  # the checkpoints that the state descends from
        settings = run.config.checkpoint
        self._writer = CheckpointWriter(
            folder.checkpoints,
            Retention(settings.keep_last, settings.keep_every_steps, settings.best),
            comm,
            asynchronous=settings.asynchronous,
            origin=None if start is None else start.path,
            in_use=tuple if copies is None else copies.in_work,
        )

    def save(
        self, engine: Engine, position: TrainingProgress, status: Status = "good", reason: str | None = None
    ) -> Path:
        """Write a checkpoint, or with checkpoint.async start to; return its path.

        Args:
            status: `suspect` for a state that may be bad: `--resume auto` takes it only if there is no good one.
            reason: why it is suspect.

        Raises:
            TrainingError: on all ranks, if any rank could not write this checkpoint or the one before.
        """
        facts = {**self._facts(engine.counters(), position), "status": status, "status_reason": reason}
        files = [path for path in self._folder.config_files if path.exists()]
        path = self._writer.begin(position.step, engine.fragments(), facts, files)
        self._past.add(path.resolve())
        return path

    def order_at(self, sample: int) -> str:
        """Return the fingerprint of the order of samples, as far as `sample`."""
        return self._data.at(sample)["order"]

    def completed(self, wait: bool = False) -> list[Saved]:
        """Return the checkpoints completed since the last call; with `wait`, wait for all writes first."""
        return self._writer.completed(wait)

    def move_to(self, folder: RunFolder) -> None:
        """Save in `folder` from now on, to which the run folder was moved."""
        self._folder = folder
        self._writer.move_to(folder.checkpoints)

    def mark_best(self, path: Path) -> None:
        """Record the checkpoint with the lowest validation loss in `checkpoints/best`."""
        self._writer.mark_best(path)

    def note_evaluation(self, path: Path, evaluation: Evaluation) -> None:
        """Add the final validation to a complete checkpoint that was written before it."""
        if self._comm.is_main:
            write_manifest(path, with_evaluation(read_manifest(path), evaluation))

    def preflight(self, engine: Engine) -> None:
        """Preflight: write a checkpoint beside the real ones and remove it."""
        facts = self._facts(engine.counters(), TrainingProgress(self._run.stages.at(1)))
        self._writer.preflight(self._folder.preflight, engine.fragments(), facts)

    def position(self, manifest: Manifest) -> TrainingProgress:
        """Return the progress at which this run continues from a checkpoint; the caller sets its schedule."""
        return progress_from(manifest, self._run, self._continuation(manifest))

    def differences(self, manifest: Manifest) -> dict[str, list[str]]:
        """Return what differs between this run and the checkpoint, by item of `resume.allow`."""
        consumed = manifest.data_position.segments[-1].next_sample
        return incompatibilities(manifest, identity_of(self._run, self._shape, self._data, consumed))

    def restore(
        self, reader: CheckpointReader, engine: Engine, guard: SpikeGuard, weights_only: bool = False, new: bool = False
    ) -> None:
        """Restore a checkpoint into the engine, and the losses and norms before it into the spike guard; collective.

        Args:
            weights_only: restore the model only, as step 0.
            new: this process has not trained yet, so the guard reads the earlier steps from metrics.jsonl.
        """
        step = 0 if weights_only else reader.manifest.step
        engine.restore(reader.read_weights if weights_only else reader.read, reader.manifest.counters, step)
        reader.close()
        if weights_only:
            engine.reset()

        def steps_before() -> list[tuple[float, float]]:
            rows = read_newest_first(self._folder.metrics) if self._folder.metrics.exists() else []
            return guard.steps_of(rows, step)

        if new:
            guard.history.restart(self._comm.once(steps_before))
        guard.forget_refusals()

    def roll_back(
        self, engine: Engine, guard: SpikeGuard, next_sample: int, attempt: int
    ) -> tuple[Path, TrainingProgress]:
        """Go back to the newest good checkpoint and skip the data up to `next_sample`.

        First notes the skipped samples in that checkpoint, so that a later resume from it skips them too. Considers
        only checkpoints that this process wrote or resumed from: the folder may hold later steps of an abandoned
        attempt, and earlier ones with other settings.

        Args:
            attempt: the number of the attempt that the rollback begins.

        Raises:
            TrainingError: there is no good checkpoint.
        """
        entries = self._comm.once(lambda: resume_candidates(self._folder.checkpoints, "auto"))
        for entry in entries:
            if entry.manifest is None or entry.status != "good" or entry.path.resolve() not in self._past:
                continue
            if self._continuation(entry.manifest) != "on":
                continue
            reader, _ = open_verified(entry, self._comm)
            if reader is None:
                continue
            more = next_sample - reader.manifest.data_position.segments[-1].next_sample
            manifest = self.skip_samples(reader.manifest, more).amended(rollbacks=reader.manifest.rollbacks + 1)
            self._request = attempt_after_rollback(self._request, reader, attempt)
            if self._comm.is_main:
                write_attempt(self._folder, self._request)
                write_manifest(entry.path, manifest)
            self.restore(reader, engine, guard)
            return entry.path, self.position(manifest)
        raise TrainingError(
            f"{self._folder.checkpoints} has no good checkpoint to roll back to; save more often "
            "(checkpoint.interval_steps), or set guard.policy=skip"
        )

    def skip_samples(self, manifest: Manifest, samples: int) -> Manifest:
        """Return the manifest with `samples` samples skipped at its position."""
        amended = skip_samples(manifest, samples)
        return amended.amended(fingerprints=self._data.at(amended.data_position.segments[-1].next_sample))

    def _continuation(self, manifest: Manifest) -> Beginning:
        return continuation_kind(self._run, manifest, self.differences(manifest))

    def _facts(self, counters: dict[str, Any], position: TrainingProgress) -> dict[str, Any]:
        run, evaluation = self._run, position.evaluation
        topology, batch = run.topology, run.batch.of(run.stages.at(max(1, position.step)).sequences)
        return {
            "step": position.step,
            "tokens": position.tokens,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "run": self._folder.name,
            "parameters": self._shape.parameter_count(),
            "validation_loss": evaluation.loss if evaluation else None,
            "validation_tokens": evaluation.targets if evaluation else None,
            "best_validation_loss": position.best_loss,
            "stale_evaluations": position.stale_evaluations,
            "validation": self._data.validation,
            "counters": counters,
            "rollbacks": position.rollbacks,
            "data_position": position.data_json(self.order_at(position.samples)),
            "schedule": position.schedule.as_json(),
            "topology": {
                **asdict(topology),
                "data": topology.data,
                "zero_stage": run.zero_stage,
                "precision": run.precision,
                "micro_batch": batch.micro_batch,
                "accumulation": batch.accumulation,
            },
            **identity_of(run, self._shape, self._data, position.samples),
            "tokenizer": self._tokenizer.spec,  # its path at the time; the fingerprint identifies it
            "eod_id": eod_or_none(self._tokenizer),
            "bos_id": self._tokenizer.bos_id,
            # No random state: dropout and sampling derive their seeds from step and position.
            "attempt": position.attempt,
        }


def with_evaluation(manifest: Manifest, evaluation: Evaluation) -> Manifest:
    """Return the manifest with an evaluation of the complete validation sets.

    A loss on part of them (evaluate.max_samples) is kept: `checkpoints/best` compares those.
    """
    on_part = manifest.validation_tokens not in (None, evaluation.targets)
    prefix = "whole_" if on_part else ""
    found = {f"{prefix}validation_loss": evaluation.loss, f"{prefix}validation_tokens": evaluation.targets}
    return manifest.amended(**found)
