"""metrics.jsonl: the metrics and events of a run, one JSON object per line, appended by rank 0 only.

Rows have `kind` and `time` (unix seconds), and by kind:

- `train`: step, tokens, samples (number of the next one), loss, lr, grad_norm, loss_scale, tokens_per_second,
  step_seconds, mfu, memory_bytes (peak of rank 0), attempt; with wall_clock_breakdown also rank 0's forward_seconds,
  backward_seconds and update_seconds, and in a pipeline wait_seconds (for other stages) and reduce_seconds; in a
  mixture loss_of_NAME of each dataset, nats per target of its samples in this step, null without one: weighted by their
  targets they add up to loss; of a model with experts expert_load_max and expert_load_min (the fullest and the
  emptiest expert of any layer, 1: its equal share), router_entropy (nats, the mean over tokens and layers),
  router_aux_loss and router_z_loss (without their coefficients, the mean over sequences and layers), and with
  train.expert_capacity_factor dropped_tokens (the share of the choices of experts that capacity drops)
- `eval`: step, tokens, loss, perplexity, dataset, targets, whole (all samples of the sets), attempt (and if known
  bits_per_byte, and loss_stderr, the standard error of the loss by the choice of the samples; with evaluate.ema also
  ema_loss, with the moving average of the weights)
- `task`: step, tokens, task and dataset (name and path of a file of evaluate.tasks), questions, accuracy, byte_accuracy
  (by log-likelihood per byte of a choice), their standard errors, answer_bits_per_byte (of the right choices), chance,
  cut_contexts, whole (all questions), attempt
- `event`: event = start | resume | checkpoint | copied | spike | skip | rollback | signal | wall_time | early_stop |
  warning | expected | traffic | profile | straggler | experts | unbalanced_experts | repair | end, and its own fields:
  - `spike`: at_step, quantity, decided, loss, grad_norm, limit, median, first_sample
  - `start`, `resume` and `rollback` begin an attempt. `start` and `resume` have startup_seconds, since the start of the
    process; `resume` and `rollback` the `step` that the run continues from; `rollback` samples_skipped
  - `wall_time`: limit, that of train.max_wall_time; null where Slurm's time limit stopped the run
  - `checkpoint`, when one is complete: path, saved_step, bytes, seconds (until complete), stall_seconds (training
    waited), pruned (names of removed checkpoints)
  - `copied`, when a checkpoint's copy is verified (checkpoint.copy_to): path, bytes, seconds (all are
    in copies.json)
  - `expected`: quantity, loss, low and high in the document that the run follows, met (whether loss is within them)
  - `traffic`: first_step, last_step, ranks, and traffic, a list of axis, collective, calls and bytes, added up over
    these steps and all ranks
  - `profile`: path, profiled_step and last_step, flops_measured, flops_computed (a step, of rank 0)
  - `straggler`, a rank that is slower than the others (train.slow_factor, train.slow_seconds): rank, host, device,
    quantity (compute or data), own_seconds and median_seconds (a step's; on a GPU compute is of a fixed product),
    lasted_seconds, temperature
  - `experts`, every guard.experts_interval_steps: first_step, last_step, load: by layer that of each expert, and with
    train.expert_capacity_factor dropped_tokens
  - `unbalanced_experts`, where other experts than before are dead (under 0.02 of their equal share) or overloaded
    (over 4 times, or nearly all tokens): first_step, last_step, dead and overloaded, as [layer, expert]
  - `end`: status = finished | failed | stopped (saved, asks to be restarted), exit_code; of a failure its
    reason, with the rank and node that failed first

JSON has no NaN and no infinity, and parsers differ in what they accept. Such numbers are written as the strings "NaN",
"Infinity" and "-Infinity"; `read_metrics` returns them as floats.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from megalm.errors import DataError
from megalm.utils.atomic_files import is_stranger, still_names

Row = dict[str, Any]
Columns = dict[str, npt.NDArray[np.float64]]

METRICS_FILE = "metrics.jsonl"
TOTAL = "validation"  # the only validation set, or all sets together
LOSS_OF = "loss_of_"  # begins the columns of the training loss by dataset

ATTEMPT_EVENTS = ("start", "resume", "rollback")  # each begins one
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TAIL_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 17


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of a file.

    Attributes:
        train: the numbers of the training rows by column, [N] each, if all have the same keys; NaN for null.
        ends: the offset after each row.
    """

    rows: list[Row]
    train: Columns | None = None
    ends: list[int] = field(default_factory=list)


# Yields the rows of a file: `read_batches`, or a wrapper that shows progress.
ReadBatches = Callable[[Path], Iterable[RowBatch]]


def wall_limit(limit: str | None) -> str:
    """Return the name of a run's time limit, given the `limit` of a `wall_time` event."""
    return f"train.max_wall_time={limit}" if limit is not None else "the time limit of the Slurm job"


