"""The progress of a run: steps, samples, tokens, and the segments of its data and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalm.checkpoint.manifest import Beginning, DataSegment, Manifest
from megalm.planning.batch_size import TrainingStage
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.train.evaluator import Evaluation


@dataclass(frozen=True)
class RunSchedule:
    """The learning-rate schedule of a run.

    Attributes:
        segments: successive schedules; the last one applies now.
        configured_schedules: the schedules configured so far; a resume with one of them changes nothing.
    """

    segments: tuple[ScheduleSegment, ...] = ()
    configured_schedules: tuple[dict[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the `schedule` section of a manifest."""
        return {"stated": list(self.configured_schedules), "segments": [segment.as_json() for segment in self.segments]}


@dataclass
class TrainingProgress:
    """The state of a run besides its tensors, as stored in a checkpoint.

    Attributes:
        samples: number of the next sample in the current order.
        evaluation: the validation result of this step, if any.
        best_loss: lowest validation loss so far, on the part used during training.
        stale_evaluations: number of validations since `best_loss`.
        rollbacks: number of rollbacks so far.
        stage: batch and sequence length of the current data segment.
        data_history: data segments before the current one.
        first_sample, continuation: where and how the current segment began.
    """

    stage: TrainingStage
    step: int = 0
    samples: int = 0
    tokens: int = 0
    attempt: int = 1
    best_loss: float | None = None
    stale_evaluations: int = 0
    evaluation: Evaluation | None = None
    rollbacks: int = 0
    data_history: tuple[DataSegment, ...] = ()
    first_sample: int = 0
    continuation: Beginning = "anew"
    schedule: RunSchedule = RunSchedule()

    def segment(self, order: str) -> DataSegment:
        """Return the current data segment so far."""
        return DataSegment(
            order=order,
            sequence_length=self.stage.sequence_length * self.stage.parts,
            global_batch=self.stage.samples,
            first_sample=self.first_sample,
            samples_consumed=self.samples - self.first_sample,
            begins=self.continuation,
        )

    def skip(self, samples: int, order: str) -> None:
        """Skip `samples` samples in the same order, and begin a segment after them."""
        here = self.segment(order)
        self.data_history = (*self.data_history, here.model_copy(update={"samples_skipped": samples}))
        self.first_sample = self.samples = here.next_sample + samples
        self.continuation = "on"

    def begin_stage(self, stage: TrainingStage, order: str) -> None:
        """Continue in the same order, in a new segment if steps have another number of samples."""
        if self.samples > self.first_sample and stage.samples != self.stage.samples:
            self.skip(0, order)
        self.stage = stage

    def data_json(self, order: str) -> dict[str, Any]:
        """Return the `data_position` section of a manifest."""
        segments = (*self.data_history, self.segment(order))
        return {"segments": [segment.model_dump() for segment in segments]}


def skip_samples(manifest: Manifest, samples: int) -> Manifest:
    """Return the manifest with `samples` more samples skipped at its position."""
    *before, last = manifest.data_position.segments
    further = last.model_copy(update={"samples_skipped": last.samples_skipped + samples})
    return manifest.amended(data_position={"segments": [segment.model_dump() for segment in (*before, further)]})
