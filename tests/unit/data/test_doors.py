"""The commands in data_tools/, as people run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BYTES = ("--input", "{0}", "--tokenizer", "bytes", "--output-prefix", "{0}/x")
DOORS = Path(__file__).resolve().parents[3] / "data_tools"


def door(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, DOORS / f"{name}.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment}
    )


def test_from_text_to_a_merged_dataset(tmp_path: Path, source_texts: list[str]) -> None:
    texts = tmp_path / "my.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *source_texts[:2]]) + "broken\n")
    model, prefix = tmp_path / "data" / "my.model", tmp_path / "data" / "my"
    skip = ("--input", texts, "--on-error", "skip")
    trained = door("train_tokenizer", *skip, "--output", model, "--vocab-size", "500")
    assert trained.returncode == 0, trained.stderr
    assert "500 pieces (unigram) from 2 documents" in trained.stdout
    built = door("build_dataset", *skip, "--tokenizer", model, "--output-prefix", prefix, "--workers", "2")
    assert built.returncode == 0, built.stderr
    assert "2 documents" in built.stdout
    assert f"skipped 2 documents that cannot be read, the first: {texts}:1: is an empty document" in built.stdout
    merged = door("merge_datasets", "--output-prefix", tmp_path / "twice", prefix, prefix)
    assert merged.returncode == 0, merged.stderr
    shown = door("inspect_dataset", tmp_path / "twice", "--verify", "--tokenizer", model, "--document", "2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == source_texts[0] + "\n"
    facts = door("inspect_dataset", tmp_path / "twice", "--verify")
    assert "documents          4\n" in facts.stdout


def test_looking_at_a_dataset(tmp_path: Path, source_texts: list[str], model_path: Path) -> None:
    texts = tmp_path / "my.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*source_texts, "x" * 3000]))
    options = ("--input", texts, "--tokenizer", model_path, "--output-prefix", tmp_path / "my", "--split", "4,1")
    assert door("build_dataset", *options).returncode == 0
    shown = door("inspect_dataset", tmp_path / "my-train", "--stats", "--tokenizer", model_path)
    assert shown.returncode == 0, shown.stderr
    assert "most frequent tokens" in shown.stdout
    assert "tokens per byte  0." in shown.stdout
    scanned = door(
        "inspect_dataset", tmp_path / "my-train", "--scan", "--around", "5000", "--report", tmp_path / "scan"
    )
    assert scanned.returncode == 0, scanned.stderr
    assert ">4,608 on" in scanned.stdout
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert "<table>" in (tmp_path / "scan.html").read_text()
    step = ("--step", "3", "--batch-size", "2", "--sequence-length", "32", "--tokenizer", model_path)
    read = door("inspect_dataset", tmp_path / "my-train", *step)
    assert read.returncode == 0, read.stderr
    assert f"--- sample 4: {tmp_path / 'my-train'} document " in read.stdout
    assert f"--- sample 5: {tmp_path / 'my-train'} document " in read.stdout
    assert f"{texts}:" in read.stdout
    refused = door("inspect_dataset", tmp_path / "my-train", "--step", "3")
    assert (refused.returncode, "state --batch-size too" in refused.stderr) == (2, True)
    refused = door("inspect_dataset", "--run", tmp_path, "--step", "3")
    assert (refused.returncode, "is no folder of a run" in refused.stderr) == (2, True)
    refused = door("inspect_dataset", tmp_path / "my-train", "--run", tmp_path, "--step", "3")
    assert (refused.returncode, "without PREFIX" in refused.stderr) == (2, True)
    refused = door("inspect_dataset")
    assert (refused.returncode, "name a dataset by its PREFIX" in refused.stderr) == (2, True)


def test_a_name_that_no_terminal_can_show(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"na\xefve.jsonl")
    path.write_text('{}\n{"text": "a"}\n')
    words = ("--input", path, "--tokenizer", "bytes", "--output-prefix", tmp_path / "x", "--on-error", "skip")
    built = door("build_dataset", *words, PYTHONIOENCODING="ascii:strict")
    assert built.returncode == 0, built.stderr
    assert r"na\udcefve.jsonl:1: has no 'text'" in built.stdout


def test_what_the_system_refuses_is_one_line_and_exit_2(tmp_path: Path) -> None:
    model, text, long = tmp_path / "t.model", tmp_path / "in.jsonl", "x" * 300
    model.symlink_to("/proc/self/mem")  # reading it at 0 is an error of input and output
    text.write_text('{"text": "a"}\n')
    output = ("--output-prefix", tmp_path / "x")
    refused = door("build_dataset", "--input", text, "--tokenizer", model, *output)
    said = f"error: {model}: cannot be read (Input/output error); check the file and its rights\n"
    assert (refused.returncode, refused.stderr) == (2, said)
    refused = door("build_dataset", "--input", long, "--tokenizer", "bytes", *output)
    said = f"error: {long}: File name too long; mend the path, its rights or its disk, and start again\n"
    assert (refused.returncode, refused.stderr) == (2, said)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("train_tokenizer", ("--input", "{0}", "--output", "{0}/x.model"), "no file to read there"),
        ("train_tokenizer", ("--input", "{0}", "--output", "{0}/x"), "name a tokenizer NAME.model"),
        ("build_dataset", ("--input", "x", "--tokenizer", "bytes", "--output-prefix", "{0}/x"), "x: no file to read"),
        ("build_dataset", (*BYTES, "--split", "9"), "state two or three weights"),
        ("build_dataset", (*BYTES, "--split", "a,b"), "state two or three positive weights"),
        ("build_dataset", (*BYTES, "--shard", "4"), "state it as NUMBER/OF"),
        ("build_dataset", (*BYTES, "--shard", "4/4"), "shards are numbered from 0 to 3"),
        ("build_dataset", (*BYTES, "--shard", "1/2", "--split", "9,1"), "would be cut from each shard"),
        ("build_dataset", (*BYTES, "--dedup", "some"), "choose one of none, exact, minhash"),
        ("build_dataset", (*BYTES, "--on-error", "raise"), "choose one of fail, skip"),
        ("build_dataset", (*BYTES, "--columns", "a,"), "has an empty name"),
        ("build_dataset", (*BYTES, "--txt-documents", "line"), "choose file or blank-line"),
        ("build_dataset", (*BYTES[2:], "--input", "-", "--stdin-kind", ".parquet"), "cannot be read as '.parquet'"),
        ("inspect_dataset", ("{0}/absent",), "cannot be opened"),
        ("merge_datasets", ("--output-prefix", "{0}/x", "{0}/a"), "two datasets or more"),
    ],
)
def test_refusals_are_one_line_and_exit_2(tmp_path: Path, name: str, arguments: tuple[str, ...], said: str) -> None:
    refused = door(name, *(argument.format(tmp_path) for argument in arguments))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: ")
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1
