"""Runs whose batch and sequence length grow, by the command: what they read, count, save, and how they resume."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import ROOT, finish, losses, pretrain, train_rows

pytestmark = pytest.mark.e2e

GROWS = (
    *("train.steps=5", "checkpoint.interval_steps=1", "data.sequence_length=32"),
    "schedule.batch=[{from_step: 3, sequences: 24}]",
    "data.stages=[{from_step: 4, sequence_length: 64}]",
)


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/mine/checkpoints/step-00000005/manifest.json").read_text())
    return found


def _samples_read(folder: Path, step: int) -> list[int]:
    """As inspect_dataset.py says them."""
    command = [sys.executable, ROOT / "data_tools" / "inspect_dataset.py", "--run", "runs/mine", "--step", str(step)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    return sorted({int(number) for number in re.findall(r"^--- sample (\d+):", done.stdout, flags=re.MULTILINE)})


def test_a_run_that_grows(small_data: SmallData, tmp_path: Path) -> None:
    words, whole = small_data.changed("run.name=mine", "train.rehearse=true", *GROWS), tmp_path / "whole"
    whole.mkdir()
    done = finish(whole, pretrain(*words))
    assert done.code == 0, done.explain()
    assert all(text in done.stdout for text in ("from step 1: 16 seq", "from step 3: 24 seq", "from step 4: 24 seq"))
    seen = [(row["step"], row["samples"], row["tokens"]) for row in train_rows(whole)]
    assert seen == [(step, samples, 64 * samples) for step, samples in enumerate((8, 16, 28, 52, 76), 1)]
    segments = _manifest(whole)["data_position"]["segments"]
    assert [(it["sequence_length"], it["global_batch"], it["samples_consumed"]) for it in segments] == [
        (64, 8, 16),
        (64, 12, 12),
        (64, 24, 48),
    ]
    for step, first, end in ((2, 8, 16), (3, 16, 28), (5, 52, 76), (6, 76, 100)):
        assert _samples_read(whole, step) == list(range(first, end))
    for step, ranks in ((1, 2), (2, 1), (3, 1), (4, 1)):  # before, at and after the boundaries
        (folder := tmp_path / f"from-{step}").mkdir()
        checkpoint = whole / f"runs/mine/checkpoints/step-{step:08d}"
        resumed = finish(folder, pretrain(*words, "--resume", str(checkpoint), ranks=ranks))
        assert resumed.code == 0, resumed.explain()
        expected = {at: loss for at, loss in losses(whole).items() if at > step}
        assert losses(folder) == pytest.approx(expected, rel=1e-5)
        now, then = _manifest(folder), _manifest(whole)
        assert [now[key] for key in ("data_position", "tokens")] == [then[key] for key in ("data_position", "tokens")]
        assert (now["files"] == then["files"]) == (ranks == 1), "bit for bit on the same layout"
