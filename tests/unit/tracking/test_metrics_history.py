"""Rows by columns: the same rows count as by `live_rows`, and every second goes to one kind of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import history_of

from megalm.runs.metrics_history import CHECKPOINTS, REST, TRAINING, VALIDATION, read_history
from megalm.runs.metrics_log import RowBatch, live_rows

STEPS = st.integers(0, 8)
ROWS = st.one_of(
    st.builds(lambda step: {"kind": "train", "step": step}, STEPS),
    st.builds(lambda kind, step: {"kind": kind, "step": step, "task": "a"}, st.sampled_from(["eval", "task"]), STEPS),
    st.builds(
        lambda event, step: {"kind": "event", "event": event, "step": step},
        st.sampled_from(["start", "resume", "rollback", "skip", "end"]),
        st.one_of(STEPS, st.none()),
    ),
)


@given(st.lists(ROWS, max_size=30))
@settings(max_examples=200)
def test_the_same_rows_count_as_by_live_rows(found: list[dict[str, Any]]) -> None:
    rows = [{**row, "loss": float(index)} for index, row in enumerate(found)]  # each to be known again
    history, live = history_of(rows), live_rows(rows)
    assert history.column("loss").tolist() == [row["loss"] for row in live if row["kind"] == "train"]
    assert history.evaluations == [row for row in live if row["kind"] == "eval"]
    assert history.tasks == [row for row in live if row["kind"] == "task"]
    assert history.events == [row for row in rows if row["kind"] == "event"]


def test_numbers_that_are_none_or_missing_are_nan() -> None:
    row = {"kind": "train", "step": 1, "loss": math.inf, "grad_norm": math.nan, "memory_bytes": None}
    train = history_of([row]).train
    assert train["loss"].tolist() == [math.inf]
    assert all(math.isnan(train[name][0]) for name in ("grad_norm", "memory_bytes", "lr"))


def test_losses_by_dataset_are_columns_from_their_first_row_on() -> None:
    rows = [{"kind": "train", "step": step, "loss": 3.0} for step in range(1, 4)]
    rows[1]["loss_of_web"] = 2.5
    rows[2] |= {"loss_of_web": None, "loss_of_code": 1.5}
    for history in (history_of(rows), read_history(RowBatch([row]) for row in rows)):
        assert history.datasets == ["code", "web"]
        np.testing.assert_array_equal(history.column("loss_of_web"), [math.nan, 2.5, math.nan])
        np.testing.assert_array_equal(history.column("loss_of_code"), [math.nan, math.nan, 1.5])
    assert history_of(rows[:1]).datasets == []


def test_each_second_goes_to_one_kind_of_work_and_pauses_to_none() -> None:
    train = {"kind": "train", "step_seconds": 2.0}
    rows = [
        {"kind": "event", "event": "start", "step": 0, "time": 100.0},
        {**train, "step": 1, "time": 103.0},  # 2 s of training, 1 s before it
        {**train, "step": 3, "time": 107.0},  # stands for two steps
        {"kind": "eval", "step": 3, "time": 112.0},
        {"kind": "event", "event": "checkpoint", "step": 3, "stall_seconds": 3.0, "time": 116.0},
        {"kind": "event", "event": "signal", "step": 3, "time": 116.5},
        {"kind": "event", "event": "warning", "step": 3, "time": 9000.0},  # the first word of the next attempt
        {"kind": "event", "event": "resume", "step": 3, "time": 9001.0},
        {**train, "step": 4, "time": 9003.0},
    ]
    history = history_of(rows)
    assert history.seconds == {TRAINING: 8.0, VALIDATION: 5.0, CHECKPOINTS: 3.0, REST: 2.5}
    assert history.wall_seconds == 18.5


def test_a_run_without_rows() -> None:
    history = history_of([])
    assert (history.wall_seconds, history.last_time, len(history.live)) == (None, None, 0)
