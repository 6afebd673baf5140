"""Curves for a page: thinned without losing a peak, scaled to round numbers, short labels."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import event, history_of, train_row, validation

from megalm.tracking.report.curves import charts
from megalm.tracking.report.svg_chart import Scale, label, path, running_median, thinned
from tests.messages import assert_names

VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=200)


@given(VALUES, st.integers(1, 50))
@settings(max_examples=300)
def test_a_thinned_curve_keeps_the_peaks_the_gaps_and_its_size(values: list[float], buckets: int) -> None:
    x, y = np.arange(len(values), dtype=np.float64), np.array(values)
    stretches, not_finite = thinned(x, y, Scale(0.0, float(len(values) - 1)), buckets)
    points = [point for stretch in stretches for point in stretch]
    known = y[np.isfinite(y)]
    assert set(points) <= set(zip(x.tolist(), values, strict=True))  # nothing is made up
    assert [at for at, _ in points] == sorted({at for at, _ in points})
    if len(known):
        heights = [height for _, height in points]
        assert (min(heights), max(heights)) == (known.min(), known.max())
    assert len(points) <= 12 * buckets
    for stretch in stretches:  # no line across a bucket of which nothing is known, nor from before a gap to after
        for (left, _), (right, _) in itertools.pairwise(stretch):
            between = y[int(left) : int(right) + 1]
            width = max(1.0, (len(values) - 1) / buckets)
            assert np.isfinite(between).all() or right - left <= width
    assert bool(not_finite) == (len(known) < len(y))


def test_each_bucket_keeps_its_own_highest_and_lowest() -> None:
    y = np.zeros(10_000)
    y[[1234, 5678]] = 9.0, -9.0
    (points,), _ = thinned(np.arange(10_000.0), y, Scale(0.0, 9_999.0), 100)
    assert (1234.0, 9.0) in points
    assert (5678.0, -9.0) in points
    assert len(points) <= 400


def test_a_curve_without_values_is_none() -> None:
    assert thinned(np.empty(0), np.empty(0), Scale(0.0, 1.0), 10) == ([], [])


def test_the_running_median_follows_the_curve_and_no_spike() -> None:
    x = np.arange(1000.0)
    y = 10.0 - x / 200
    y[500], y[700] = 1e6, math.nan
    at, medians = running_median(x, y, 100)
    assert len(at) == 100
    assert np.abs(medians - (10.0 - at / 200)).max() < 0.05
    assert len(running_median(x[:5], y[:5], 100)[0]) == 0  # of five values a median says nothing


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 100.0, ["0", "20", "40", "60", "80", "100"]),
        (2.31, 2.46, ["2.35", "2.40", "2.45"]),
        (0.0, 3e-4, ["0", "1e-4", "2e-4", "3e-4"]),
        (9e-4, 1.1e-3, ["9e-4", "9.5e-4", "1e-3", "1.05e-3", "1.1e-3"]),
        (0.0, 500_000.0, ["0", "100k", "200k", "300k", "400k", "500k"]),
        (-1.0, 1.0, ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        (655_100.0, 655_900.0, ["655.2k", "655.4k", "655.6k", "655.8k"]),
    ],
)
def test_ticks_are_round_numbers_with_the_digits_they_differ_in(low: float, high: float, expected: list[str]) -> None:
    assert [text for _, text in Scale(low, high).ticks()] == expected


def test_the_last_step_has_its_tick() -> None:
    assert [text for _, text in Scale(0.0, 1234.0).ticks_to_end(whole=True)] == ["0", "500", "1.0k", "1,234"]
    assert [text for _, text in Scale(0.0, 1000.0).ticks_to_end(whole=True)][-2:] == ["800", "1.0k"]
    assert [text for _, text in Scale(0.0, 1.0).ticks_to_end(whole=True)] == ["0", "1"]
    assert Scale(0.0, 4.1e6).ticks_to_end()[-1] == (4.1e6, "4.1M")


def test_ticks_of_a_logarithmic_scale() -> None:
    assert [text for _, text in Scale(0.3, 4.0, True).ticks()] == ["0.5", "1", "2"]
    assert [text for _, text in Scale(0.9, 1.3, True).ticks()] == ["0.9", "1.0", "1.1", "1.2", "1.3"]
    assert [text for _, text in Scale(1e-3, 1e9, True).ticks()] == ["1e-3", "1", "1k", "1M", "1B"]


@given(st.floats(1e-9, 1e15), st.floats(0, 1e15))
def test_any_values_have_a_scale(low: float, more: float) -> None:
    for scale in (Scale.around(low, low + more), Scale.around(-low, more), Scale.around(low, low + more, True)):
        assert 0.0 <= scale.share(low) <= 1.0
        assert len(scale.ticks()) < 30


def test_short_numbers() -> None:
    values = (0.0, 3e-4, 2.5e-5, 0.02, 1.5, 999.0, 1500.0, 262144e6)
    assert [label(value) for value in values] == ["0", "3e-4", "2.5e-5", "0.02", "1.5", "999", "1.5k", "262B"]
    assert label(2.0, 0.5) == "2.0"


def test_a_lone_point_is_a_dot_and_what_is_outside_stays_at_the_edge() -> None:
    across, up = Scale(0.0, 10.0), Scale(0.0, 1.0)
    assert path([[(5.0, 0.5)], [(0.0, 0.0), (10.0, 9.0)]], across, up) == "M500.0 500.0h0M0.0 1000.0L1000.0 0.0"


def test_only_what_was_recorded_has_a_chart() -> None:
    plain = history_of([train_row(step, 3.0) for step in range(1, 20)])
    assert [chart.name for chart in charts(plain)] == ["Loss", "Learning rate", "Gradient norm", "Speed", "MFU"]
    scaled = [train_row(step, 3.0, loss_scale=2.0**step, memory_bytes=2**30) for step in range(1, 20)]
    assert [chart.name for chart in charts(history_of(scaled))][-2:] == ["Memory", "Loss scale"]
    assert charts(history_of([])) == []
    assert [chart.name for chart in charts(history_of([validation(5, 3.0)]))] == ["Loss"]


@pytest.mark.parametrize("steps", [4, 40])
def test_losses_by_dataset_are_lines_of_their_own_chart(steps: int) -> None:
    names = [f"d{number}" for number in range(7)]
    mixed = [
        train_row(step, 3.0, **{f"loss_of_{name}": number + 1 / step for number, name in enumerate(names)})
        for step in range(1, steps + 1)
    ]
    (chart,) = (chart for chart in charts(history_of(mixed)) if chart.name == "Loss by dataset")
    assert len(chart.lines) == len(chart.legend) == 5
    assert_names(chart.legend[1][1], "d1")
    assert_names(chart.notes[0], 2, "metrics.jsonl")
    plain = charts(history_of([train_row(step, 3.0) for step in range(1, steps + 1)]))
    assert "Loss by dataset" not in [chart.name for chart in plain]


def test_answers_are_lines_of_their_own_chart() -> None:
    """A part of the questions and all of them are not on one line."""
    asked = [
        {"kind": "task", "step": step, "task": task, "questions": count, "accuracy": share, "chance": 0.25}
        for step, task, count, share in (
            (9, "quiz", 5, 0.2),
            (20, "quiz", 5, 0.4),
            (30, "quiz", 9, 0.5),
            (30, "b", 9, 0.3),
        )
    ]
    (chart,) = (one for one in charts(history_of([train_row(30, 2.0), *asked])) if one.name == "Accuracy")
    assert [name for _, name in chart.legend] == ["quiz, chance 25.0%", "b, chance 25.0%"]
    assert [line.path.count("L") for line in chart.lines if line.look == "set-0" and "L" in line.path] == [1]
    assert not any(one.name == "Accuracy" for one in charts(history_of([train_row(30, 2.0)])))


def test_a_validation_set_of_another_level_is_in_the_frame() -> None:
    rows = [train_row(step, 3.0 + step % 2 / 10) for step in range(1, 200)]
    (loss, *_) = charts(history_of([*rows, validation(199, 8.0, dataset="hard"), validation(199, 3.1)]))
    (hard,) = [line.path for line in loss.lines if line.look == "set-1 dots"]
    height = float(re.findall(r" ([\d.]+)h0", hard)[0])
    assert 0 < height < 500


def test_many_marks_at_one_place_are_one() -> None:
    skips = [event("skip", 10 + index % 2, reason="gradient overflow") for index in range(500)]
    (loss, *_) = charts(history_of([*(train_row(step, 3.0) for step in range(1, 10_001)), *skips]))
    (mark,) = loss.marks
    assert mark.look == "skip"
    assert_names(mark.title, 10, 499)


def test_a_step_that_was_refused_is_marked_after_the_last_that_counts() -> None:
    spike = event("spike", 19, at_step=20, decided="stop")
    (loss, *_) = charts(history_of([*(train_row(step, 3.0) for step in range(1, 20)), spike]))
    (mark,) = loss.marks
    assert mark.left == 100.0
    assert_names(mark.title, 20, "spike")
    assert " 1000.0 " not in loss.lines[0].path  # step 19 is before it


def test_tokens_are_reported_under_the_steps() -> None:
    (loss, *_) = charts(history_of([train_row(step, 3.0) for step in range(1, 101)]))
    assert loss.x_ticks[1:3] == [(20.0, "20", "1.28k"), (40.0, "40", "2.56k")]
    assert loss.x_ticks[0] == (0.0, "0", "")


@pytest.mark.parametrize(
    ("last", "labels"),
    [
        (1, ["0", "1"]),
        (2500, ["0", "500", "1.0k", "1.5k", "2.0k", "2.5k"]),
        (500_000, ["0", "100k", "200k", "300k", "400k", "500k"]),
    ],
)
def test_steps_are_reported_in_as_many_digits_as_they_differ_in(last: int, labels: list[str]) -> None:
    (loss, *_) = charts(history_of([train_row(last, 3.0)]))
    assert [text for _, text, _ in loss.x_ticks] == labels


def test_a_step_alone_is_a_dot_that_can_be_seen() -> None:
    for chart in charts(history_of([train_row(1, 3.0)])):
        assert [line.look for line in chart.lines if line.look.endswith("dots")], chart.name
    pair = [train_row(1, 3.0), train_row(2, 2.9)]
    assert not [line for chart in charts(history_of(pair)) for line in chart.lines if "dots" in line.look]
    torn = [train_row(1, 3.0), train_row(2, 2.9), train_row(3, math.nan), train_row(4, 2.8), train_row(5, math.nan)]
    (loss, *_) = charts(history_of(torn))
    (dot,) = [line.path for line in loss.lines if line.look == "steps dots"]
    assert dot.startswith("M800.0 ")
    assert dot.count("M") == 1


def test_validations_over_other_samples_are_not_on_one_line() -> None:
    rows = [train_row(1, 4.0), train_row(2, 3.0), validation(1, 4.0, targets=64), validation(2, 3.0, targets=640)]
    apart = charts(history_of(rows))[0]
    joined = charts(history_of([*rows[:2], *(row | {"targets": 64} for row in rows[2:])]))[0]
    lines = [[line.path for line in chart.lines if line.look == "validation"] for chart in (apart, joined)]
    assert [path.count("M") for (path,) in lines] == [2, 1]
