"""CPU, memory, network and GPUs of every node, by MLflow's own monitors, into RUN_DIR/system/node-N.jsonl.

Each node's process appends to a file of its own, and the mirror alone speaks to the tracker: a store on SQLite takes
one writer, and what was sampled while a server was down is sent later. With several nodes MLflow draws one chart for
each NAME of `system/node_N/NAME`, with a line for each node; with one it has `system/NAME`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson

from megalm.runs.run_folder import ENVIRONMENT_FILE, read_mapping
from megalm.tracking.mlflow_mirror.sync_state import MetricValue

FOLDER = "system"
_SECONDS = 10.0  # between two samples; a row is the mean of those since the last row
# A row a minute is enough for a long run, and a short one has some points, too.
_ROWS_AT_FIRST_SECONDS = 600.0
_ROW_SECONDS = 60.0

logger = logging.getLogger(__name__)


class NodeMonitor(Protocol):
    """What MLflow's monitors offer: collects samples, and gives their means."""

    def collect_metrics(self) -> None: ...
    def aggregate_metrics(self) -> dict[str, float]: ...
    def clear_metrics(self) -> None: ...


class NodeSampler:
    """Samples this node and appends rows; errors are logged and end the sampling, never the mirror."""

    def __init__(self, run_dir: Path, node: int) -> None:
        self._path = run_dir / FOLDER / f"node-{node}.jsonl"
        self._began = time.monotonic()
        self._interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SECONDS)
        self._last_row = self._began
        self._monitors: list[NodeMonitor] | None = None
        self.due = self._began + min(2.0, self._interval)

    def sample_if_due(self) -> None:
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + self._interval
        try:
            for monitor in self._opened():
                monitor.collect_metrics()
            if now - self._began < _ROWS_AT_FIRST_SECONDS or now - self._last_row >= _ROW_SECONDS:
                self._write()
                self._last_row = now
        except Exception as error:
            logger.warning("system metrics of this node end here: %s", " ".join(str(error).split()))
            self.due = math.inf

    def close(self) -> None:
        """Write the last row."""
        if self.due < math.inf:
            self.due, self._last_row = 0.0, -_ROW_SECONDS
            self.sample_if_due()
            self.due = math.inf

    def _opened(self) -> list[NodeMonitor]:
        if self._monitors is None:
            from megalm.tracking.mlflow_mirror.client import node_monitors

            self._monitors = node_monitors()
            self._path.parent.mkdir(exist_ok=True)
        return self._monitors

    def _write(self) -> None:
        row: dict[str, Any] = {"time": time.time(), "host": platform.node()}
        for monitor in self._opened():
            row |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        with open(self._path, "ab") as file:
            file.write(orjson.dumps(row) + b"\n")


def node_files(run_dir: Path) -> dict[str, Path]:
    """Return prefix of the metrics' names -> file, for each node; with a node's own prefix if the run has several."""
    paths = sorted((run_dir / FOLDER).glob("node-*.jsonl"))
    nodes = read_mapping(run_dir / ENVIRONMENT_FILE).get("nodes")
    if len(paths) == 1 and not (isinstance(nodes, list) and len(nodes) > 1):  # the other nodes' files come later
        return {"system/": paths[0]}
    return {f"system/{path.stem.replace('-', '_')}/": path for path in paths}


def samples_after(path: Path, offset: int, count: int, prefix: str) -> Iterator[tuple[list[MetricValue], int]]:
    """Yield the numbers of each sample after an offset, and the offset after it.

    Args:
        count: of the samples before the offset: a sample's number is its step.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # being written
                return
            offset += len(line)
            with contextlib.suppress(ValueError):  # a line that a kill left incomplete, with the next one in it
                row = orjson.loads(line)
                moment = int(row["time"] * 1000)
                numbers = {name: value for name, value in row.items() if name not in ("time", "host")}
                yield [MetricValue(prefix + name, value, count, moment) for name, value in numbers.items()], offset
            count += 1