def describe_straggler(row: Row) -> str:
    """Return a `straggler` event in words."""
    what = "waits for data" if row.get("quantity") == "data" else "computes"
    own, median, lasted = (float(row.get(f"{name}_seconds") or 0.0) for name in ("own", "median", "lasted"))
    warm = f", at {row['temperature']:.0f} degrees" if row.get("temperature") is not None else ""
    where = f"rank {row.get('rank')} on {row.get('host')} ({row.get('device')})"
    return f"{where} is slow: it {what} {own:.3g} s, the median is {median:.3g} s, for {lasted:.0f} s now{warm}"


def describe_unbalanced_experts(row: Row) -> str:
    """Return an `unbalanced_experts` event in words."""
    named = [
        f"{kind} {', '.join(f'{expert} of layer {layer}' for layer, expert in places[:8])}"
        f"{f' and {len(places) - 8:,} more' if len(places) > 8 else ''}"
        for kind in ("dead", "overloaded")
        if (places := row.get(kind))
    ]
    steps = f"steps {row.get('first_step')} to {row.get('last_step')}"
    if not named:
        return f"no expert is dead or overloaded any more in {steps}"
    return f"WARNING: experts in {steps}: {'; '.join(named)}; a larger train.router_aux_loss balances them"


class MetricsWriter:
    """Appends complete rows. On opening, cuts off a row that a kill left incomplete and writes a `repair` event.

    Raises:
        OSError: the disk is full or the folder not writable; it names the file. A partly written row is removed, so the
            file stays readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._beginning = b""  # the row that began this attempt
        self._end = 0  # size of the file after the last row
        self._open()
        # Some network file systems number files anew each time, so that no comparison holds.
        self._can_compare = still_names(self.path, self._descriptor)

    def _open(self) -> None:
        self._end = 0
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
        self._end = size + len(line)

    def reopen_if_gone(self) -> bool:
        """Continue in a new file if the file was deleted or replaced, or emptied; return whether it was.

        An empty file gets the row that began this attempt first, without which later rows belong to none.
        """
        old = self._descriptor
        if self._can_compare and not still_names(self.path, old):
            self._open()
            os.close(old)
        elif os.fstat(old).st_size < self._end:
            self._end = os.fstat(old).st_size - _cut_torn_line(old)
        else:
            return False
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
        DataError: no such file, or a line before the last that is no row: not JSON, or with a value of a wrong type.
    """
    for batch in read_batches(path):
        yield from batch.rows


def read_batches(path: str | os.PathLike[str], offset: int = 0) -> Iterator[RowBatch]:
    """Yield complete rows from a byte offset on, some thousand at a time; errors as of `read_metrics`."""
    with _open(path) as file:
        file.seek(offset)
        rest = b""
        while block := file.read(_CHUNK_BYTES):
            block = rest + block
            end = block.rfind(b"\n")
            rest = block[end + 1 :]
            if end >= 0:
                lines = block[:end].split(b"\n")
                ends = list(accumulate((len(line) + 1 for line in lines), initial=offset))[1:]
                yield RowBatch(*_parse(lines, path, offset), ends)
                offset = ends[-1]


def read_rows(path: str | os.PathLike[str], offset: int = 0) -> Iterator[tuple[Row, int]]:
    """Yield complete rows from a byte offset on, each with the offset of the next row; errors as of `read_metrics`."""
    for batch in read_batches(path, offset):
        yield from zip(batch.rows, batch.ends, strict=True)


