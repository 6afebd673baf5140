"""A tracker that keeps what it is given, in order, and knows no row twice: TensorBoard and Weights & Biases.

RUN_DIR/NAME/megalm.json records the progress. It says before each write that rows are on their way: where a mirror ends
in between, nobody knows how many arrived, and all rows that count are sent again, in place of those before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import orjson
from pydantic import Field, ValidationError

from megalm.errors import ConfigError
from megalm.runs.metrics_log import Row
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sink import FeedState, Sink, TakeBack
from megalm.utils.atomic_files import write_atomically

_STATE_FILE = "megalm.json"
_NO_SERIES = ("kind", "time", "step", "attempt", "samples")  # they locate a row


Fact = str | float | bool | None


class AppendState(FeedState):
    """RUN_DIR/NAME/megalm.json.

    Attributes:
        reached: rows before this offset have arrived, and count if no take-back came.
        is_sending: rows after `offset` may have arrived.
    """

    last_step: int | None = 0
    reached: int = Field(default=0, ge=0)
    is_sending: bool = False


class AppendSink(Sink):
    """A run folder at such a tracker.

    Attributes:
        folder: the tracker's, in the run folder.
        sent: numbers, for messages.
    """

    folder_name: ClassVar[str]
    state_type: ClassVar[type[AppendState]] = AppendState

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / self.folder_name
        self.sent = 0
        self._state = self._loaded()

    @property
    def state(self) -> AppendState:
        return self._state

    def save(self) -> None:
        state = self._state
        state.is_sending, state.reached = False, max(state.reached, state.offset)
        self._write_state()

    def start(self) -> None:
        state = self._state
        if state.is_sending:
            state.begin_again()
            state.reached = max(state.reached, 1)  # also where nothing is known to have arrived
        self.open()

    def send(self, rows: Sequence[Row]) -> None:
        state = self._state
        if state.offset < state.reached:  # rows come again that the tracker has
            self._forget_all()
        state.is_sending = True
        self._write_state()
        self.write([row for row in rows if row["kind"] != "event"])

    def take_back(self, back: TakeBack) -> None:
        self._state.begin_again()
        self._forget_all()

    def _forget_all(self) -> None:
        self.forget()
        self._state.reached = 0

    @abstractmethod
    def open(self) -> None:
        """Open the run at the tracker, unless it is open, and send what has changed of its facts."""

    @abstractmethod
    def forget(self) -> None:
        """Make all values that the tracker has no longer count."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Hand train and eval rows over; they have arrived when it returns."""

    def facts(self) -> dict[str, Fact]:
        """Return the run's settings; text where a value is no number, truth value or text."""
        return {name: _fact(text) for name, text in run_facts.parameters(self.run_dir).items()}

    @staticmethod
    def numbers_of(row: Row) -> dict[str, float]:
        """Return a row's numbers: `train/loss`, `eval/loss`, `eval/NAME/loss` of a named set, `task/NAME/accuracy`."""
        prefix = str(row["kind"])
        if prefix == "task":
            prefix += f"/{row['task']}"
        if prefix == "eval" and row.get("dataset") not in (None, "validation"):
            prefix += f"/{Path(str(row['dataset'])).name}"
        return {
            f"{prefix}/{name}": float(value)
            for name, value in row.items()
            if name not in _NO_SERIES and isinstance(value, (int, float)) and not isinstance(value, bool)
        }

    def _loaded(self) -> AppendState:
        path = self.folder / _STATE_FILE
        try:
            return self.state_type.model_validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            return self.state_type()
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"{path}: cannot be read ({reason}); delete it to send all rows again") from None

    def _write_state(self) -> None:
        self.folder.mkdir(exist_ok=True)
        content = self._state.model_dump_json(indent=2).encode()
        # Not durable: after a power failure all rows are sent again.
        write_atomically(self.folder / _STATE_FILE, lambda file: file.write(content), durable=False)


def _fact(text: str) -> Fact:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value if value is None or isinstance(value, (bool, int, float)) else text
