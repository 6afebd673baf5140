"""metrics.jsonl: the metrics and events of a run, one JSON object per line, appended by rank 0 only.

Rows have `kind` and `time` (unix seconds), and by kind:

- `train`: step, tokens, samples (number of the next one), loss, lr, grad_norm, loss_scale, tokens_per_second,
  step_seconds, mfu, memory_bytes (peak of rank 0), attempt
- `eval`: step, tokens, loss, perplexity, dataset, targets, whole (all samples of the sets), attempt (and bits_per_byte
  if known)
- `event`: event = start | resume | checkpoint | spike | skip | rollback | signal | wall_time | early_stop | warning |
  expected | repair | end, and its own fields:
  - `spike`: at_step, quantity, decided, loss, grad_norm, limit, median, first_sample
  - `start`, `resume` and `rollback` begin an attempt. `start` and `resume` have startup_seconds, since the start of the
    process; `resume` and `rollback` the `step` that the run continues from; `rollback` samples_skipped
  - `checkpoint`, when one is complete: path, saved_step, bytes, seconds (until complete), stall_seconds (training
    waited), pruned (names of removed checkpoints)
  - `expected`: quantity, loss, low and high in the document that the run follows, met (whether loss is within them)
  - `end`: status = finished | failed | stopped (saved, asks to be restarted), exit_code

JSON has no NaN and no infinity, and parsers differ in what they accept. Such numbers are written as the strings "NaN",
"Infinity" and "-Infinity"; `read_metrics` returns them as floats.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from megalm.errors import DataError
from megalm.utils.atomic_files import is_stranger, still_names

Row = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
# Yields the rows of a file: `read_metrics`, or a wrapper that shows progress.
ReadRows = Callable[[Path], Iterable[Row]]

ATTEMPT_EVENTS = ("start", "resume", "rollback")  # each begins one
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TAIL_BYTES = 1 << 16


class MetricsWriter:
    """Appends complete rows. On opening, cuts off a row that a kill left incomplete and writes a `repair` event.

    Raises:
        OSError: the disk is full or the folder not writable; it names the file. A partly written row is removed, so the
            file stays readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._beginning = b""  # the row that began this attempt
        self._open()
        # Some network file systems number files anew each time, so that no comparison holds.
        self._can_compare = still_names(self.path, self._descriptor)

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        dropped = _cut_torn_line(self._descriptor)
        if dropped:
            self.row("event", event="repair", dropped_bytes=dropped)

    def row(self, kind: str, **fields: Any) -> None:
        """Append one row and pass it to the kernel before returning, so that a kill -9 does not lose it."""
        line = orjson.dumps(plain({"kind": kind, "time": time.time(), **fields})) + b"\n"
        if fields.get("event") in ATTEMPT_EVENTS:
            self._beginning = line
        self._append(line)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from None

    def reopen_if_gone(self) -> bool:
        """Continue in a new file if the file was deleted or replaced; return whether it was.

        An empty new file gets the row that began this attempt first, without which later rows belong to none.
        """
        if not self._can_compare or still_names(self.path, self._descriptor):
            return False
        deleted = self._descriptor
        self._open()
        os.close(deleted)
        if not os.fstat(self._descriptor).st_size:
            self._append(self._beginning)
        return True

    def close(self) -> None:
        """Flush to the disk and close; closing twice is harmless."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yield all complete rows of a metrics.jsonl, oldest first; ignore an incomplete last line.

    Raises:
        DataError: no such file, or a line before the last that is not a JSON object.
    """
    for row, _ in read_rows(path):
        yield row


def read_rows(path: str | os.PathLike[str], offset: int = 0) -> Iterator[tuple[Row, int]]:
    """Yield complete rows from a byte offset on, each with the offset of the next row."""
    if is_stranger(Path(path)):
        raise DataError(f"{path} is not a file; move it away")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the `with` below
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run that has trained"
        ) from None
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end = offset + len(line)
            yield _parse(line, path, offset), end
            offset = end


def live_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that count, without those that a later attempt withdrew.

    A `start`, `resume` or `rollback` event at step s withdraws all earlier train and eval rows of steps after s. A run
    killed before its first checkpoint has a second `start`.
    """
    live: list[Row] = []
    for row in rows:
        if row.get("event") in ATTEMPT_EVENTS and isinstance(row.get("step"), int):
            kept_step = row["step"]
            live = [old for old in live if old["kind"] == "event" or old.get("step", 0) <= kept_step]
        live.append(row)
    return live


def _parse(line: bytes, path: str | os.PathLike[str], offset: int) -> Row:
    try:
        row = orjson.loads(line)
        if not isinstance(row, dict) or "kind" not in row:
            raise ValueError("not an object with a kind")
    except ValueError as error:
        raise DataError(f"{path}: the line at byte {offset} is not a metrics row ({error}); fix or delete it") from None
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def plain(value: Any) -> Any:
    """Convert to values that strict JSON can hold; NumPy and torch scalars become Python numbers."""
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return plain(value.item()) if hasattr(value, "item") else value


def _cut_torn_line(descriptor: int) -> int:
    """Cut the file back to its last newline; return the number of bytes dropped."""
    size = os.fstat(descriptor).st_size
    keep, end = 0, size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        end = start
    if keep < size:
        os.ftruncate(descriptor, keep)
    return size - keep
