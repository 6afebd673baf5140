"""What the training loop drives, as it sees it; setup.py makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megalm.checkpoint.manifest import Status
from megalm.checkpoint.writer import Saved
from megalm.config.resolve import ResolvedRun
from megalm.data.loader import BatchLoader
from megalm.engine.protocol import Comm, Engine
from megalm.tracking.metrics import MetricsWriter
from megalm.train.evaluate import Evaluation, Evaluator
from megalm.train.guard import SpikeGuard
from megalm.train.incidents import Incident
from megalm.train.leaving import StopRequest
from megalm.train.limits import Limits
from megalm.train.position import Position
from megalm.train.report import Reporter


class Checkpoints(Protocol):
    """Writes the state of `engine` at a position, at once or behind training."""

    def save(self, engine: Engine, position: Position, status: Status = ..., reason: str | None = ...) -> Path: ...
    def completed(self, wait: bool = ...) -> list[Saved]: ...
    def mark_best(self, path: Path) -> None: ...
    def note_evaluation(self, path: Path, evaluation: Evaluation) -> None: ...
    def rehearse(self, engine: Engine) -> None: ...
    def roll_back(self, engine: Engine, next_sample: int, attempt: int) -> tuple[Path, Position]: ...


class Incidents(Protocol):
    """Writes the report of a step that was out of bounds."""

    def write(self, engine: Engine, incident: Incident) -> Path: ...


class Sampler(Protocol):
    """Writes sample text of this step, and shows it if asked to."""

    def write(self, engine: Engine, step: int, show: bool) -> None: ...
    def rehearse(self, engine: Engine) -> None: ...


@dataclass(frozen=True)
class Parts:
    """Everything of a run but where it stands."""

    run: ResolvedRun
    comm: Comm
    engine: Engine
    batches: BatchLoader
    evaluator: Evaluator
    checkpoints: Checkpoints
    sampler: Sampler
    metrics: MetricsWriter | None  # rank 0's
    reporter: Reporter
    stop: StopRequest
    guard: SpikeGuard
    incidents: Incidents
    limits: Limits
    flops_per_token: float
    peak_flops: float  # of all ranks together

    def close(self) -> None:
        """After the last step: nothing watches or reads ahead any more, and nothing is left on local disks."""
        self.limits.rest()
        self.batches.close()
        self.engine.close()
