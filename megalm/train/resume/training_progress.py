"""How far a run has come: steps, samples, tokens, and the pieces that its data and its schedule are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalm.checkpoint.manifest import Beginning, DataSegment, Manifest
from megalm.planning.lr_schedule import ScheduleSegment
from megalm.train.evaluator import Evaluation


@dataclass(frozen=True)
class RunSchedule:
    """What the learning rate follows.

    Attributes:
        segments: one schedule after the other; the last one is in force.
        configured_schedules: those that a person configured while the segments came about: one of them again is no
            change.
    """

    segments: tuple[ScheduleSegment, ...] = ()
    configured_schedules: tuple[dict[str, Any], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """`schedule` of a manifest."""
        return {"stated": list(self.configured_schedules), "segments": [segment.as_json() for segment in self.segments]}


@dataclass
class TrainingProgress:
    """What a checkpoint has to know beside the tensors.

    Attributes:
        samples: number of the next sample of the order in force.
        evaluation: of this very step.
        best_loss: lowest validation loss so far, on the part used while training.
        stale_evaluations: validations since then.
        rollbacks: how often the guard has set this run back.
        data_history: stretches of data before the one in force, which began at sample `first_sample` as `continuation`
            says.
    """

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

    def segment(self, order: str, sequence_length: int, global_batch: int) -> DataSegment:
        """The stretch in force so far."""
        consumed = self.samples - self.first_sample
        return DataSegment(
            order=order,
            sequence_length=sequence_length,
            global_batch=global_batch,
            first_sample=self.first_sample,
            samples_consumed=consumed,
            begins=self.continuation,
        )

    def pass_over(self, samples: int, order: str, sequence_length: int, global_batch: int) -> None:
        """Go on so many samples later in the same order."""
        here = self.segment(order, sequence_length, global_batch)
        self.data_history = (*self.data_history, here.model_copy(update={"samples_skipped": samples}))
        self.first_sample = self.samples = here.next_sample + samples
        self.continuation = "on"

    def data_json(self, order: str, sequence_length: int, global_batch: int) -> dict[str, Any]:
        """`data_position` of a manifest."""
        segments = (*self.data_history, self.segment(order, sequence_length, global_batch))
        return {"segments": [segment.model_dump() for segment in segments]}


def pass_over(manifest: Manifest, samples: int) -> Manifest:
    """The manifest with so many more samples skipped where it stands."""
    *before, last = manifest.data_position.segments
    further = last.model_copy(update={"samples_skipped": last.samples_skipped + samples})
    return manifest.amended(data_position={"segments": [segment.model_dump() for segment in (*before, further)]})
