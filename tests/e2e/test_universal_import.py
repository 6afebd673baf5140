"""A run of plain DeepSpeed is taken over by the commands, and its losses go on as DeepSpeed's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.config.loading import load_run_config
from megalm.planning.batch_size import TrainingStages
from megalm.runs.metrics_log import read_metrics
from megalm.train.datasets import find_data, open_datasets
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, megalm, own_lines, pretrain
from tests.messages import assert_names
from tests.ranks import run_ranks
from tests.universal_checkpoints import STEPS, train_and_save, train_further, write_config

pytest.importorskip("transformers")
pytestmark = pytest.mark.e2e


def test_training_continues_as_deepspeed_does(small_data: SmallData, tmp_path: Path) -> None:
    config = write_config(tmp_path / "hf", small_data.vocabulary)
    run_ranks(1, train_and_save, config, {tmp_path / "theirs": (2, "fp32")}, True)
    words = ("theirs", "runs/base", "--config", "hf", "--tokenizer", small_data.tokenizer)
    imported = finish(tmp_path, megalm("import", *words))
    assert imported.code == 0, imported.explain()
    (line,) = (line for line in imported.stdout.splitlines() if "launch/pretrain.py" in line)
    told = line.split("launch/pretrain.py ", 1)[1].split()
    assert told[-1] == "schedule.peak_learning_rate=0.001"
    told[told.index(f"train.steps={STEPS + 1000}")] = f"train.steps={STEPS + 2}"
    told[told.index("data.train=data/mine")] = f"data.train={small_data.prefix}"
    rates = ("schedule.kind=constant", "schedule.warmup_steps=0")
    for name in ("mine", "base"):
        told[[word.startswith("run.name=") for word in told].index(True)] = f"run.name={name}"
        finished = finish(tmp_path, pretrain(*told, *rates, "evaluate.interval_steps=null", "tracking.mlflow=false"))
        assert finished.code == (0 if name == "mine" else 2), finished.explain()
    assert_names(own_lines(finished.stderr)[-1], "runs/base/checkpoints/step-00000003")
    steps = [row for row in read_metrics(tmp_path / "runs/mine/metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [STEPS + 1, STEPS + 2]
    theirs = run_ranks(1, train_further, config, tmp_path / "theirs", _batches(tmp_path / "runs/mine", 2))[0]
    np.testing.assert_allclose([row["loss"] for row in steps], theirs, rtol=1e-5)
    assert theirs[0] != theirs[1]
    again = finish(tmp_path, pretrain("run.name=mine", "--resume", "auto", f"train.steps={STEPS + 3}"))
    assert again.code == 0, again.explain()
    (*_, last) = (row for row in read_metrics(tmp_path / "runs/mine/metrics.jsonl") if row["kind"] == "train")
    assert last["step"] == STEPS + 3


def _batches(run: Path, steps: int) -> list[tuple[Any, Any]]:
    """Tokens and labels of the run's first steps, from the first sample on."""
    config = load_run_config(str(run / "config.yaml"), []).config
    size = json.loads((run / "deepspeed.resolved.json").read_text())["train_batch_size"]
    data = open_datasets(config, TrainingStages.of(config, size), find_data(config.data, lambda line: None))
    samples = [data.train.sample(index) for index in range(steps * size)]
    return [
        tuple(np.stack(part).astype(np.int64) for part in zip(*samples[start : start + size], strict=True))  # type: ignore[misc]
        for start in range(0, steps * size, size)
    ]
