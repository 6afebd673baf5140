"""`megalm evaluate` on runs that were really trained: what training said of a checkpoint, and what else is asked."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megalm.data.builder.builder import build_dataset
from megalm.data.readers.document_reader import Document
from megalm.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megalm.errors import EXIT_START_AGAIN
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, job, megalm, pretrain, rows, train_rows, until

pytestmark = pytest.mark.e2e


AVERAGED = "train.ema_decay=0.8"


def evaluate(folder: Path, *words: object) -> Finished:
    return finish(folder, megalm("evaluate", *words))


def results(folder: Path, *words: object) -> list[dict[str, Any]]:
    """The JSON lines of a command that must work."""
    finished = evaluate(folder, *words, "--json")
    assert finished.code == 0, finished.explain()
    return [json.loads(line) for line in finished.stdout.splitlines()]


def train(folder: Path, small_data: SmallData, *words: str, json_file: str | Path = "fp32.json") -> None:
    intervals = ("evaluate.interval_steps=4", "checkpoint.interval_steps=4", "evaluate.max_samples=null", AVERAGED)
    own = small_data.changed(*intervals, "train.steps=12", "run.name=mine", *words)
    finished = finish(folder, pretrain(*own, json_file=json_file))
    assert finished.code == 0, finished.explain()


@pytest.fixture(scope="module")
def folder(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with three checkpoints, in fp32, that answers questions at each."""
    folder = tmp_path_factory.mktemp("evaluated")
    texts = [document.text for document in small_data.documents if len(document.text) > 220]
    questions = [{"context": text[:200], "choices": [text[200:220], "%#" * 10], "answer": 0} for text in texts]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    train(folder, small_data, "evaluate.tasks=[quiz.jsonl]", "evaluate.tasks_interval_steps=4")
    return folder


def said_in_training(folder: Path, step: int) -> dict[str, Any]:
    return [row for row in rows(folder) if row["kind"] == "eval" and row["step"] == step][-1]


def assert_same(found: dict[str, Any], said: dict[str, Any], tolerance: float) -> None:
    assert (found["dataset"], found["targets"], found["tokens"]) == (said["dataset"], said["targets"], said["tokens"])
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(said[name], rel=tolerance), name


