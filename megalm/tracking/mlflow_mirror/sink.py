"""What a tracker is to the mirror, and how a run folder's rows reach it: each row that counts once, in file order.

A resume or a rollback at step s takes back the train and eval rows of later steps. A tracker shows the run as it
counts: rows that are taken back before they are sent never reach it as counted ones, and of those that it already has
it hears by `Sink.take_back`.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, Field, ValidationError

from megalm.errors import ConfigError
from megalm.runs.metrics_log import ATTEMPT_EVENTS, METRICS_FILE, TOTAL, Row, read_rows
from megalm.utils.atomic_files import write_atomically

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
_END_STATUS = {"finished": FINISHED, "failed": FAILED, "stopped": KILLED}
_EXIT_STATUS = {0: FINISHED, 75: KILLED}
# A tracker's progress is saved at least after this many rows.
_ROWS_AT_ONCE = 500

logger = logging.getLogger(__name__)

_State = TypeVar("_State", bound="FeedState")


class FeedState(BaseModel):
    """How much of a run a tracker has, and what is known of the run's end; a tracker keeps it in a file of its own.

    Attributes:
        offset: of the next row, in bytes.
        last_step: the highest step of the train and eval rows that the tracker has; None in files of older versions.
        sent_before: rows before this offset have been sent at some time, be it before `begin_again`.
        signalled: a signal event came after the attempt's beginning.
    """

    offset: int = Field(default=0, ge=0)
    last_step: int | None = None
    sent_before: int = Field(default=0, ge=0)
    status: str = RUNNING
    end_ms: int | None = None
    signalled: bool = False
    after_deletion: ClassVar[str] = "send all rows again"  # for messages

    @classmethod
    def load(cls: type[_State], path: Path) -> _State:
        """Read the state from its file; without one it is new.

        Raises:
            ConfigError: the file is damaged.
        """
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            reason = " ".join([*map(str, first["loc"]), first["msg"]])
            raise ConfigError(f"{path}: cannot be read ({reason}); delete it to {cls.after_deletion}") from None

    def save(self, path: Path) -> None:
        # Not durable: rows that a power failure loses are sent again.
        content = self.model_dump_json(indent=2).encode()
        write_atomically(path, lambda file: file.write(content), durable=False)

    def begin_again(self) -> None:
        """Have all rows that count sent again, from the first."""
        self.sent_before = max(self.sent_before, self.offset)
        self.offset, self.last_step = 0, 0


@dataclass(frozen=True)
class TakeBack:
    """A start, resume or rollback: earlier train and eval rows of steps after `step` no longer count.

    Attributes:
        offset: the end of its row, in bytes.
        attempt: the one that it begins, if known.
    """

    offset: int
    step: int
    attempt: int | None


class Sink(ABC):
    """One tracker, fed by `Feed`. Any exception of a method means: the whole pass is tried again later.

    A row may then come a second time, so that sending it must not count twice.

    Attributes:
        state: the tracker's own, as loaded from its file; `start` may replace it.
    """

    state: FeedState

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages: what and where it is, without credentials."""

    def remedy(self, run_dir: Path) -> str:
        """For messages: what a person does about rows that could not be sent."""
        return f"run `megalm track sync {run_dir}` to send the rest"

    @abstractmethod
    def save(self) -> None:
        """Write the state to its file; called whenever rows are accepted."""

    @abstractmethod
    def start(self) -> None:
        """Open or create the run at the tracker, and send what has changed of its facts; called at each pass."""

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Take rows that count, and events."""

    @abstractmethod
    def take_back(self, back: TakeBack) -> None:
        """Make the tracker forget train and eval rows of later steps that it has.

        One that cannot forget calls `state.begin_again` for a new run, and gets all rows that count again.
        """

    def send_superseded(self, rows: Sequence[Row], back: TakeBack) -> None:  # noqa: B027 - most show what counts only
        """Take train and eval rows that `back` took back before they were ever sent; not called for rows sent once."""

    @abstractmethod
    def finish(self) -> None:
        """End a pass: send files, and the run's status, which is RUNNING until its end."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """End the last pass of this process."""

    @property
    @abstractmethod
    def outcome(self) -> str:
        """For messages: what was sent, and where it is."""


