"""The helper that looks for names in messages finds whole ones only."""

from __future__ import annotations

import pytest

from tests.messages import assert_names

TEXT = "/runs/a.yaml: train.steps=16 is not 'x y'; use --steps 7, 8 or 1,024 (4-6 of 2.50), then data.train."


@pytest.mark.parametrize(
    "name",
    ["train.steps", "train.steps=16", 16, "'x y'", "--steps", 7, 8, "1,024", 4, 6, "2.50", "a.yaml", "data.train"],
)
def test_whole_names_are_found(name: object) -> None:
    assert_names(TEXT, name)


@pytest.mark.parametrize("name", ["train", "step", "data", "train.steps=1", "Train.steps", 1, "024", 2, 50, "a", "yam"])
def test_parts_of_names_are_not(name: object) -> None:
    with pytest.raises(AssertionError):
        assert_names(TEXT, 16, name)