def test_every_checkpoint_is_what_training_said_of_it(folder: Path) -> None:
    before = (folder / "runs/mine/metrics.jsonl").read_bytes()
    found = results(folder, "mine", "--every-checkpoint", "--batch-size", 5)
    assert [row["step"] for row in found] == [4, 8, 12]
    for row in found:
        assert_same(row, said_in_training(folder, row["step"]), 1e-6)
    (newest,) = results(folder, "runs/mine/checkpoints/latest")
    assert newest["loss"] == pytest.approx(found[-1]["loss"], rel=1e-6)
    recorded = [json.loads(line) for line in (folder / "runs/mine/evaluations.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in recorded] == [row["loss"] for row in (*found, newest)]
    assert (folder / "runs/mine/metrics.jsonl").read_bytes() == before


def test_the_average_of_the_weights_is_what_training_said_of_it(folder: Path) -> None:
    (found,) = results(folder, "mine", "--ema")
    said = said_in_training(folder, 12)
    assert said["ema_loss"] != pytest.approx(said["loss"], rel=1e-3)
    assert found["targets"] == said["targets"]
    assert found["loss"] == pytest.approx(said["ema_loss"], rel=1e-6)


def test_questions_have_the_answers_of_training(folder: Path) -> None:
    said = [row for row in rows(folder) if row["kind"] == "task"]
    found = results(folder, "mine", "--choices", "quiz.jsonl", "--every-checkpoint", "--batch-size", 5)
    assert [row["step"] for row in found] == [row["step"] for row in said] == [4, 8, 12]
    for row, own in zip(found, said, strict=True):
        for name in ("task", "questions", "tokens", "accuracy", "byte_accuracy", "chance", "cut_contexts"):
            assert row[name] == own[name], name
        assert row["answer_bits_per_byte"] == pytest.approx(own["answer_bits_per_byte"], rel=1e-6)
    assert found[-1]["cut_contexts"] > 0, "contexts of 200 characters and windows of 64 tokens"
    assert found[-1]["answer_bits_per_byte"] < found[0]["answer_bits_per_byte"], "it learns"


def test_checkpoints_of_a_running_job_are_evaluated_as_they_come(small_data: SmallData, tmp_path: Path) -> None:
    """Each once, while training deletes all but the newest two; the last one when the job has saved it and left."""
    own = ("train.steps=100000", "checkpoint.interval_steps=20", "checkpoint.keep_last=2", "run.name=mine")
    record = tmp_path / "runs/mine/evaluations.jsonl"
    with job(tmp_path, pretrain(*small_data.changed(*own))) as training:
        training.wait_for_step(20)
        watching = megalm("evaluate", "mine", "--watch", "--max-samples", 2, "--json", "--plot", "p.png")
        with job(tmp_path, watching) as watch:
            until(lambda: record.is_file() and record.read_text().count("\n") >= 2, 200.0)
            training.rank(0).send_signal(signal.SIGTERM)
            assert training.wait().code == EXIT_START_AGAIN
            finished = watch.wait()
    assert finished.code == 0, finished.explain()
    steps = [json.loads(line)["step"] for line in finished.stdout.splitlines()]
    assert steps == sorted(set(steps)), finished.explain()
    assert steps[-1] == train_rows(tmp_path)[-1]["step"]
    assert [json.loads(line)["step"] for line in record.read_text().splitlines()] == steps
    assert (tmp_path / "p.png").is_file()


def test_another_kind_of_model(small_data: SmallData, tmp_path: Path) -> None:
    train(tmp_path, small_data, "data.document_mask=true", "model.style=gpt2")
    (row,) = results(tmp_path, "mine", "--dtype", "fp32")
    assert_same(row, said_in_training(tmp_path, 12), 1e-6)


def test_a_run_in_bf16_and_in_fp32(small_data: SmallData, tmp_path: Path) -> None:
    """How bf16 rounds is the CPU's affair; that the two differ is not."""
    train(tmp_path, small_data, json_file="bf16.json")
    found = [results(tmp_path, "mine", "--dtype", dtype)[0] for dtype in ("bf16", "fp32")]
    for row in found:
        assert_same(row, said_in_training(tmp_path, 12), 1e-2)
    assert found[0]["loss"] != found[1]["loss"]


def test_a_set_of_its_own_and_part_of_it(small_data: SmallData, tmp_path: Path) -> None:
    """Several sets with a total, and a part of each while training; the end is on everything."""
    for name in ("first", "second"):
        documents = small_data.documents[-8:] if name == "first" else small_data.documents[:3]
        build_dataset(documents, load_tokenizer(small_data.tokenizer), tmp_path / name)
    sets = "data.validation={first: first, second: second}"
    train(tmp_path, small_data, "data.split=null", sets, "evaluate.max_samples=2")
    said = [row for row in rows(tmp_path) if row["kind"] == "eval" and row["step"] == 12 and row["whole"]]
    found = results(tmp_path, "mine")
    assert [row["dataset"] for row in found] == ["first", "second", "validation"]
    for one, other in zip(found, said, strict=True):
        assert_same(one, other, 1e-6)
    for row in results(tmp_path, "runs/mine/checkpoints/step-00000008", "--max-samples", 2):
        (part,) = (one for one in rows(tmp_path) if one.get("dataset") == row["dataset"] and one["step"] == 8)
        assert_same(row, part, 1e-6)
    # Named by hand, the same sets give the same.
    named = results(tmp_path, "mine", "--data", "first", "--data", "second")
    assert [(row["dataset"], row["loss"]) for row in named[:2]] == [(row["dataset"], row["loss"]) for row in found[:2]]
    assert (named[2]["dataset"], named[2]["loss"]) == ("all", found[2]["loss"])


def test_text_and_choices_of_every_good_checkpoint(folder: Path, small_data: SmallData, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    marked = tmp_path / "runs/mine/checkpoints/step-00000008"
    finished = finish(tmp_path, megalm("checkpoint", "mark-bad", marked, "--reason", "just so"))
    assert finished.code == 0, finished.explain()
    texts = [document.text for document in small_data.documents]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(texts[0])
    (tmp_path / "text/b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:3]))
    questions = [
        {"context": text[:200], "choices": [text[200:220], "%#" * 10], "answer": 0} for text in texts if len(text) > 220
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    words = ("mine", "--text", "text", "--choices", "q.jsonl", "--every-checkpoint")
    finished = evaluate(tmp_path, *words)
    assert finished.code == 0, finished.explain()
    (left_out,) = (line for line in finished.stderr.splitlines() if "step-00000008" in line)
    assert "just so" in left_out
    told = [line.split() for line in finished.stdout.splitlines() if line[:4].strip() in ("4", "8", "12")]
    assert [line[0] for line in told] == ["4", "12", "4", "12"]
    assert [next(word for word in line if word in ("text", "q")) for line in told] == ["text"] * 2 + ["q"] * 2
    recorded = [json.loads(line) for line in (tmp_path / "runs/mine/evaluations.jsonl").read_text().splitlines()]
    early, answers, late, last_answers = recorded[-4:]
    assert (early["documents"], early["text_bytes"]) == (3, sum(len(text.encode()) for text in texts[:3]))
    assert late["loss"] < early["loss"], "it learns"
    assert late["targets"] == sum(map(len, load_tokenizer(small_data.tokenizer).encode_batch(texts[:3])))
    assert (last_answers["task"], last_answers["questions"]) == ("q", len(questions))
    assert last_answers["accuracy"] > 0.6, "Python's own text is likelier than noise"
    assert answers["step"] == 4


def test_a_run_is_distinguished_from_its_damage(folder: Path, tmp_path: Path) -> None:
    """One line, exit code 2."""
    shutil.copytree(folder / "runs", tmp_path / "runs")
    build_dataset([Document("of another tokenizer " * 30, "here:1")], ByteTokenizer(), tmp_path / "other")
    checkpoints = tmp_path / "runs/mine/checkpoints"
    marked = checkpoints / "step-00000004"
    finish(tmp_path, megalm("checkpoint", "mark-bad", marked, "--reason", "just so"))
    (file,) = (checkpoints / "step-00000008").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused = {
        ("mine", "--data", "other"): "257",
        ("mine", "--data", "absent"): "absent",
        ("mine", "--overlap", "64", "--text", str(Path(__file__).parents[2] / "README.md")): "63",
        ("mien",): "'mine'",
        (str(marked),): "just so",
        (str(file.parent),): "SHA-256",
        (str(file.parent), "--every-checkpoint"): "--every-checkpoint",
        ("mine", "--tokenizer", "bytes"): "bytes",
    }
    for words, message in refused.items():
        finished = evaluate(tmp_path, *words)
        assert (finished.code, finished.stdout) == (2, ""), finished.explain()
        (line,) = finished.stderr.splitlines()[-1:]
        assert line.startswith("megalm: error: "), finished.explain()
        assert message in line, finished.explain()
        assert "Traceback" not in finished.stderr
    finished = evaluate(tmp_path, "mine", "--every-checkpoint", "--max-samples", 2)
    assert finished.code == 0, finished.explain()
    left_out = {
        step: line for step in ("4", "8") for line in finished.stderr.splitlines() if f"step-0000000{step}" in line
    }
    assert "just so" in left_out["4"]
    assert "SHA-256" in left_out["8"], "a flipped bit, found when it is loaded"


def test_in_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    record = tmp_path / "runs/mine/evaluations.jsonl"
    record.unlink(missing_ok=True)
    record.mkdir()  # no file can be written there, also not by root
    finished = evaluate(tmp_path, "mine", "--max-samples", 2)
    assert finished.code == 0, finished.explain()
    assert "runs/mine/evaluations.jsonl" in finished.stderr
    assert "validation" in finished.stdout
