"""What torch's OpenMP says of itself in the process that trains: how long its threads wait awake."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import finish, pretrain

pytestmark = pytest.mark.e2e

SAYS = {"OMP_DISPLAY_ENV": "verbose"}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY = 'PASSIVE'"),
    ],
    ids=["unstated", "stated", "policy"],
)
def test_how_long_threads_wait(tmp_path: Path, environment: dict[str, str], line: str) -> None:
    refused = finish(tmp_path, pretrain("no.such=key"), environment=SAYS | environment)
    assert refused.code == 2, refused.explain()
    assert line in refused.stderr, refused.explain()
