"""metrics.jsonl: the account of a run, one JSON object a line, appended by rank 0 only.

Rows have `kind` and `time` (unix seconds), and by kind:

- `train`: step, tokens, samples (number of the next one), loss, lr, grad_norm, loss_scale, tokens_per_second,
  step_seconds, mfu, attempt
- `eval`: step, tokens, loss, perplexity, dataset (and bits_per_byte where it is known)
- `event`: event = start | resume | checkpoint | spike | skip | rollback | signal | wall_time | early_stop | warning |
  expected | repair | end, and its own fields. `spike` has at_step, quantity, decided, loss, grad_norm, limit, median
  and first_sample; `rollback` has samples_skipped and begins an attempt, as `start` and `resume` do; `checkpoint` comes
  when one is complete and has path, saved_step, bytes, seconds (until then), stall_seconds (training stood still) and
  pruned (names of those that went).
  `expected` has a quantity, its loss, and low and high of the document that the run follows; met: whether it is there.
  `start` and `resume` have startup_seconds, from the start of the process.
  `end` has `status`: finished | failed | stopped (saved, and wants to be started again) and `exit_code`;
  `resume` and `rollback` have the `step` that the run goes on from.

JSON has no NaN and no infinity, and readers differ in what they forgive: such numbers are written as the
strings "NaN", "Infinity" and "-Infinity" and come back from `read_metrics` as floats.
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

Row = dict[str, Any]

METRICS_FILE = "metrics.jsonl"
# What yields the rows of a file: `read_metrics`, or the same for somebody who waits.
ReadRows = Callable[[Path], Iterable[Row]]

ATTEMPT_EVENTS = ("start", "resume", "rollback")  # each begins one
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TAIL_BYTES = 1 << 16


class MetricsWriter:
    """Appends whole rows; what a kill left torn is cut off at opening and reported as a `repair` event.

    Raises:
        OSError: the disk is full or the folder not writable. A row that could not be written whole is taken
            back, so the file stays readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        dropped = _cut_torn_line(self._descriptor)
        if dropped:
            self.row("event", event="repair", dropped_bytes=dropped)

    def row(self, kind: str, **fields: Any) -> None:
        """Append one row, in the kernel's hands when this returns (a kill -9 does not lose it)."""
        line = orjson.dumps(plain({"kind": kind, "time": time.time(), **fields})) + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

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
    """All whole rows of a metrics.jsonl, oldest first; a torn last line is not a row.

    Raises:
        DataError: no such file, or a line before the last that is not a JSON object.
    """
    for row, _ in read_rows(path):
        yield row


def read_rows(path: str | os.PathLike[str], offset: int = 0) -> Iterator[tuple[Row, int]]:
    """Whole rows from a byte offset on, each with the offset of the row after it."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the `with` below
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a run folder that has trained") from None
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end = offset + len(line)
            yield _parse(line, path, offset), end
            offset = end


def live_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run as it counts: what a later attempt took back is left out.

    A `start`, `resume` or `rollback` event at step s withdraws every train and eval row after step s before it; a run
    that was killed before its first checkpoint starts again.
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
        raise DataError(f"{path}: the line at byte {offset} is no metrics row ({error}); mend or delete it") from None
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def plain(value: Any) -> Any:
    """Values that strict JSON can hold; NumPy's and torch's scalars become Python's."""
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
    """Cut the file back to its last newline; returns the number of bytes dropped."""
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
