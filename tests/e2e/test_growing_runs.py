"""A run whose batch grows, by the command: what it reads, counts, saves, and how it resumes around a boundary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, losses, pretrain, train_rows
from tests.e2e.test_data_runs import pieces

pytestmark = pytest.mark.e2e

GROWS = ("train.steps=5", "checkpoint.interval_steps=1", "schedule.batch=[{from_step: 3, sequences: 24}]")


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/mine/checkpoints/step-00000005/manifest.json").read_text())
    return found


def test_a_batch_grows(small_data: SmallData, tmp_path: Path) -> None:
    words, whole = small_data.changed("run.name=mine", *GROWS), tmp_path / "whole"
    whole.mkdir()
    done = finish(whole, pretrain(*words))
    assert done.code == 0, done.explain()
    assert "24 sequences" in done.stdout
    seen = [(row["step"], row["samples"], row["tokens"]) for row in train_rows(whole)]
    assert seen == [(step, samples, 64 * samples) for step, samples in enumerate((16, 32, 56, 80, 104), 1)]
    segments = _manifest(whole)["data_position"]["segments"]
    assert [(it["global_batch"], it["first_sample"], it["samples_consumed"]) for it in segments] == [
        (16, 0, 32),
        (24, 32, 72),
    ]
    assert sorted({sample for sample, *_ in pieces(whole, 4)}) == list(range(56, 80))
    for step, ranks in ((1, 2), (2, 1), (3, 1)):  # before, at and after the boundary
        (folder := tmp_path / f"from-{step}").mkdir()
        checkpoint = whole / f"runs/mine/checkpoints/step-{step:08d}"
        resumed = finish(folder, pretrain(*words, "--resume", str(checkpoint), ranks=ranks))
        assert resumed.code == 0, resumed.explain()
        expected = {at: loss for at, loss in losses(whole).items() if at > step}
        assert losses(folder) == pytest.approx(expected, rel=1e-5)
        now, then = _manifest(folder), _manifest(whole)
        assert [now[key] for key in ("data_position", "tokens")] == [then[key] for key in ("data_position", "tokens")]
        assert (now["files"] == then["files"]) == (ranks == 1), "bit for bit on the same layout"
