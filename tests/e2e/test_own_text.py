"""From one's own text to a model: the three commands of the README, and what comes after them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from megalm.runs.metrics_log import read_metrics
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import ROOT, SMALL, Finished, finish, megalm, own_lines, pretrain, rows, train_rows

pytestmark = pytest.mark.e2e

STEPS = 30
VOCABULARY = 500
OWN = ("data.train=data/my", "data.tokenizer=data/my.model", "data.split=90,10", "run.name=mine")
WORDS = (
    *OWN,
    *(word for word in SMALL if not word.startswith(("tracking.mlflow", "sample.", "evaluate.", "train."))),
    *(f"train.steps={STEPS}", "evaluate.interval_steps=10"),
)


@dataclass(frozen=True)
class Trained:
    folder: Path
    tokenizer: Finished
    dataset: Finished
    training: Finished


@pytest.fixture(scope="module")
def trained(small_data: SmallData, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("own")
    lines = (json.dumps({"text": document.text}) + "\n" for document in small_data.documents)
    (folder / "my.jsonl").write_text("".join(lines))

    def tool(name: str, *words: str) -> Finished:
        finished = finish(folder, [sys.executable, ROOT / "data_tools" / f"{name}.py", "--input", "my.jsonl", *words])
        assert finished.code == 0, finished.explain()
        return finished

    tokenizer = tool("train_tokenizer", "--output", "data/my.model", "--vocab-size", str(VOCABULARY))
    dataset = tool("build_dataset", "--tokenizer", "data/my.model", "--output-prefix", "data/my")
    # The tables of a new store take seconds of a process that yields to all others: minutes on a busy machine.
    (folder / "runs").mkdir()
    shutil.copy(empty_store, folder / "runs" / "mlflow.db")
    # On a busy machine MLflow gets the last rows from a process that outlives the run.
    training = finish(folder, pretrain(*WORDS, using="deepspeed"), patience_seconds=150)
    assert training.code == 0, training.explain()
    assert training.left == []
    return Trained(folder, tokenizer, dataset, training)


def shown(trained: Trained, *words: object) -> str:
    done = finish(trained.folder, megalm(*words))
    assert (done.code, done.stderr) == (0, ""), done.explain()
    return done.stdout


def test_the_tools_say_what_they_made(small_data: SmallData, trained: Trained) -> None:
    assert str(VOCABULARY) in trained.tokenizer.stdout
    assert f"{len(small_data.documents)} documents" in trained.dataset.stdout


def test_it_trains(trained: Trained) -> None:
    losses = [row["loss"] for row in train_rows(trained.folder)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1.0
    evaluations = [row for row in rows(trained.folder) if row["kind"] == "eval"]
    assert [(row["step"], row["whole"]) for row in evaluations] == [(10, False), (20, False), (30, True)]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert evaluations[-1]["bits_per_byte"] > 0


def test_the_opening_and_the_end_say_what_matters(trained: Trained) -> None:
    told = trained.training.stdout
    for words in ("device", "parameter", "epochs", "unigram entropy", "checkpoint", "class Parser:", "runs/mine"):
        assert words in told
    assert f"step {STEPS}/{STEPS}  loss" in told
    assert (trained.folder / "runs" / "mine" / "samples" / f"step-{STEPS:08d}.txt").is_file()


def test_one_rank_of_deepspeed_trains_as_a_plain_start_does(trained: Trained) -> None:
    """What tests/e2e/test_launchers.py shows of the others: the same losses, all cores, one voice and no noise."""
    plain = finish(trained.folder, pretrain(*WORDS, "run.root=plain", "tracking.mlflow=false"))
    assert plain.code == 0, plain.explain()
    expected = [row for row in read_metrics(trained.folder / "plain" / "mine" / "metrics.jsonl") if "grad_norm" in row]
    found = train_rows(trained.folder)
    assert [row["loss"] for row in found[:12]] == pytest.approx([row["loss"] for row in expected[:12]], rel=1e-5)
    norms = [[row["grad_norm"] for row in each[:12]] for each in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    facts = json.loads((trained.folder / "runs" / "mine" / "environment.json").read_text())
    assert facts["threads_per_rank"] == len(os.sched_getaffinity(0))
    told = trained.training.stdout
    assert len(re.findall(rf"^step {STEPS}/{STEPS}  loss", told, re.MULTILINE)) == 1
    assert own_lines(trained.training.stderr) == [], trained.training.stderr


def test_mlflow_has_the_same(trained: Trained) -> None:
    store = mlflow.MlflowClient(f"sqlite:///{trained.folder / 'runs' / 'mlflow.db'}")
    (experiment,) = store.search_experiments(filter_string="name = 'megalm'")
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    found = store.get_metric_history(run.info.run_id, "train/loss")
    assert [(item.step, item.value) for item in found] == [
        (row["step"], row["loss"]) for row in train_rows(trained.folder)
    ]
    environment = json.loads((trained.folder / "runs" / "mine" / "environment.json").read_text())
    assert run.data.tags["tokenizer_fingerprint"] == environment["tokenizer_fingerprint"]
    if commit := environment["git"].get("commit"):  # absent outside a checkout
        assert run.data.tags["mlflow.source.git.commit"] == commit


def test_generate_continues_a_prompt(trained: Trained) -> None:
    words = ("generate", "runs/mine", "--prompt", "def ", "--max-new-tokens", "8", "--seed", "3")
    text = shown(trained, *words)
    assert text.startswith("def ")
    assert len(text) > len("def \n")
    assert shown(trained, *words) == text


def test_checkpoints_are_listed_and_shown(trained: Trained) -> None:
    listed = shown(trained, "checkpoint", "list", "runs/mine")
    (line,) = (line for line in listed.splitlines() if line.startswith("step-"))
    loss = [row for row in rows(trained.folder) if row["kind"] == "eval"][-1]["loss"]
    assert line.split()[0] == f"step-{STEPS:08d}"
    assert f"{loss:.4f}" in line
    assert "latest" in line
    found = shown(trained, "checkpoint", "show", f"runs/mine/checkpoints/step-{STEPS:08d}")
    assert "rank-00000.safetensors" in found
    assert str(STEPS * 16 * 64) in found.replace(",", "")
