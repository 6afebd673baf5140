"""Differences between runs are seen, and lost or doubled parts of a state too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megalm.checkpoint.shard_spec import FragmentKey
from megalm.errors import TrainingError
from megalm.parity.parity_report import Line, ParityReport
from megalm.parity.state_comparison import Trace, differing, relative, state_difference, whole_state

WHOLE = np.arange(1, 9, dtype=np.float32)


def part(start: int, stop: int, values: np.ndarray = WHOLE) -> Trace:
    return Trace([], [], [(FragmentKey("w", "master", (2, 4), start, stop), values[start:stop].copy())])


def test_a_state_is_put_together_from_its_parts() -> None:
    state = whole_state([part(0, 3), part(3, 8)])
    np.testing.assert_array_equal(state["w", "master"], WHOLE)


def test_columns_of_a_matrix_have_their_place() -> None:
    key = FragmentKey("w", "master", (2, 4), 0, 4, ((0, 2), (2, 4)))
    left = FragmentKey("w", "master", (2, 4), 0, 4, ((0, 2), (0, 2)))
    columns = [Trace([], [], [(key, np.float32([3, 4, 7, 8]))]), Trace([], [], [(left, np.float32([1, 2, 5, 6]))])]
    np.testing.assert_array_equal(whole_state(columns)["w", "master"], WHOLE)


@pytest.mark.parametrize("parts", [[(0, 3), (4, 8)], [(0, 4), (3, 8)]])
def test_a_lost_or_doubled_part_is_an_error(parts: list[tuple[int, int]]) -> None:
    with pytest.raises(TrainingError, match="master"):
        whole_state([part(*each) for each in parts])


def test_other_parameters_are_an_error() -> None:
    with pytest.raises(TrainingError, match="other"):
        differing({("w", "master"): WHOLE}, {("other", "master"): WHOLE})


def test_differences() -> None:
    changed = WHOLE.copy()
    changed[2] += 0.5
    state, other = whole_state([part(0, 8)]), whole_state([part(0, 8, changed)])
    assert differing(state, state) == 0
    assert differing(other, state) == 1
    assert state_difference(other, state, "master") == pytest.approx(0.5 / np.linalg.norm(WHOLE))
    assert relative([2.0, 3.3], [2.0, 3.0]) == pytest.approx(0.1)


def test_nan_is_never_equal() -> None:
    assert not Line("losses", "one rank", math.nan, 1e-5).equal
    assert Line("losses", "one rank", 1e-6, 1e-5).equal
    broken = WHOLE.copy()
    broken[0] = math.nan
    assert math.isnan(state_difference({("w", "master"): broken}, {("w", "master"): WHOLE}, "master"))


def test_nothing_compared_is_not_equal() -> None:
    assert not ParityReport().equal
    assert not ParityReport((Line("losses", "one rank", 0, 0),), failure="rank 1 ends").equal
    assert ParityReport((Line("losses", "one rank", 0, 0),)).equal
