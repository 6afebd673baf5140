"""A pipeline as people start it, with the shipped JSON; and on another layout again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.runs.metrics_log import live_rows
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, job, losses, own_lines, pretrain, rows, run_folder, write_json

pytestmark = pytest.mark.e2e

SAVES = "checkpoint.interval_steps=3"
PIPELINE = ("parallel.pipeline=2", "data.document_mask=true")


def test_two_stages_train(small_data: SmallData, tmp_path: Path) -> None:
    own = ("parallel.balance=time", "train.steps=4", "checkpoint.interval_steps=2", "train.rehearse=true")
    words = small_data.changed(*PIPELINE, *own)
    finished = finish(tmp_path, pretrain(*words, ranks=2, json_file="pipeline.json"))
    assert finished.code == 0, finished.explain()
    assert finished.left == []
    assert own_lines(finished.stderr) == [], finished.explain()
    (stages,) = (line for line in finished.stdout.splitlines() if "stages of 1 + 1" in line)
    assert "2 stages" in stages
    assert "20%" in next(line for line in finished.stdout.splitlines() if "bubble" in line)
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    folder = run_folder(tmp_path)
    assert (folder / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert list((folder / "samples").iterdir())
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "eval"] == [4]


def test_one_rank_goes_on_where_a_pipeline_stopped(small_data: SmallData, tmp_path: Path) -> None:
    json_file = write_json(tmp_path / "fp32.json", "pipeline.json", bf16=None, train_micro_batch_size_per_gpu=4)
    question = {"context": "def ", "choices": ["read(self)", "%#%#"], "answer": 0}
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps({**question, "context": text}) + "\n" for text in "abc"))
    asks = (f"evaluate.tasks=[{tmp_path}/quiz.jsonl]", "evaluate.tasks_interval_steps=2")
    own = ("data.document_mask=true", "model.dropout=0.1", "run.name=run", "train.steps=6", SAVES)
    words = small_data.changed("model.num_hidden_layers=4", *own, *asks)
    (alone := tmp_path / "alone").mkdir()
    (moved := tmp_path / "moved").mkdir()
    finished = finish(alone, pretrain(*words, json_file=json_file))
    assert finished.code == 0, finished.explain()
    stages = ("parallel.pipeline=2", "parallel.virtual_stages=2")
    finished = finish(moved, pretrain(*words, *stages, ranks=2, json_file=json_file))
    assert finished.code == 0, finished.explain()
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)
    assert_same_answers(moved, alone)
    finished = finish(moved, pretrain(*words, "--resume", "3", json_file=json_file))
    assert finished.code == 0, finished.explain()
    assert next(row["step"] for row in rows(moved) if row.get("event") == "resume") == 3
    (note,) = (line for line in finished.stdout.splitlines() if "parallel.pipeline" in line)
    assert ("2" in note, "1" in note) == (True, True), "two stages have no room on one rank"
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)
    assert_same_answers(moved, alone)


def assert_same_answers(moved: Path, alone: Path) -> None:
    """At steps 2, 4 and 6, each once, whatever was withdrawn by a resume."""
    found, expected = ([row for row in live_rows(rows(folder)) if row["kind"] == "task"] for folder in (moved, alone))
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [2, 4, 6]
    assert [row["accuracy"] for row in found] == [row["accuracy"] for row in expected]
    bits = [[row["answer_bits_per_byte"] for row in each] for each in (found, expected)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


def test_a_killed_stage_ends_the_job(small_data: SmallData, tmp_path: Path) -> None:
    """The first stage waits for a message that never comes."""
    words = small_data.changed(*PIPELINE, "train.steps=100000")
    with job(tmp_path, pretrain(*words, ranks=2, json_file="pipeline.json")) as started:
        started.wait_for_step(3)
        started.rank(1).kill()
        finished = started.wait(120.0)
    assert finished.code != 0, finished.explain()
    assert finished.left == []
    assert finished.stderr.count("Traceback") <= 1, finished.explain()
