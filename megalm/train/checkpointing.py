"""What a run writes into a checkpoint's manifest, and what it takes and checks when it goes on from one."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.layout import Entry, candidates
from megalm.checkpoint.load import CheckpointReader
from megalm.checkpoint.manifest import Status, read_manifest, write_manifest
from megalm.checkpoint.retention import Retention, tidy
from megalm.checkpoint.writer import CheckpointWriter, Saved
from megalm.config.resolve import ResolvedRun
from megalm.engine.protocol import Comm, Engine
from megalm.errors import CheckpointError
from megalm.model.shape import ModelShape
from megalm.train.evaluate import Evaluation
from megalm.train.loop import Position
from megalm.train.run_folder import RunFolder


@dataclass(frozen=True)
class Fingerprints:
    """What decides the order and the meaning of tokens."""

    order: str  # of the training samples: dataset, document range, sequence length, seed, kind of order
    dataset: str
    tokenizer: str


@dataclass(frozen=True)
class Found:
    """What a run goes on from.

    Attributes:
        warnings: what a person should know of it: damaged ones that were passed over, a suspect one that was taken.
    """

    reader: CheckpointReader
    warnings: tuple[str, ...]


class RunCheckpoints:
    """Saves a run's state into its folder and restores it from any checkpoint of the same model and data."""

    def __init__(
        self,
        folder: RunFolder,
        run: ResolvedRun,
        shape: ModelShape,
        fingerprints: Fingerprints,
        tokenizer: str,
        comm: Comm,
    ) -> None:
        self._folder = folder
        self._run = run
        self._shape = shape
        self._fingerprints = fingerprints
        self._tokenizer = tokenizer
        self._comm = comm
        settings = run.config.checkpoint
        self._writer = CheckpointWriter(
            folder.checkpoints,
            Retention(settings.keep_last, settings.keep_every_steps),
            comm,
            behind=settings.asynchronous,
        )

    def save(self, engine: Engine, position: Position, status: Status = "good", reason: str | None = None) -> Path:
        """Write a checkpoint, or with checkpoint.async begin to; where it is or will be.

        Args:
            status: `suspect` for a state that may be spoilt: `--resume auto` takes it only where no good one is.
            reason: why it is not good.

        Raises:
            TrainingError: on all ranks, where any could not write this one or the one before.
        """
        facts = {**self._facts(engine.counters(), position), "status": status, "status_reason": reason}
        files = [path for path in self._folder.config_files if path.exists()]
        return self._writer.begin(position.step, engine.fragments(), facts, files)

    def completed(self, wait: bool = False) -> list[Saved]:
        """What became complete since the last call; `wait` until nothing is being written."""
        return self._writer.completed(wait)

    def mark_best(self, path: Path) -> None:
        """Name the checkpoint with the lowest validation loss in `checkpoints/best`."""
        self._writer.mark_best(path)

    def note_evaluation(self, path: Path, evaluation: Evaluation) -> None:
        """Add the validation loss to a complete checkpoint that was written before it was known."""
        if self._comm.is_main:
            write_manifest(path, {**read_manifest(path), "validation_loss": evaluation.loss})

    def rehearse(self, engine: Engine) -> None:
        """Write a checkpoint beside the real ones and remove it."""
        facts = self._facts(engine.counters(), Position())
        self._writer.rehearse(self._folder.rehearsal, engine.fragments(), facts)

    def tidy(self) -> list[Path]:
        """Finish what a killed job left half done; for the holder of the run's lock, before anything else."""

        def work() -> list[Path]:
            shutil.rmtree(self._folder.rehearsal, ignore_errors=True)
            return tidy(self._folder.checkpoints)

        return self._comm.once(work)

    def find(self, wanted: str) -> Found | None:
        """The checkpoint that `--resume wanted` means, compared with this run; None: start at step 0.

        Needs no engine, so that what cannot be resumed is refused before a model is built and the run's account
        is touched. `auto` passes over damaged ones; one that is named must be whole.

        Raises:
            CheckpointError: it is not there, a file is damaged, or it is of another model or of other data.
        """
        entries = self._comm.once(lambda: candidates(self._folder.checkpoints, wanted))
        damaged: list[str] = []
        for entry in entries:
            reader, problem = self._open(entry)
            if reader is not None:
                self._refuse_other_run(entry.path, reader.manifest)
                return Found(reader, (*(f"passed over: {words}" for words in damaged), *_suspicion(entry)))
            if wanted != "auto":
                raise CheckpointError(problem)
            damaged.append(problem)
        if damaged:
            raise CheckpointError(f"no checkpoint of {self._folder.path} can be used: {'; '.join(damaged)}")
        return None

    def restore(self, engine: Engine, reader: CheckpointReader) -> Position:
        """Put the checkpoint into `engine`; where training goes on."""
        manifest = reader.manifest
        engine.restore(reader.read, manifest["counters"], manifest["step"])
        return Position(
            step=manifest["step"],
            samples=_consumed(manifest),
            tokens=manifest["tokens"],
            best_loss=manifest["best_validation_loss"],
            stale_evaluations=manifest["stale_evaluations"],
        )

    def _open(self, entry: Entry) -> tuple[CheckpointReader | None, str]:
        """The checkpoint, or what is wrong with it; each rank hashes its share of the files."""
        reader, problem = None, entry.problem
        if entry.manifest is not None:
            try:
                reader = CheckpointReader(entry.path)
                problem = reader.verify(self._comm.rank, self._comm.size)
            except CheckpointError as error:
                problem = str(error)
        problem = next(filter(None, self._comm.gather(problem)), "")
        return (None if problem else reader), problem

    def _refuse_other_run(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Settings first: they say more to a person than the fingerprints that follow from them."""
        now = self._identity()
        for what in ("model", "data", "fingerprints"):
            then = manifest[what]
            changed = [name for name in now[what] if now[what][name] != then.get(name)]
            if changed:
                differences = ", ".join(f"{name} was {then.get(name)}, is {now[what][name]}" for name in changed)
                raise CheckpointError(f"{path} was trained with another {what.rstrip('s')}: {differences}")

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What may not change when a run goes on, as JSON."""
        data = self._run.config.data
        settings = {
            "data.sequence_length": data.sequence_length,
            "data.split": data.split,
            "data.order": data.order,
            "data.document_mask": data.document_mask,
            "train.seed": self._run.config.train.seed,
        }
        return {"model": asdict(self._shape), "data": settings, "fingerprints": asdict(self._fingerprints)}

    def _facts(self, counters: dict[str, Any], position: Position) -> dict[str, Any]:
        run, evaluation = self._run, position.evaluation
        topology = run.topology
        return {
            "step": position.step,
            "tokens": position.tokens,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "run": self._folder.name,
            "parameters": self._shape.parameter_count(),
            "validation_loss": evaluation.loss if evaluation else None,
            "best_validation_loss": position.best_loss,
            "stale_evaluations": position.stale_evaluations,
            "counters": counters,
            "data_position": {"segments": [self._segment(position)]},
            "schedule": {"segments": [{"first_step": 1, **asdict(run.schedule)}]},
            "topology": {
                "world_size": topology.world_size,
                "data": topology.data,
                "tensor": topology.tensor,
                "pipeline": topology.pipeline,
                "zero_stage": run.zero_stage,
                "precision": run.precision,
            },
            **self._identity(),
            "tokenizer": self._tokenizer,  # where it was; the fingerprint says whether it still is
            # No generator's state: dropout and sampling draw from seeds of their place.
            "attempt": position.attempt,
        }

    def _segment(self, position: Position) -> dict[str, Any]:
        return {
            "order": self._fingerprints.order,
            "sequence_length": self._run.config.data.sequence_length,
            "global_batch": self._run.batch.global_batch,
            "samples_consumed": position.samples,
        }


def _consumed(manifest: Mapping[str, Any]) -> int:
    return sum(segment["samples_consumed"] for segment in manifest["data_position"]["segments"])


def _suspicion(entry: Entry) -> list[str]:
    if entry.manifest is None or entry.status != "suspect":
        return []
    return [f"going on from {entry.path}, which is marked suspect ({entry.manifest.get('status_reason')})"]
