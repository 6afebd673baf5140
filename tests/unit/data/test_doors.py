"""The commands in data_tools/, as people run them."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalm.data.analysis.dataset_info import statistics
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.tokenizers.tokenizer import load_tokenizer
from tests.messages import assert_names

BYTES = ("--input", "{0}", "--tokenizer", "bytes", "--output-prefix", "{0}/x")
TRAINED = "{0}/.t/t.model.json"
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
    assert_names(trained.stdout, model, 500, "unigram", 2)
    built = door("build_dataset", *skip, "--tokenizer", model, "--output-prefix", prefix, "--workers", "2")
    assert built.returncode == 0, built.stderr
    assert_names(built.stdout, prefix, 2, f"{texts}:4")
    merged = door("merge_datasets", "--output-prefix", tmp_path / "twice", prefix, prefix)
    assert merged.returncode == 0, merged.stderr
    assert_names(merged.stdout, tmp_path / "twice", 4)
    shown = door("inspect_dataset", tmp_path / "twice", "--verify", "--tokenizer", model, "--document", "2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == source_texts[0] + "\n"


def test_looking_at_a_dataset(tmp_path: Path, source_texts: list[str], model_path: Path) -> None:
    texts = tmp_path / "my.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*source_texts, "x" * 3000]))
    options = ("--input", texts, "--tokenizer", model_path, "--output-prefix", tmp_path / "my", "--split", "4,1")
    assert door("build_dataset", *options).returncode == 0
    shown = door("inspect_dataset", tmp_path / "my-train", "--verify", "--stats", "--tokenizer", model_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^documents +4$", shown.stdout, re.MULTILINE)
    assert_names(shown.stdout, hashlib.sha256((tmp_path / "my-train.bin").read_bytes()).hexdigest())
    found = statistics(IndexedDataset(tmp_path / "my-train"), load_tokenizer(model_path))
    assert_names(shown.stdout, f"{found.tokens_per_byte:.4f}", *(token for token, _ in found.frequent))
    scanned = door(
        "inspect_dataset", tmp_path / "my-train", "--scan", "--around", "5000", "--report", tmp_path / "scan"
    )
    assert scanned.returncode == 0, scanned.stderr
    assert_names(scanned.stdout, ">4,608")
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert "<table>" in (tmp_path / "scan.html").read_text()
    step = ("--step", "3", "--batch-size", "2", "--sequence-length", "32", "--tokenizer", model_path)
    read = door("inspect_dataset", tmp_path / "my-train", *step)
    assert read.returncode == 0, read.stderr
    heads = [line for line in read.stdout.splitlines() if f"{tmp_path / 'my-train'} " in line and f"{texts}:" in line]
    for sample in (4, 5):
        assert [head for head in heads if re.search(rf"\b{sample}: ", head)], heads


def test_a_file_behind_standard_input_is_not_overwritten(tmp_path: Path) -> None:
    text = tmp_path / "my.json"
    text.write_text('["a"]')
    options = ("--input", "-", "--stdin-kind", ".json", "--tokenizer", "bytes", "--output-prefix", tmp_path / "my")
    command = [sys.executable, DOORS / "build_dataset.py", *options, "--overwrite"]
    with text.open() as opened:
        refused = subprocess.run(command, stdin=opened, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 2
    assert_one_line(refused.stderr, text, "/dev/stdin")
    assert text.read_text() == '["a"]'


def test_a_name_that_no_terminal_can_show(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"na\xefve.jsonl")
    path.write_text('{}\n{"text": "a"}\n')
    words = ("--input", path, "--tokenizer", "bytes", "--output-prefix", tmp_path / "x", "--on-error", "skip")
    built = door("build_dataset", *words, PYTHONIOENCODING="ascii:strict")
    assert built.returncode == 0, built.stderr
    assert_names(built.stdout, r"na\udcefve.jsonl:1", "'text'")


def test_what_the_system_refuses_is_one_line_and_exit_2(tmp_path: Path) -> None:
    model, text, long = tmp_path / "t.model", tmp_path / "in.jsonl", "x" * 300
    model.symlink_to("/proc/self/mem")  # reading it at 0 is an error of input and output
    text.write_text('{"text": "a"}\n')
    output = ("--output-prefix", tmp_path / "x")
    for stated, names in (
        (("--input", text, "--tokenizer", model), (model, os.strerror(errno.EIO))),
        (("--input", long, "--tokenizer", "bytes"), (long, os.strerror(errno.ENAMETOOLONG))),
    ):
        refused = door("build_dataset", *stated, *output)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert_one_line(refused.stderr, *names)


def assert_one_line(stderr: str, *names: object) -> None:
    assert stderr.startswith("megalm: error: ")
    assert stderr.count("\n") == 1
    assert_names(stderr, *names)


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        ("train_tokenizer", ("--input", "{0}", "--output", "{0}/x.model"), ["{0}", ".jsonl"]),
        ("train_tokenizer", ("--input", "{0}", "--output", "{0}/x"), ["{0}/x"]),
        ("build_dataset", ("--input", "gone", "--tokenizer", "bytes", "--output-prefix", "{0}/x"), ["gone", ".jsonl"]),
        ("build_dataset", (*BYTES, "--split", "9"), ["--split"]),
        ("build_dataset", (*BYTES, "--split", "a,b"), ["--split a,b"]),
        ("build_dataset", (*BYTES, "--shard", "4"), ["--shard 4"]),
        ("build_dataset", (*BYTES, "--shard", "4/4"), ["--shard 4/4", "0", "3"]),
        ("build_dataset", (*BYTES, "--shard", "1/2", "--split", "9,1"), ["--shard", "--split"]),
        ("build_dataset", (*BYTES, "--dedup", "some"), ["--dedup some", "none", "exact", "minhash"]),
        ("build_dataset", (*BYTES, "--on-error", "raise"), ["--on-error raise", "fail", "skip"]),
        ("build_dataset", (*BYTES, "--columns", "a,"), ["--columns a,"]),
        ("build_dataset", (*BYTES, "--txt-documents", "line"), ["--txt-documents line", "file", "blank-line"]),
        ("build_dataset", (*BYTES[2:], "--input", "-", "--stdin-kind", ".parquet"), ["'.parquet'", ".jsonl"]),
        ("inspect_dataset", ("{0}/absent",), ["{0}/absent.idx"]),
        ("inspect_dataset", (), ["PREFIX", "--run", "--step"]),
        ("inspect_dataset", ("{0}/d", "--run", "{0}", "--step", "3"), ["--run {0}", "--step", "PREFIX"]),
        ("inspect_dataset", ("--run", "{0}", "--step", "3"), ["{0}"]),
        ("inspect_dataset", ("{0}/d", "--step", "3"), ["--step 3", "--batch-size"]),
        ("merge_datasets", ("--output-prefix", "{0}/x", "{0}/a"), []),
        ("train_tokenizer", ("--input", "{0}/.t/in.json", "--output", "{0}/.t/t.model", "--overwrite"), [TRAINED]),
        ("train_tokenizer", ("--input", "{0}/.t/in.json", "--output", "{0}/.t/u.model"), ["{0}/.t/u.model.json"]),
        ("inspect_dataset", ("{0}/d", "--scan", "--report", "{0}/scan"), ["{0}/scan.png", "{0}/d.bin"]),
    ],
)
def test_refusals_are_one_line_and_exit_2(
    tmp_path: Path,
    name: str,
    arguments: tuple[str, ...],
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole script, in this process."""
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.append([1, 2, 3])
    (tmp_path / "scan.png").hardlink_to(tmp_path / "d.bin")
    (tmp_path / ".t").mkdir()
    for model in "tu":
        (tmp_path / ".t" / f"{model}.model.json").write_text('["a"]')
    (tmp_path / ".t" / "in.json").symlink_to(tmp_path / ".t" / "t.model.json")
    monkeypatch.syspath_prepend(DOORS)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(DOORS / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert (left.value.code, shown.out) == (2, "")
    assert_one_line(shown.err, *(each.format(tmp_path) for each in names))


def test_the_script_of_shards_knows_the_options_without_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOORS)
    main = runpy.run_path(str(DOORS / "build_dataset.py"))["main"]
    flags = [name for name, given in inspect.signature(main).parameters.items() if isinstance(given.default, bool)]
    assert flags
    script = (DOORS.parent / "slurm" / "build_dataset.sh").read_text()
    for flag in flags:
        assert re.search(rf"^ *(.*\| )?--{flag.replace('_', '-')}( \|.*)?\) ", script, re.MULTILINE), flag


@pytest.mark.parametrize(
    ("name", "arguments", "missing"),
    [
        ("train_tokenizer", ("--input", "{0}/gone", "--output", "{0}/x.model"), "gone"),
        ("inspect_dataset", ("{0}/gone",), "gone.idx"),
        ("merge_datasets", ("--output-prefix", "{0}/x", "{0}/gone", "{0}/other"), "gone.idx"),
    ],
)
def test_each_command_leaves_with_2(tmp_path: Path, name: str, arguments: tuple[str, ...], missing: str) -> None:
    refused = door(name, *(argument.format(tmp_path) for argument in arguments))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert_one_line(refused.stderr, tmp_path / missing)
