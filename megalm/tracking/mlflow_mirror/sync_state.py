"""The mirror's persistent state, and the numbers it sends. Imports no MLflow, which takes seconds: client.py does."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import orjson

from megalm.errors import ConfigError
from megalm.utils.atomic_files import write_atomically

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


@dataclass(frozen=True)
class MetricValue:
    """One number of one series; `time_ms` is unix milliseconds."""

    key: str
    value: float
    step: int
    time_ms: int


@dataclass
class MirrorState:
    """RUN_DIR/mlflow.json: which MLflow run this folder is, and how much of it is there."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    tracking_uri: str = ""
    default_store: bool = True
    experiment: str = ""
    run_id: str | None = None
    offset: int = 0
    status: str = RUNNING
    status_sent: str | None = None
    end_ms: int | None = None
    signalled: bool = False
    artifacts: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> MirrorState:
        if not path.exists():
            return cls()
        try:
            stored = orjson.loads(path.read_bytes())
            return cls(**{item.name: stored[item.name] for item in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: cannot be read ({error!r}); delete it to send the run to a new MLflow run"
            ) from None

    def save(self, path: Path) -> None:
        # Not durable: rows that a power failure loses are sent again, and MLflow stores them once.
        content = orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2)
        write_atomically(path, lambda file: file.write(content), durable=False)
