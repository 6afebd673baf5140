"""A pipeline as people start it: by DeepSpeed's launcher, with the shipped JSON; and on another layout again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, job, losses, own_lines, pretrain, rows, run_folder, write_json

pytestmark = pytest.mark.e2e

SAVES = "checkpoint.interval_steps=3"
PIPELINE = ("parallel.pipeline=2", "data.document_mask=true")


def _words(data: SmallData, *own: str) -> list[str]:
    """The small job's words with these in place of its own."""
    replaced = {word.partition("=")[0] for word in own}
    return [*(word for word in data.words if word.partition("=")[0] not in replaced), *own]


def test_the_launcher_trains_a_pipeline(small_data: SmallData, tmp_path: Path) -> None:
    words = _words(small_data, *PIPELINE, "parallel.balance=time", "train.steps=4", "checkpoint.interval_steps=2")
    finished = finish(tmp_path, pretrain(*words, using="deepspeed", ranks=2, json_file="pipeline.json"), 240.0)
    assert finished.code == 0, finished.explain()
    assert finished.left == []
    assert own_lines(finished.stderr) == [], finished.explain()
    assert "pipeline: 2 stages of 1 + 1 blocks" in finished.stdout
    assert "bubble: each stage waits 20% of a step" in finished.stdout
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    folder = run_folder(tmp_path)
    assert (folder / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert list((folder / "samples").iterdir())
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "eval"] == [4]


def test_one_rank_goes_on_where_a_pipeline_stopped(small_data: SmallData, tmp_path: Path) -> None:
    json_file = write_json(tmp_path / "fp32.json", "pipeline.json", bf16=None, train_micro_batch_size_per_gpu=4)
    words = _words(small_data, "data.document_mask=true", "model.dropout=0.1", "run.name=run", "train.steps=6", SAVES)
    (alone := tmp_path / "alone").mkdir()
    (moved := tmp_path / "moved").mkdir()
    finished = finish(alone, pretrain(*words, json_file=json_file))
    assert finished.code == 0, finished.explain()
    finished = finish(
        moved, pretrain(*words, "parallel.pipeline=2", using="torchrun", ranks=2, json_file=json_file), 240.0
    )
    assert finished.code == 0, finished.explain()
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)
    finished = finish(moved, pretrain(*words, "--resume", "3", json_file=json_file))
    assert finished.code == 0, finished.explain()
    assert "resumed at step 3" in finished.stdout
    assert "parallel.pipeline was 2, is 1 (default)" in finished.stdout, "two stages have no room on one rank"
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)


def test_a_killed_stage_ends_the_job(small_data: SmallData, tmp_path: Path) -> None:
    """The first stage waits for a message that never comes."""
    words = _words(small_data, *PIPELINE, "train.steps=100000")
    with job(tmp_path, pretrain(*words, using="deepspeed", ranks=2, json_file="pipeline.json")) as started:
        started.wait_for_step(3)
        started.rank(1).kill()
        finished = started.wait(60.0)
    assert finished.code != 0, finished.explain()
    assert finished.left == []
    assert finished.stderr.count("Traceback") <= 1, finished.explain()
