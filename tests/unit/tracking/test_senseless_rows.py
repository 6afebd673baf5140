"""Rows of metrics.jsonl with values of wrong types: refused in a line with their place, or harmless to all readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import event, train_row, validation

from megalm.config.schema import GuardSection
from megalm.errors import DataError
from megalm.runs import metrics_log
from megalm.runs.metrics_log import live_rows, read_metrics, read_newest_first, read_rows
from megalm.runs.run_folder import RunFolder
from megalm.tracking import compare_runs
from megalm.tracking.mlflow_mirror.mlflow_sink import metrics_of
from megalm.tracking.report.page import write_report
from megalm.train.spikes.spike_guard import SpikeGuard
from tests.messages import assert_names

ROWS = [
    event("start", startup_seconds=2.0, changed=[], world_size=2, time=1.7e9),
    *(train_row(step, 3.0, samples=16 * step, memory_bytes=2**30, time=1.7e9 + step) for step in range(1, 12)),
    validation(11, 2.5, targets=10, perplexity=12.0, whole=False, time=1.7e9 + 12),
    event("checkpoint", 11, path="step-00000011", saved_step=11, bytes=100, seconds=1.0, stall_seconds=0.1, pruned=[]),
    event("spike", 11, at_step=12, quantity="loss", decided="skip", why="", loss=9.0, limit=4.0, median=3.0),
    event("expected", 11, quantity="training_loss", loss=3.0, low=1.0, high=2.0, met=False),
    event("rollback", 10, samples_skipped=16, rollbacks=1, path="step-00000010", at_step=12),
    event("signal", 11, signal=15),
    event("end", 11, status="stopped", exit_code=75),
]
SENSELESS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "NaN", "Infinity", "-Infinity", "1", "\x1b[2J", 1e308, -1e308, 1e15, -1, 0, [], {}])
    | st.text(max_size=5)
    | st.lists(st.integers() | st.text(max_size=3), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


def use(folder: RunFolder) -> None:
    """Do what commands and a resume do with the rows.

    Raises:
        DataError: they are refused.
    """
    rows = list(read_metrics(folder.metrics))
    assert rows == [row for row, _ in read_rows(folder.metrics)] == list(read_newest_first(folder.metrics))[::-1]
    folder.next_attempt()
    SpikeGuard(GuardSection()).steps_of(read_newest_first(folder.metrics), 11)
    for row in rows:
        metrics_of(row)
    compare_runs.results(compare_runs.read_run(folder.path))
    write_report(folder.path)


@given(st.sampled_from([(at, name) for at, row in enumerate(ROWS) for name in row]), SENSELESS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_senseless_value_is_refused_or_harmless(tmp_path: Path, place: tuple[int, str], value: Any) -> None:
    at, name = place
    lines = [json.dumps({**row, name: value} if number == at else row) for number, row in enumerate(ROWS)]
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("\n".join(lines) + "\n")
    try:
        use(folder)
    except DataError as error:
        offset = sum(len(line) + 1 for line in lines[:at])
        assert_names(error, folder.metrics, offset)


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "7"), ("step", 7.5), ("step", True), ("loss", "low"), ("loss", [1]), ("time", -1), ("time", 1e300)],
)
@pytest.mark.parametrize("rows", [1, 300])
def test_a_wrong_value_is_named_with_its_place(tmp_path: Path, name: str, value: Any, rows: int) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"kind": "train", "step": 1, "loss": 3.0, "time": 1.7e9}) + "\n"
    bad = json.dumps({"kind": "train", "step": 1, "loss": 3.0, "time": 1.7e9, name: value}) + "\n"
    path.write_text(good * rows + bad + good * rows)
    for read in (read_metrics, read_newest_first):
        with pytest.raises(DataError) as refused:
            list(read(path))
        assert_names(refused.value, path, len(good) * rows, name)


@given(
    st.lists(st.sampled_from(["train", "spike", "skip", "resume", "rollback", "checkpoint"]), max_size=40), st.data()
)
@settings(max_examples=200)
def test_the_guard_finds_the_same_steps_from_the_end_of_the_file(kinds: list[str], data: st.DataObject) -> None:
    """As among all rows that count, with the refused ones left out."""
    step, attempt, rows = 0, 1, []
    for number, kind in enumerate(kinds):
        if kind == "train":
            step += 1
            rows.append({"kind": kind, "step": step, "loss": float(number), "grad_norm": 1.0, "attempt": attempt})
        elif kind in ("resume", "rollback"):
            step, attempt = data.draw(st.integers(0, step)), attempt + 1
            rows.append({"kind": "event", "event": kind, "step": step, "attempt": attempt})
        else:
            rows.append({"kind": "event", "event": kind, "step": step, "at_step": step + 1, "attempt": attempt})
    until, window = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 10))
    guard = SpikeGuard(GuardSection(window=window, warmup_steps=1))
    left_out = {(row["attempt"], row["at_step"]) for row in rows if row.get("event") in ("spike", "skip")}
    expected = [
        row["loss"]
        for row in live_rows(rows)
        if row["kind"] == "train" and row["step"] <= until and (row["attempt"], row["step"]) not in left_out
    ]
    assert [loss for loss, _ in guard.steps_of(reversed(rows), until)] == expected[-window:]


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(8, 40), st.booleans())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_the_same_whatever_is_read_at_a_time(
    tmp_path: Path, lengths: list[int], chunk_bytes: int, torn: bool
) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "other", "number": number, "text": "x" * length} for number, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + ('{"kind": "ot' if torn else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "_CHUNK_BYTES", chunk_bytes)
        assert list(read_metrics(path)) == rows
        assert list(read_newest_first(path)) == rows[::-1]
        assert [row for row, _ in read_rows(path)] == rows


def test_the_end_of_a_long_file_is_enough_for_a_resume(tmp_path: Path) -> None:
    """What is damaged far before it is for `megalm report` to say."""
    folder = RunFolder(tmp_path)
    lines = [json.dumps(train_row(step, 3.0, attempt=2)) for step in range(1, 3000)]
    folder.metrics.write_text("damaged\n" + "\n".join(lines) + "\n")
    assert folder.next_attempt() == 3
    guard = SpikeGuard(GuardSection(window=20))
    assert len(guard.steps_of(read_newest_first(folder.metrics), 2999)) == 20
    with pytest.raises(DataError):
        list(read_metrics(folder.metrics))


def test_an_attempt_that_lacks_its_step_withdraws_nothing() -> None:
    rows = [train_row(1, 3.0), event("resume") | {"step": None}, train_row(2, 2.0)]
    assert [loss for loss, _ in SpikeGuard(GuardSection()).steps_of(reversed(rows), 2)] == [3.0, 2.0]
