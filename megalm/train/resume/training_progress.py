"""How far a run has come: steps, samples, tokens, and the pieces that its data and its schedule are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megalm.planning.lr_schedule import ScheduleSegment
from megalm.train.evaluator import Evaluation

# A stretch starts an order of its own, goes on in the order of the stretch before, or reads what that one left of its
# epoch, cut into samples of another length.
Beginning = Literal["anew", "on", "recut"]


@dataclass(frozen=True)
class DataSegment:
    """A stretch of training on one order of samples with one batch size.

    Attributes:
        order: fingerprint of the order that the sample numbers belong to.
        sequence_length: tokens of a sample.
        global_batch: samples of a step.
        first_sample: number of the stretch's first sample.
        samples_consumed: trained on, from there.
        samples_skipped: passed over after those, because they led to a spike or a person said so.
        begins: how it follows the stretch before.
    """

    order: str
    sequence_length: int
    global_batch: int
    first_sample: int
    samples_consumed: int
    samples_skipped: int = 0
    begins: Beginning = "anew"

    @property
    def next_sample(self) -> int:
        return self.first_sample + self.samples_consumed + self.samples_skipped

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> DataSegment:
        return DataSegment(**{"first_sample": 0, **stored})  # it was not noted while there was but one stretch


@dataclass
class TrainingProgress:
    """What a checkpoint has to know beside the tensors.

    Attributes:
        samples: number of the next sample of the order in force.
        evaluation: of this very step.
        best_loss: lowest validation loss so far, on the part used while training.
        stale_evaluations: validations since then.
        rollbacks: how often the guard has set this run back.
        past: stretches of data before the one in force, which began at sample `first_sample` as `begins` says.
        schedule: what the learning rate follows.
        stated: the schedules that a person stated while these segments came about: stating one again is no change.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    attempt: int = 1
    best_loss: float | None = None
    stale_evaluations: int = 0
    evaluation: Evaluation | None = None
    rollbacks: int = 0
    past: tuple[DataSegment, ...] = ()
    first_sample: int = 0
    begins: Beginning = "anew"
    schedule: tuple[ScheduleSegment, ...] = ()
    stated: tuple[dict[str, Any], ...] = ()

    def segment(self, order: str, sequence_length: int, global_batch: int) -> DataSegment:
        """The stretch in force so far."""
        consumed = self.samples - self.first_sample
        return DataSegment(order, sequence_length, global_batch, self.first_sample, consumed, begins=self.begins)

    def pass_over(self, samples: int, order: str, sequence_length: int, global_batch: int) -> None:
        """Go on so many samples later in the same order."""
        here = self.segment(order, sequence_length, global_batch)
        self.past = (*self.past, replace(here, samples_skipped=samples))
        self.first_sample = self.samples = here.next_sample + samples
        self.begins = "on"

    def data_json(self, order: str, sequence_length: int, global_batch: int) -> dict[str, Any]:
        """`data_position` of a manifest."""
        segments = (*self.past, self.segment(order, sequence_length, global_batch))
        return {"segments": [asdict(segment) for segment in segments]}

    def schedule_json(self) -> dict[str, Any]:
        """`schedule` of a manifest."""
        return {"stated": list(self.stated), "segments": [segment.as_json() for segment in self.schedule]}


def data_segments(manifest: Mapping[str, Any]) -> list[DataSegment]:
    """The stretches of a checkpoint's data position; the last one is in force."""
    return [DataSegment.from_json(stored) for stored in manifest["data_position"]["segments"]]


def pass_over(manifest: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The manifest with so many more samples skipped where it stands."""
    segments = data_segments(manifest)
    segments[-1] = replace(segments[-1], samples_skipped=segments[-1].samples_skipped + samples)
    return {**manifest, "data_position": {"segments": [asdict(segment) for segment in segments]}}


def schedule_segments(manifest: Mapping[str, Any]) -> list[ScheduleSegment]:
    return [ScheduleSegment.from_json(stored) for stored in manifest["schedule"]["segments"]]
