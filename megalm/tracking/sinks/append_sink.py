"""A tracker that keeps what it is given, in order, and knows no row twice: TensorBoard and Weights & Biases.

RUN_DIR/NAME/megalm.json records the progress. It says before each write that rows are on their way: where a mirror ends
in between, nobody knows how many arrived, and all rows that count are sent again, in place of those before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import orjson
from pydantic import Field

from megalm.runs.metrics_log import Row
from megalm.tracking.mlflow_mirror import run_facts
from megalm.tracking.mlflow_mirror.sink import FeedState, Sink, TakeBack, group_of, numbers_of

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

    state: AppendState
    folder_name: ClassVar[str]
    state_type: ClassVar[type[AppendState]] = AppendState

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / self.folder_name
        self.sent = 0
        self.state = self.state_type.load(self.folder / _STATE_FILE)
        self._facts: dict[str, Fact] = {}  # as sent last

    def save(self) -> None:
        state = self.state
        state.is_sending, state.reached = False, max(state.reached, state.offset)
        self._write_state()

    def start(self) -> None:
        state = self.state
        if state.is_sending:
            state.begin_again()
            state.reached = max(state.reached, 1)  # also where nothing is known to have arrived
        self.open()
        self._send_facts()

    def send(self, rows: Sequence[Row]) -> None:
        state = self.state
        if state.offset < state.reached:  # rows come again that the tracker has
            self._forget_all()
        state.is_sending = True
        self._write_state()
        self.write([row for row in rows if row["kind"] != "event"])

    def take_back(self, back: TakeBack) -> None:
        self.state.begin_again()
        self._forget_all()

    def _forget_all(self) -> None:
        self.forget()
        self._send_facts()
        self.state.reached = 0

    def _send_facts(self) -> None:
        """Send the run's settings, unless the tracker has them."""
        found = run_facts.parameters(self.run_dir)
        facts = {name: _fact(text) for name, text in found.items()}
        if facts != self._facts:
            self.write_facts(facts)
            self._facts = facts

    @abstractmethod
    def open(self) -> None:
        """Open the run at the tracker, unless it is open; a new one has no facts."""

    @abstractmethod
    def forget(self) -> None:
        """Make all values that the tracker has no longer count."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Hand train and eval rows over; they have arrived when it returns."""

    @abstractmethod
    def write_facts(self, facts: Mapping[str, Fact]) -> None:
        """Hand the run's settings over; a value is text if it is no number or truth value."""

    @staticmethod
    def numbers_of(row: Row) -> dict[str, float]:
        """Return a row's numbers: `train/loss`, `eval/loss`, `eval/NAME/loss` of a named set, `task/NAME/accuracy`."""
        return {f"{group_of(row)}/{name}": value for name, value in numbers_of(row, _NO_SERIES).items()}

    def _write_state(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.state.save(self.folder / _STATE_FILE)


def _fact(text: str) -> Fact:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value if value is None or isinstance(value, (bool, int, float)) else text
