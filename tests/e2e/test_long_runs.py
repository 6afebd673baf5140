"""Runs whose metrics.jsonl is long: they are read at the same time, with the numbers of one after the other."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.e2e.jobs import finish, megalm
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

STEPS = 120_000  # more than the 20 MB from which a file counts as long


@pytest.mark.slow
def test_long_runs_are_compared(tmp_path: Path) -> None:
    for name, loss in (("a", 3.0), ("b", 2.5)):
        (folder := tmp_path / "runs" / name).mkdir(parents=True)
        (folder / "config.yaml").write_text("train:\n  seed: 1\n")
        numbers = {"loss": loss, "lr": 1e-3, "grad_norm": 0.5, "step_seconds": 0.25, "tokens_per_second": 256.0}
        lines = (
            orjson.dumps({"kind": "train", "time": 1e9 + step / 4, "step": step, "tokens": 64 * step, **numbers})
            for step in range(1, STEPS + 1)
        )
        (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    finished = finish(tmp_path, megalm("compare", "a", "b"))
    assert finished.code == 0, finished.explain()
    assert_names(finished.stdout, STEPS, 64 * STEPS, "3.0000", "2.5000")
    (tmp_path / "runs" / "b" / "metrics.jsonl").open("a").write("{}\n")
    finished = finish(tmp_path, megalm("compare", "a", "b"))
    assert finished.code == 2, finished.explain()
    assert_names(finished.stderr, "runs/b/metrics.jsonl")
