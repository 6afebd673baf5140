"""What a run writes into a checkpoint's manifest, and what it takes and checks when it goes on from one."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.layout import BEST, MANIFEST, find_checkpoint
from megalm.checkpoint.load import CheckpointReader, read_manifest
from megalm.checkpoint.save import save_checkpoint, write_durably
from megalm.config.resolve import ResolvedRun
from megalm.engine.protocol import Comm, Engine
from megalm.errors import CheckpointError, OtherRankFailed
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

    def save(self, engine: Engine, position: Position) -> Path:
        facts = self._facts(engine.counters(), position)
        files = [path for path in self._folder.config_files if path.exists()]
        return save_checkpoint(self._folder.checkpoints, position.step, engine.fragments(), facts, files, self._comm)

    def mark_best(self, path: Path) -> None:
        """Name the checkpoint with the lowest validation loss in `checkpoints/best`."""
        if self._comm.is_main:
            write_durably(path.parent / BEST, path.name + "\n")

    def note_evaluation(self, path: Path, evaluation: Evaluation) -> None:
        """Add the validation loss to a checkpoint that was written before it was known."""
        if self._comm.is_main:
            manifest = {**read_manifest(path), "validation_loss": evaluation.loss}
            write_durably(path / MANIFEST, json.dumps(manifest, indent=1))

    def rehearse(self, engine: Engine) -> None:
        """Write a checkpoint beside the real ones and remove it."""
        folder = self._folder.path / "rehearsal"
        save_checkpoint(folder, 0, engine.fragments(), self._facts(engine.counters(), Position()), [], self._comm)
        if self._comm.is_main:
            shutil.rmtree(folder)
        self._comm.barrier()

    def find(self, wanted: str) -> CheckpointReader | None:
        """The checkpoint that `--resume wanted` means, compared with this run; None: start at step 0.

        Needs no engine, so that what cannot be resumed is refused before a model is built and the run's account
        is touched.

        Raises:
            CheckpointError: it is not there, a file is damaged, or it is of another model or of other data.
        """
        path = self._comm.once(lambda: find_checkpoint(self._folder.checkpoints, wanted))
        if path is None:
            return None
        reader = CheckpointReader(path)
        self._refuse_other_run(path, reader.manifest)
        self._verify(reader)
        return reader

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

    def _verify(self, reader: CheckpointReader) -> None:
        """Each rank hashes its share of the files; any difference is everybody's error."""
        problems = self._comm.gather(reader.verify(self._comm.rank, self._comm.size))
        if problems[self._comm.rank]:
            raise CheckpointError(problems[self._comm.rank])
        if any(problems):
            raise OtherRankFailed("another rank found a damaged file")

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
            "status": "good",
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
