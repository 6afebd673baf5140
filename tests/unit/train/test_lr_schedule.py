"""Learning rates at the steps where they are easy to get wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.planning.lr_schedule import ScheduleFacts, learning_rate


def facts(kind: str, warmup: int = 10, steps: int = 110, decay: int = 20) -> ScheduleFacts:
    return ScheduleFacts(kind, 1.0, 0.1, warmup, decay, steps)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    assert [learning_rate(facts(kind), step) for step in (1, 5, 9)] == pytest.approx([0.1, 0.5, 0.9])
    assert learning_rate(facts(kind), 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [
        ("cosine", 0.55, 0.1),
        ("linear", 0.55, 0.1),
        ("constant", 1.0, 1.0),
        ("wsd", 1.0, 0.1),
        ("inverse_sqrt", (10 / 60) ** 0.5, (10 / 110) ** 0.5),
    ],
)
def test_middle_and_end(kind: str, middle: float, last: float) -> None:
    assert learning_rate(facts(kind), 60) == pytest.approx(middle)
    assert learning_rate(facts(kind), 110) == pytest.approx(last)
    assert learning_rate(facts(kind), 500) == learning_rate(facts(kind), 110)


def test_wsd_decays_over_its_last_steps_only() -> None:
    assert learning_rate(facts("wsd"), 90) == 1.0
    assert learning_rate(facts("wsd"), 100) == pytest.approx(0.55)


def test_a_logarithmic_warm_up_rises_from_its_first_rate() -> None:
    log = replace(facts("constant", warmup=100), warmup_kind="log", initial_learning_rate=0.2)
    rates = [learning_rate(log, step) for step in (1, 10, 100, 110)]
    assert rates == pytest.approx([0.2, 0.6, 1.0, 1.0])
    linear = replace(log, warmup_kind="linear")
    assert [learning_rate(linear, step) for step in (1, 50, 100)] == pytest.approx([0.208, 0.6, 1.0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_a_decay_may_end_before_or_after_the_run(kind: str) -> None:
    early = replace(facts(kind), decay_end_step=60)
    assert learning_rate(early, 40) == learning_rate(facts(kind, steps=60), 40)
    assert [learning_rate(early, step) for step in (60, 61, 110)] == pytest.approx([0.1] * 3)
    late = replace(facts(kind), decay_end_step=210)
    assert learning_rate(late, 110) == learning_rate(facts(kind, steps=210), 110) > 0.1


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(facts("cosine", warmup=0), 1) == pytest.approx(1.0, abs=1e-3)
    assert learning_rate(facts("inverse_sqrt", warmup=0), 1) == 1.0


@given(
    kind=st.sampled_from(["cosine", "linear", "wsd"]),
    warmup=st.integers(0, 50),
    extra=st.integers(1, 200),
    decay=st.integers(1, 300),
)
def test_never_above_the_peak_and_never_rising_after_it(kind: str, warmup: int, extra: int, decay: int) -> None:
    schedule = facts(kind, warmup, warmup + extra, decay)
    rates = [learning_rate(schedule, step) for step in range(1, schedule.steps + 1)]
    assert max(rates) <= 1.0
    after = rates[max(warmup - 1, 0) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert rates[-1] == pytest.approx(0.1)