class Feed:
    """Feeds one sink from a run folder; each `deliver` sends what is new.

    `run_has_ended` becomes true with an end event at unix time `since` or later: the rows of a resumed run also contain
    the end event of its earlier attempt, possibly not yet sent.
    """

    def __init__(self, sink: Sink, run_dir: Path, since: float = 0.0) -> None:
        self.sink = sink
        self.run_dir = run_dir
        self.run_has_ended = False
        self._path = run_dir / METRICS_FILE
        self._since = since

    def deliver(self, parent_ended: bool = False) -> None:
        """Send everything not yet sent; with `parent_ended`, also close a run without an end event."""
        self.sink.start()
        if self._path.exists():
            self._send_rows()
        state = self.sink.state
        if parent_ended and state.status == RUNNING:
            # The training process ended without writing an end event.
            state.status, state.end_ms = (KILLED if state.signalled else FAILED), int(time.time() * 1000)
        self.sink.finish()
        self.sink.save()

    def _send_rows(self) -> None:
        path, sink = self._path, self.sink
        if path.stat().st_size < sink.state.offset:
            logger.warning("%s is shorter than the part already sent: sending it again from its first row", path)
            sink.state.offset = sink.state.last_step = sink.state.sent_before = 0
        first = None
        if sink.state.last_step is None:
            sink.state.last_step, first = _sent_by_older_version(path, sink.state.offset)
        backs, end = _scan(path, sink.state.offset)
        first = min(backs if first is None else [first], key=lambda back: back.step, default=None)
        if first is not None and first.step < sink.state.last_step:
            logger.info(
                "%s continues from step %d: the tracker's rows of later steps no longer count", path, first.step
            )
            before = sink.state.offset
            sink.take_back(first)
            sink.state.last_step = min(sink.state.last_step or 0, first.step)  # `take_back` may have begun again
            sink.save()
            if sink.state.offset < before:
                backs, end = _scan(path, sink.state.offset)
        part = _Part()
        for row, row_end in read_rows(path, sink.state.offset):
            if row_end > end:  # it is not known yet whether rows from here on count
                break
            part.add(row, row_end, _taken_back_by(row, row_end, backs), sink.state.sent_before)
            if part.size >= _ROWS_AT_ONCE:
                self._hand_over(part)
                part = _Part()
        if part.size:
            self._hand_over(part)

    def _hand_over(self, part: _Part) -> None:
        sink = self.sink
        if part.counted:
            sink.send(part.counted)
        for back, rows in part.superseded.items():
            sink.send_superseded(rows, back)
        state = sink.state
        for row in part.counted:
            if row["kind"] == "event":
                self._note_event(row)
            else:
                state.last_step = max(state.last_step or 0, row["step"])
        state.offset = part.end
        sink.save()

    def _note_event(self, row: Row) -> None:
        """Update the run's status by a start, resume, signal or end event."""
        state, event = self.sink.state, row["event"]
        if event in ("start", "resume"):
            state.status, state.end_ms, state.signalled = RUNNING, None, False
        elif event == "signal":
            state.signalled = True
        elif event == "end":
            by_code = _EXIT_STATUS.get(row.get("exit_code", 0), FAILED)
            state.status = _END_STATUS.get(str(row.get("status")), by_code)
            state.end_ms = milliseconds(row)
            # In full precision: an attempt may end in the millisecond in which the next one begins.
            self.run_has_ended = seconds(row) >= self._since


@dataclass
class _Part:
    """Consecutive rows, sorted by whether they count."""

    counted: list[Row] = field(default_factory=list)
    superseded: dict[TakeBack, list[Row]] = field(default_factory=dict)
    size: int = 0
    end: int = 0

    def add(self, row: Row, end: int, back: TakeBack | None, sent_before: int) -> None:
        if back is None:
            self.counted.append(row)
        elif end > sent_before:
            self.superseded.setdefault(back, []).append(row)
        self.size += 1
        self.end = end


def _scan(path: Path, offset: int) -> tuple[list[TakeBack], int]:
    """Return what begins an attempt after `offset`, and the offset of the row after the last complete one."""
    backs, end = [], offset
    for row, row_end in read_rows(path, offset):
        end = row_end
        if row.get("event") in ATTEMPT_EVENTS and isinstance(row.get("step"), int):
            backs.append(TakeBack(row_end, row["step"], row.get("attempt")))
    return backs, end


def _taken_back_by(row: Row, end: int, backs: Sequence[TakeBack]) -> TakeBack | None:
    if row["kind"] == "event":
        return None
    return next((back for back in backs if back.offset > end and back.step < row.get("step", 0)), None)


def _sent_by_older_version(path: Path, offset: int) -> tuple[int, TakeBack | None]:
    """Return the highest step before `offset`, and what first took back rows there: they were sent all the same."""
    highest, first = 0, None
    for row, end in read_rows(path):
        if end > offset:
            break
        if row["kind"] != "event":
            highest = max(highest, row.get("step", 0))
        elif first is None and row["event"] in ATTEMPT_EVENTS and row.get("step", highest) < highest:
            first = TakeBack(end, row["step"], row.get("attempt"))
    return highest, first


def group_of(row: Row) -> str:
    """Return what the series of a row's numbers are named after: `train`, `eval`, `eval/SET`, `task/NAME`."""
    if row["kind"] == "task":
        return f"task/{row['task']}"
    if row["kind"] == "eval" and row.get("dataset") not in (None, TOTAL):
        return f"eval/{Path(str(row['dataset'])).name}"
    return str(row["kind"])


def numbers_of(row: Row, left_out: Collection[str]) -> dict[str, float]:
    """Return a row's numbers by name, without those that only locate the row."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in left_out and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def seconds(row: Row) -> float:
    moment = row.get("time", 0.0)
    return float(moment) if isinstance(moment, (int, float)) and math.isfinite(moment) else 0.0


def milliseconds(row: Row) -> int:
    return int(seconds(row) * 1000)
