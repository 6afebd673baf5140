"""What torch's OpenMP says of itself in the process that trains: how long its threads wait awake."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.jobs import job, pretrain

pytestmark = pytest.mark.e2e

SAYS = {"OMP_DISPLAY_ENV": "verbose"}
# What the environment states, and what is in force.
CASES: list[tuple[dict[str, str], str]] = [
    ({}, "GOMP_SPINCOUNT = '10000'"),
    ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
    ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY = 'PASSIVE'"),
]


def test_how_long_threads_wait(tmp_path: Path) -> None:
    command = pretrain("no.such=key", using="python")
    with ExitStack() as stack:
        started = [stack.enter_context(job(tmp_path, command, SAYS | environment)) for environment, _ in CASES]
        for refused, (_, line) in zip([each.wait() for each in started], CASES, strict=True):
            assert refused.code == 2, refused.explain()
            assert line in refused.stderr, refused.explain()