def read_newest_first(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yield complete rows from the last to the first, and read no more of the file than is asked for.

    Raises:
        DataError: as of `read_metrics`.
    """
    with _open(path) as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end > 0:
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            block = file.read(end - start) + rest
            cut = 0 if start == 0 else block.find(b"\n") + 1
            whole = block.rfind(b"\n") + 1
            end, rest = start, block[:cut]
            if whole > cut:
                yield from reversed(_parse(block[cut : whole - 1].split(b"\n"), path, start + cut)[0])
            elif cut == 0:
                rest = block


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    if is_stranger(Path(path)):
        raise DataError(f"{path} is not a file; move it away")
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run that has trained"
        ) from None


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


def _parse(lines: list[bytes], path: str | os.PathLike[str], offset: int) -> tuple[list[Row], Columns | None]:
    """Parse and check lines, of which the first is at byte `offset`; return the rows, and `RowBatch.train`."""
    joined = b",".join(lines)  # parsed together, since each call takes its time
    with contextlib.suppress(ValueError):
        found = orjson.loads(b"[" + joined + b"]")
        if len(found) == len(lines):
            return _checked(found, b'"NaN"' in joined or b'Infinity"' in joined)
    rows = []
    for line in lines:
        try:
            rows += _checked([orjson.loads(line)], True)[0]
        except ValueError as error:
            raise DataError(
                f"{path}: the line at byte {offset} is not a metrics row ({error}); fix or delete it"
            ) from None
        offset += len(line) + 1
    return rows, None


# --- What a row may hold ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    types: frozenset[type]
    words: str


_INTEGER = _Kind(frozenset({int}), "an integer")
_NUMBER = _Kind(frozenset({int, float}), "a number")
_TEXT = _Kind(frozenset({str}), "text")
_FLAG = _Kind(frozenset({bool}), "true or false")
_LIST = _Kind(frozenset({list}), "a list")

# The columns that the package reads; a value that is not known can be null.
_COLUMNS: dict[str, _Kind] = {
    **dict.fromkeys(("step", "tokens", "samples", "attempt", "at_step", "saved_step", "first_sample"), _INTEGER),
    **dict.fromkeys(("memory_bytes", "bytes", "targets", "samples_skipped", "rollbacks", "exit_code"), _INTEGER),
    **dict.fromkeys(("questions", "cut_contexts"), _INTEGER),
    **dict.fromkeys(("signal", "dropped_bytes", "world_size", "rank"), _INTEGER),
    **dict.fromkeys(("time", "loss", "lr", "grad_norm", "loss_scale", "tokens_per_second", "step_seconds"), _NUMBER),
    **dict.fromkeys(("mfu", "perplexity", "bits_per_byte", "seconds", "stall_seconds", "startup_seconds"), _NUMBER),
    **dict.fromkeys(("low", "high", "median", "best_loss", "loss_stderr", "own_seconds", "median_seconds"), _NUMBER),
    **dict.fromkeys(("lasted_seconds", "temperature", "expert_load_max", "expert_load_min", "ema_loss"), _NUMBER),
    **dict.fromkeys(("router_entropy", "router_aux_loss", "router_z_loss", "dropped_tokens"), _NUMBER),
    **dict.fromkeys(("accuracy", "accuracy_error", "byte_accuracy", "byte_accuracy_error", "chance"), _NUMBER),
    **dict.fromkeys(("answer_bits_per_byte",), _NUMBER),
    **dict.fromkeys(("kind", "event", "dataset", "path", "text", "quantity", "decided", "why", "reason"), _TEXT),
    **dict.fromkeys(("host", "device", "task"), _TEXT),
    **dict.fromkeys(("status", "report", "precision"), _TEXT),
    **dict.fromkeys(("whole", "met"), _FLAG),
    **dict.fromkeys(("pruned", "changed"), _LIST),
}
_NUMERIC = {name for name, kind in _COLUMNS.items() if kind in (_INTEGER, _NUMBER)}
_NEEDED = {"train": ("step",), "eval": ("step",), "event": ("event",), "task": ("step", "task")}
_NOT_NEGATIVE = ("step", "tokens", "samples", "attempt", "at_step", "time")
_LAST_TIME = 1e11  # seconds: the year 5138


def _checked(rows: Any, has_non_finite: bool) -> tuple[list[Row], Columns | None]:
    """Return rows with floats in place of "NaN" and the like, and `RowBatch.train`.

    Raises:
        ValueError: a row is no object of a kind, lacks what its kind needs, or has a senseless value.
    """
    if not set(map(type, rows)) <= {dict}:
        raise ValueError("not an object")
    if has_non_finite:
        rows = [{name: _number_of(name, value) for name, value in row.items()} for row in rows]
    kinds = [row.get("kind") for row in rows]
    if not set(map(type, kinds)) <= {str}:
        raise ValueError("no kind")
    by_shape: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for shape, row in zip(zip(kinds, map(tuple, rows), strict=True), rows, strict=True):
        by_shape.setdefault(shape, []).append(row)
    train: Columns | None = None
    for (kind, names), alike in by_shape.items():
        columns = {name: list(map(itemgetter(name), alike)) for name in names}
        for name in _NEEDED.get(kind, ()):
            if None in columns.get(name, [None]):
                raise ValueError(f"a row of kind {kind} has no {name}")
        arrays = {name: _checked_column(name, values) for name, values in columns.items()}
        if kind == "train":
            numbers = {name: array for name, array in arrays.items() if array is not None}
            train = numbers if len(alike) == kinds.count("train") and numbers.keys() >= set(names) & _NUMERIC else None
    return list(rows), train


def _checked_column(name: str, values: list[Any]) -> npt.NDArray[np.float64] | None:
    """Return a column of numbers without nulls as an array.

    Raises:
        ValueError: a value is senseless.
    """
    column, found = _COLUMNS.get(name), set(map(type, values))
    if column is None or found == {type(None)}:
        return None
    if not found <= column.types | {type(None)}:
        wrong = next(value for value in values if type(value) not in column.types and value is not None)
        raise ValueError(f"{name} is {str(wrong)[:40]!r}, not {column.words}")
    if name not in _NUMERIC:
        return None
    array = np.array(values, dtype=np.float64)  # with NaN for null
    least, most = (np.nanmin(array), np.nanmax(array)) if name in _NOT_NEGATIVE else (0, 0)
    if least < 0 or (name == "time" and most > _LAST_TIME):
        raise ValueError(f"{name} is {least if least < 0 else most:g}")
    return array


def _number_of(name: str, value: Any) -> Any:
    is_number = isinstance(value, str) and value in _NON_FINITE and _COLUMNS.get(name) is not _TEXT
    return _NON_FINITE[value] if is_number else value


# --- Writing ----------------------------------------------------------------------------------------------------------


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
