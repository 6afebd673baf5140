"""The command over tensor and context groups is the run of one process; other ranks go on as a pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, losses, pretrain, rows, run_folder, write_json
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

HALF, STEPS = 4, 8
WORDS = ("schedule.kind=constant", "run.name=mine", "model.style=gpt2")
GROUP = (
    "parallel.tensor=2",
    "parallel.sequence=true",
    "parallel.overlap_tensor_communication=true",
    "parallel.context=2",
)


def _train(folder: Path, data: SmallData, steps: int, *words: str, ranks: int, stage: int = 2) -> Finished:
    folder.mkdir(exist_ok=True)
    json_file = write_json(folder / "ds.json", zero_optimization={"stage": stage})
    own = (*data.changed("train.rehearse=true", *WORDS), f"train.steps={steps}")
    command = pretrain(*own, *words, ranks=ranks, json_file=json_file)
    finished = finish(folder, command)
    assert finished.code == 0, finished.explain()
    return finished


def test_half_the_ranks_go_on_as_a_pipeline(small_data: SmallData, tmp_path: Path) -> None:
    """The groups and what belongs to them give way to what is said now."""
    alone, group = tmp_path / "alone", tmp_path / "group"
    _train(alone, small_data, STEPS, ranks=1)
    _train(group, small_data, HALF, *GROUP, ranks=4)
    assert list((run_folder(group) / "samples").iterdir())
    assert len(_validations(group)) == 1
    resumed = ("parallel.pipeline=2", "--resume", "auto")
    plan = _train(group, small_data, STEPS, *resumed, "--dry-run", "--world-size", "2", ranks=1, stage=1)
    told = _train(group, small_data, STEPS, *resumed, ranks=2, stage=1)
    for finished in (plan, told):
        (line,) = (line for line in finished.stdout.splitlines() if " grid was " in line)
        assert_names(line, "tensor 2", "context 2", "pipeline 2", "ZeRO 1")
    np.testing.assert_allclose(list(losses(group).values()), list(losses(alone).values()), rtol=1e-5)
    np.testing.assert_allclose(_validations(group)[-1], _validations(alone)[-1], rtol=1e-5)


def _validations(folder: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["bits_per_byte"]) for row in rows(folder) if row["kind"] == "eval"]
