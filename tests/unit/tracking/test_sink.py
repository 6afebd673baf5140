"""What reaches a tracker, whenever its mirror happens to look at the file: the rows that count, each once, in order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from megalm.runs.metrics_log import MetricsWriter, Row, live_rows, read_metrics
from megalm.tracking.mlflow_mirror.mlflow_sink import metrics_of
from megalm.tracking.mlflow_mirror.sink import FAILED, FINISHED, KILLED, RUNNING, Feed, FeedState, Sink, TakeBack
from megalm.tracking.sinks.append_sink import AppendSink


class Remembering(Sink):
    """A tracker in memory that forgets rows one by one, or (like MLflow) begins again."""

    def __init__(self, begins_again: bool) -> None:
        self.kept: list[Row] = []
        self.superseded: list[Row] = []
        self.fails_next = False
        self._begins_again = begins_again
        self._state = FeedState()

    @property
    def name(self) -> str:
        return "memory"

    @property
    def state(self) -> FeedState:
        return self._state

    @property
    def outcome(self) -> str:
        return f"{len(self.kept)} rows in memory"

    def save(self) -> None:
        """Nothing to do: the state lives as long as the rows."""

    def start(self) -> None:
        """Nothing to open."""

    def send(self, rows: Sequence[Row]) -> None:
        if self.fails_next:
            self.fails_next = False
            raise ConnectionError("gone")
        self.kept += rows

    def take_back(self, back: TakeBack) -> None:
        if self._begins_again:
            self.superseded += [row for row in self.kept if row["kind"] != "event" and row["step"] > back.step]
            self.kept = []
            self.state.begin_again()
        else:
            gone = [row for row in self.kept if row["kind"] != "event" and row["step"] > back.step]
            self.superseded += gone
            self.kept = [row for row in self.kept if row not in gone]

    def send_superseded(self, rows: Sequence[Row], back: TakeBack) -> None:
        assert all(row["step"] > back.step for row in rows)
        self.superseded += rows

    def finish(self) -> None:
        """Nothing to send."""


@pytest.mark.parametrize("begins_again", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_a_tracker_has_the_rows_that_count_whenever_it_looks(seed: int, begins_again: bool, tmp_path: Path) -> None:
    draw = random.Random(seed)
    sink = Remembering(begins_again)
    feed = Feed(sink, tmp_path)
    feed.deliver()  # before the first row
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        step, value = 0, 0
        for attempt in range(1, 7):
            writer.row("event", event=draw.choice(["resume", "rollback"]), step=step, attempt=attempt)
            for _ in range(draw.randrange(8)):
                step, value = step + 1, value + 1
                writer.row("train", step=step, loss=float(value), attempt=attempt)
                if draw.random() < 0.3:
                    writer.row("eval", step=step, loss=float(value), attempt=attempt)
                if draw.random() < 0.3:
                    sink.fails_next = draw.random() < 0.3
                    deliver(feed)
                    assert sink.kept == live_rows(read_metrics(tmp_path / "metrics.jsonl"))
            step = draw.randrange(step + 1)
    deliver(feed)
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    counted = live_rows(rows)
    assert sink.kept == counted
    gone = [row for row in rows if row not in counted]
    assert sorted(row["loss"] for row in sink.superseded) == sorted(row["loss"] for row in gone)


def deliver(feed: Feed) -> None:
    try:
        feed.deliver()
    except ConnectionError:
        feed.deliver()


def test_the_state_says_how_a_run_ends(tmp_path: Path) -> None:
    sink = Remembering(True)
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.row("event", event="start", step=0, attempt=1)
        Feed(sink, tmp_path).deliver()
        assert sink.state.status == RUNNING
        Feed(sink, tmp_path).deliver(parent_ended=True)
        assert sink.state.status == FAILED
        writer.row("event", event="resume", step=0, attempt=2)
        writer.row("event", event="signal", step=0)
        Feed(sink, tmp_path).deliver(parent_ended=True)
        assert sink.state.status == KILLED
        writer.row("event", event="end", step=0, status="finished", exit_code=0)
        feed = Feed(sink, tmp_path)
        feed.deliver()
    assert (sink.state.status, feed.run_has_ended) == (FINISHED, True)


def test_the_questions_of_each_file_are_series_of_their_own() -> None:
    numbers = {"accuracy": 0.5, "byte_accuracy": 0.25, "accuracy_error": None, "chance": 0.5}
    row = {
        "kind": "task",
        "time": 1.0,
        "step": 4,
        "tokens": 9,
        "task": "quiz",
        "questions": 8,
        "whole": True,
        **numbers,
    }
    expected = {f"task/quiz/{name}": value for name, value in numbers.items() if value is not None}
    assert {one.key: one.value for one in metrics_of(row)} == expected
    assert AppendSink.numbers_of(row).items() >= expected.items()
