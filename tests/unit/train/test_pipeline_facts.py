from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.deepspeed.json_reader import DS_CONFIGS_FOLDER, DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.cost_model.pipeline_balance import StageCosts
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.train.run_summary import pipeline_facts
from tests.messages import assert_names

CPU = DeviceFacts("cpu", True, 8 << 30)


def _run(json_name: str, *overrides: str) -> ResolvedRun:
    loaded = load_run_config(None, ["data.recipe=python-stdlib", *overrides])
    return resolve(loaded, read_deepspeed_json(str(Path(DS_CONFIGS_FOLDER) / json_name)), 2, CPU)


def test_stages_and_bubble_are_reported() -> None:
    text = pipeline_facts(_run("pipeline.json", "parallel.pipeline=2"), (3, 1), StageCosts(1, 2, 3))
    stages, bubble = text.splitlines()
    assert_names(stages, 2, "3 + 1", "58% + 42%", "parameters")
    assert_names(bubble, "20%", 4)


def test_a_large_bubble_is_a_warning_with_advice(tmp_path: Path) -> None:
    source = (Path(DS_CONFIGS_FOLDER) / "pipeline.json").read_text()
    path = tmp_path / "large.json"
    path.write_text(source.replace('"train_micro_batch_size_per_gpu": "auto"', '"train_micro_batch_size_per_gpu": 8'))
    loaded = load_run_config(None, ["data.recipe=python-stdlib", "parallel.pipeline=2", "parallel.balance=time"])
    text = pipeline_facts(resolve(loaded, read_deepspeed_json(str(path)), 2, CPU), (2, 2), StageCosts(1, 2, 3))
    stages, _, warning = text.splitlines()
    assert "parameters" not in stages, "it is the measured time that is shared out"
    assert_names(warning, "WARNING", 2, "67%", 9, "90%", "train_micro_batch_size_per_gpu", "train_batch_size")


@pytest.mark.parametrize(("pipeline", "micro_batch"), [(1, 8), (2, 4)])
def test_auto_leaves_a_pipeline_enough_micro_batches(pipeline: int, micro_batch: int) -> None:
    run = _run("zero1.json", f"parallel.pipeline={pipeline}")
    assert run.batch.micro_batch == micro_batch
    assert any("20%" in notice for notice in run.notices) == (pipeline > 1)
