"""A case to rehearse and the findings, as the process that rehearses takes and gives them; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megalm.cost_model.gpu_specs import compute_capability
from megalm.cost_model.memory import Share, shares
from megalm.engine.interface import Traffic
from megalm.model.model_config import ModelConfig
from megalm.planning.resolve import ResolvedRun

# read: the host reads one value of the device and waits for it. size: it reads how many results there are.
# to_host, to_device: a copy that the host waits for. prefetch: a copy from pinned memory, which it does not wait for.
# synchronize: it waits for all work of a stream or of the device. mixed: an operation on tensors of both.
EventKind = Literal["read", "size", "to_host", "to_device", "prefetch", "synchronize", "mixed"]
WAITS: tuple[EventKind, ...] = ("read", "size", "to_host", "to_device", "synchronize")

PhaseName = Literal["start", "step", "validation", "sample"]


@dataclass(frozen=True)
class RehearsalCase:
    """A run to rehearse as one of its ranks.

    Attributes:
        steps: training steps, of which the last is reported. In the first ZeRO 3 learns the order of its gathers, and
            DeepSpeed's timer runs from the second on.
    """

    run: ResolvedRun
    shape: ModelConfig
    rank: int
    ranks_per_node: int
    steps: int = 3

    @property
    def capability(self) -> tuple[int, int]:
        """The GPU's compute capability."""
        known = compute_capability(self.run.device.name or "")
        assert known is not None, self.run.device  # `gpu_by_name` gave it
        return known

    @property
    def stage(self) -> int:
        return self.run.topology.coordinate(self.rank).pipeline

    def share(self, stage: int) -> Share:
        """The part of the model that a rank of a pipeline stage holds."""
        run = self.run
        return list(shares(self.shape, run.topology, run.config.parallel.sequence, run.pipeline.stage_ranks))[stage]

    @property
    def parameters(self) -> int:
        """Elements of the model on the rank, before ZeRO divides them."""
        return sum(math.prod(size) for size in self.share(self.stage).parameters().values())

    def with_accumulation(self, micro_batches: int) -> RehearsalCase:
        """The same run with another number of micro-batches in a step, and so another global batch."""
        run = self.run
        size = run.batch.micro_batch * run.batch.data_parallel * micro_batches
        batch = replace(run.batch, accumulation=micro_batches, global_batch=size)
        deepspeed = {**run.deepspeed, "train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        return replace(self, run=replace(run, batch=batch, deepspeed=deepspeed))


@dataclass(frozen=True)
class HostEvent:
    """What the host did with the device at one place of the code.

    Attributes:
        place: file and function of megalm or DeepSpeed, such as `megalm/engine/zero_engine.py:train_step`.
        bytes: of all its copies.
    """

    kind: EventKind
    place: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Phase:
    """A part of the rehearsal.

    Attributes:
        peak_bytes, kept_bytes: of the tensors on the device, at their most and at the end.
        peak_place: file and function whose tensor made the peak.
        host_peak_bytes: of the tensors in the CPU's memory.
    """

    name: PhaseName
    peak_bytes: int
    peak_place: str
    kept_bytes: int
    host_peak_bytes: int
    events: tuple[HostEvent, ...]
    traffic: tuple[Traffic, ...]

    def count(self, *kinds: EventKind) -> int:
        return sum(event.count for event in self.events if event.kind in kinds)

    def sent_bytes(self, axis: str, *collectives: str) -> int:
        """Bytes along an axis, of these collectives or of all."""
        return sum(
            item.bytes
            for item in self.traffic
            if item.axis == axis and (not collectives or item.collective in collectives)
        )


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsed rank.

    Attributes:
        stage: its pipeline stage.
        parameters: elements of the model on this rank, before ZeRO divides them.
        phases: up to a failure.
        failure: the traceback of the error that ended the rehearsal; None: it reached its end.
        updated: the last step's update was applied.
    """

    rank: int
    stage: int
    parameters: int
    phases: tuple[Phase, ...]
    failure: str | None
    updated: bool
    seconds: float

    def phase(self, name: PhaseName) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def peak_bytes(self) -> int:
        return max((phase.peak_bytes for phase in self.phases), default=0)

    @property
    def host_peak_bytes(self) -> int:
        return max((phase.host_peak_bytes for phase in self.phases), default=0)

    def bytes_per_parameter(self, phase: Phase, axis: str, *collectives: str) -> float:
        return phase.sent_bytes(axis, *collectives) / self.parameters

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def misplaced(phases: Iterable[Phase]) -> list[HostEvent]:
    """The operations that mix tensors of the device and of the CPU."""
    return [event for phase in phases for event in phase.events if event.kind == "mixed"]


def extrapolated(fewer: Rehearsal, more: Rehearsal, times: int) -> Rehearsal:
    """The rehearsal of a step with `times` micro-batches more than `fewer`, where `more` has one more.

    Each further micro-batch adds the same events and bytes; memory is that of `more`.
    """
    phases = [
        phase if before is None else _continued(before, phase, times)
        for phase in more.phases
        for before in [fewer.phase(phase.name)]
    ]
    return replace(more, phases=tuple(phases), seconds=max(fewer.seconds, more.seconds))


def _continued(fewer: Phase, more: Phase, times: int) -> Phase:
    def line(start: int, end: int) -> int:
        return start + times * (end - start)

    events = {(event.kind, event.place): event for event in fewer.events}
    traffic = {(item.axis, item.collective): item for item in fewer.traffic}
    return replace(
        more,
        events=tuple(
            replace(event, count=line(old.count, event.count), bytes=line(old.bytes, event.bytes))
            for event in more.events
            for old in [events.get((event.kind, event.place), replace(event, count=0, bytes=0))]
        ),
        traffic=tuple(
            replace(item, calls=line(old.calls, item.calls), bytes=line(old.bytes, item.bytes))
            for item in more.traffic
            for old in [traffic.get((item.axis, item.collective), replace(item, calls=0, bytes=0))]
        ),
    )
