"""The command over tensor and context groups is the run of one process, which goes on where they stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, losses, pretrain, rows, run_folder

pytestmark = pytest.mark.e2e

HALF, STEPS = 4, 8
WORDS = ("schedule.kind=constant", "run.name=mine", "model.style=gpt2")
GROUP = (
    "parallel.tensor=2",
    "parallel.sequence=true",
    "parallel.overlap_tensor_communication=true",
    "parallel.context=2",
)


def _train(folder: Path, data: SmallData, steps: int, *words: str, ranks: int) -> Path:
    folder.mkdir(exist_ok=True)
    command = pretrain(*data.changed("train.rehearse=true", *WORDS), f"train.steps={steps}", *words, ranks=ranks)
    finished = finish(folder, command)
    assert finished.code == 0, finished.explain()
    return folder


def test_one_process_goes_on_where_a_group_stopped(small_data: SmallData, tmp_path: Path) -> None:
    alone = _train(tmp_path / "alone", small_data, STEPS, ranks=1)
    group = _train(tmp_path / "group", small_data, HALF, *GROUP, ranks=4)
    assert list((run_folder(group) / "samples").iterdir())
    assert len(_validations(group)) == 1
    _train(group, small_data, STEPS, "--resume", "auto", ranks=1)
    np.testing.assert_allclose(list(losses(group).values()), list(losses(alone).values()), rtol=1e-5)
    np.testing.assert_allclose(_validations(group)[-1], _validations(alone)[-1], rtol=1e-5)


def _validations(folder: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["bits_per_byte"]) for row in rows(folder) if row["kind"] == "eval"]
