"""Commands refuse an output that is one of their inputs, and leave it as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from tests.inference_models import write_run
from tests.messages import assert_names


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert error.startswith("megalm: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("{preset: null, run: {name: mine}, train: {steps: 2}}")
    (folder / "environment.json").write_text('{"parameters": 7}')
    row = {"kind": "train", "time": 1.0, "step": 1, "tokens": 64, "loss": 5.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "environment.json"])
def test_report_keeps_the_files_of_the_run(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / name).read_bytes()
    link = run.parent / "page.html"
    link.symlink_to(run / name)
    for output in (run / name, link):
        assert_names(refused(capsys, "report", run, "--output", output), output, run / name)
        assert (run / name).read_bytes() == before


def test_report_replaces_its_own_page(run: Path, tmp_path: Path) -> None:
    for output in ([], [], ["--output", str(tmp_path / "page.html")], ["--output", str(tmp_path / "page.html")]):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(run), *output])
        assert caught.value.code == 0


def test_compare_keeps_the_files_of_its_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "curves.png"
    link.hardlink_to(run / "metrics.jsonl")
    before = link.read_bytes()
    assert_names(refused(capsys, "compare", run, run, "--plot", link), link, run / "metrics.jsonl")
    assert link.read_bytes() == before


def test_plan_keeps_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "rate.png"
    config.write_text("train: {steps: 20}\n")
    words = ("plan", "--config", config, "--gpu-memory", 80, "--plot", tmp_path / "." / "rate.png")
    assert_names(refused(capsys, *words), config)
    assert config.read_text() == "train: {steps: 20}\n"


@pytest.mark.parametrize("option", ["--choices", "--text"])
def test_evaluate_does_not_append_to_a_file_that_it_reads(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(run, ByteTokenizer())
    record = run / "evaluations.jsonl"
    record.write_text('{"context": "a", "choices": ["b", "c"], "answer": 0, "text": "Once upon a time"}\n')
    before = record.read_bytes()
    (tmp_path / "questions.jsonl").symlink_to(record)
    words = ("evaluate", run, option, tmp_path / "questions.jsonl")
    assert_names(refused(capsys, *words), tmp_path / "questions.jsonl", record)
    assert record.read_bytes() == before
