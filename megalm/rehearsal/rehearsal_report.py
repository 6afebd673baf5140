"""The findings of a rehearsal, as the process that rehearses hands them over; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
        capability: compute capability of the GPU.
        steps: training steps; the last one is the one reported.
    """

    run: ResolvedRun
    shape: ModelConfig
    rank: int
    ranks_per_node: int
    capability: tuple[int, int]
    steps: int = 3


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
class AxisTraffic:
    """Collectives of one kind along one axis of the ranks, as `megalm.engine.interface.Traffic`."""

    axis: str
    collective: str
    calls: int
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
    traffic: tuple[AxisTraffic, ...]

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
