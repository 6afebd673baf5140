"""What the mirror needs of a tracking store. Imports no MLflow, which takes seconds: client.py has the real one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


@dataclass(frozen=True)
class MetricValue:
    """One number of one series; `time_ms` is unix milliseconds."""

    key: str
    value: float
    step: int
    time_ms: int


class Store(Protocol):
    """What a delivery needs of a tracking server; any exception means: try again later."""

    def run_exists(self, run_id: str) -> bool: ...

    def create_run(self, experiment: str, name: str, key: str, start_ms: int) -> str:
        """Create a run, or find the one that was created with this key; returns its id."""

    def log_metrics(self, run_id: str, metrics: list[MetricValue]) -> None: ...

    def set_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None: ...

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None: ...

    def upload(self, run_id: str, file: Path, folder: str | None) -> None: ...

    def set_status(self, run_id: str, status: str, end_ms: int | None) -> None: ...
