"""A dataset that is not what a run wants: refused with the command that helps, or built again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from megalm.data.analysis.dataset_info import describe
from megalm.data.builder.build_plan import BuildOptions, Filters
from megalm.data.builder.builder import build_dataset, build_files
from megalm.data.builder.rebuild import Rebuild, Wanted, ensure_dataset, rebuild_command
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.readers.document_reader import Document
from megalm.data.readers.records import ReadOptions
from megalm.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megalm.errors import DataError
from tests.messages import assert_names
from tests.unit.data.test_doors import door

OPTIONS = BuildOptions(
    append_eod=False,
    on_error="skip",
    read=ReadOptions(columns=("title", "body")),
    filters=Filters(min_characters=3),
    dedup="exact",
    split=(60, 40),
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "my text.jsonl"
    lines = [{"title": f"Title {number}", "body": "def f(): return " * number} for number in range(1, 20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    return path


def test_as_it_should_be(tmp_path: Path, corpus: Path) -> None:
    build_files([corpus], ByteTokenizer(), tmp_path / "x", OPTIONS)
    assert ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer())) is None
    assert ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "auto") is None
    built = ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "always")
    assert built is not None
    assert not built.was_there


def test_another_tokenizer_is_refused_and_the_command_helps(tmp_path: Path, corpus: Path, model_path: Path) -> None:
    build_files([corpus], ByteTokenizer(), tmp_path / "x", OPTIONS)
    wanted = load_tokenizer(model_path)
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "x-train", Wanted(wanted))
    assert_names(error.value, tmp_path / "x-train", "bytes", 257, ByteTokenizer.fingerprint[:12])
    assert_names(error.value, "sentencepiece:small.model", 600, wanted.fingerprint[:12], "data.tokenizer")
    assert_names(error.value, "data.rebuild=auto")
    assert "\n" not in str(error.value)
    _, _, command = str(error.value).partition("python data_tools/build_dataset.py ")
    done = door("build_dataset", *shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert ensure_dataset(tmp_path / "x-train", Wanted(wanted)) is None
    build_files([corpus], wanted, tmp_path / "y", OPTIONS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"x-train{suffix}").read_bytes() == (tmp_path / f"y-train{suffix}").read_bytes()


def test_auto_builds_what_differs(tmp_path: Path, corpus: Path, model_path: Path) -> None:
    build_files([corpus], ByteTokenizer(), tmp_path / "x", OPTIONS)
    wanted = load_tokenizer(model_path)
    assert ensure_dataset(tmp_path / "x-validation", Wanted(wanted), "auto") is not None
    assert ensure_dataset(tmp_path / "x-validation", Wanted(wanted), "auto") is None
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "x-train", Wanted(wanted, append_eod=True))
    assert_names(error.value, tmp_path / "x-train", "data.rebuild=auto")
    assert "data.tokenizer" not in str(error.value)
    assert "--no-append-eod" not in str(error.value)
    (tmp_path / "x-train.bin").unlink()
    assert ensure_dataset(tmp_path / "x-train", Wanted(wanted), "auto") is not None
    before = len(IndexedDataset(tmp_path / "x-train"))
    with corpus.open("a") as file:
        file.writelines(json.dumps({"title": f"More {number}", "body": "text"}) + "\n" for number in range(10))
    assert ensure_dataset(tmp_path / "x-train", Wanted(wanted), "auto") is not None
    assert len(IndexedDataset(tmp_path / "x-train")) == before + 6


def test_what_cannot_be_built_again(tmp_path: Path, model_path: Path) -> None:
    build_dataset([Document("a b", "f")], ByteTokenizer(), tmp_path / "x")
    wanted = Wanted(load_tokenizer(model_path))
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "x", wanted)
    assert_names(error.value, tmp_path / "x", "bytes", "data.tokenizer")
    assert "build_dataset.py" not in str(error.value)
    with pytest.raises(DataError, match=r"x\.json"):
        ensure_dataset(tmp_path / "x", wanted, "auto")
    (tmp_path / "x.json").unlink()
    assert ensure_dataset(tmp_path / "x", Wanted(load_tokenizer(model_path))) is None
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "x", Wanted(ByteTokenizer()), "auto")
    assert_names(error.value, tmp_path / "x.json", "data.rebuild")


def test_a_loss_and_a_kind_that_were_accepted_are_accepted_again(tmp_path: Path) -> None:
    path = tmp_path / "part-0"
    path.write_text('{"text": "a"}\n' * 99 + "broken\n" * 50)
    options = BuildOptions(on_error="skip", max_loss=0.5, read=ReadOptions(kind=".jsonl"), empty_documents="fail")
    build_files([path], ByteTokenizer(), tmp_path / "x", options)
    sidecar = read_sidecar(tmp_path / "x")
    assert sidecar is not None
    command = rebuild_command(tmp_path / "x", sidecar, Wanted(ByteTokenizer()))
    assert_names(command, "--max-loss 50%", "--input-kind .jsonl", "--empty-documents fail")
    assert ensure_dataset(tmp_path / "x", Wanted(ByteTokenizer(), inputs=(str(path),))) is None
    assert ensure_dataset(tmp_path / "x", Wanted(ByteTokenizer()), "always") is not None
    assert_names(describe(tmp_path / "x")["unreadable input"], 50, 149)


def test_a_shard_is_not_built_again_of_the_files_it_took_part_of(tmp_path: Path) -> None:
    """Their shard would be a part of a part."""
    for name in "abcd":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name * 100}) + "\n")
    build_files([str(tmp_path / "*.jsonl")], ByteTokenizer(), tmp_path / "s", BuildOptions(shard=(0, 2)))
    assert len(IndexedDataset(tmp_path / "s")) == 2
    with pytest.raises(DataError, match=r"s\.json"):
        ensure_dataset(tmp_path / "s", Wanted(ByteTokenizer()), "always")
    assert len(IndexedDataset(tmp_path / "s")) == 2


def test_always_mends_what_no_size_shows(tmp_path: Path, corpus: Path) -> None:
    build_files([corpus], ByteTokenizer(), tmp_path / "x", OPTIONS)
    content = (tmp_path / "x-train.bin").read_bytes()
    (tmp_path / "x-train.bin").write_bytes(content[:-1] + b"?")
    assert ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "auto") is None
    assert ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "always") is not None
    assert (tmp_path / "x-train.bin").read_bytes() == content


def test_raw_text_that_was_touched_or_is_gone_is_no_reason(tmp_path: Path, corpus: Path) -> None:
    build_files([corpus], ByteTokenizer(), tmp_path / "x", OPTIONS)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("x-*"))]
    os.utime(corpus, (1.0, 1.0))
    assert ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "auto") is None
    corpus.unlink()
    assert ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "auto") is None
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("x-*"))] == times
    with pytest.raises(DataError, match=str(corpus)):
        ensure_dataset(tmp_path / "x-train", Wanted(ByteTokenizer()), "always")


@pytest.mark.parametrize("stated", ["raw", "raw/a.jsonl", "raw/*.jsonl"])
@pytest.mark.parametrize("rebuild", ["never", "auto"])
def test_explicit_inputs_that_are_gone_are_no_reason_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str, rebuild: Rebuild
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    build_files([stated], ByteTokenizer(), tmp_path / "x")
    shutil.rmtree(raw)
    assert ensure_dataset(tmp_path / "x", Wanted(ByteTokenizer(), inputs=(stated,)), rebuild) is None
    with pytest.raises(DataError, match=r"other\.jsonl"):
        ensure_dataset(tmp_path / "x", Wanted(ByteTokenizer(), inputs=("other.jsonl",)), rebuild)


def test_explicit_inputs(tmp_path: Path, corpus: Path) -> None:
    """They make a dataset that is not there, and another than they name is refused or built again."""
    text = tmp_path / "plain" / "a.txt"
    text.parent.mkdir()
    text.write_text("some text")
    wanted, said = Wanted(ByteTokenizer(), inputs=(str(text.parent),)), list[str]()
    assert ensure_dataset(tmp_path / "y", wanted) is None  # nothing there: opening says so
    assert ensure_dataset(tmp_path / "y", wanted, "auto", tell=said.append) is not None
    (line,) = said
    assert_names(line, tmp_path / "y", text.parent)
    assert ensure_dataset(tmp_path / "y", wanted, "auto") is None
    (text.parent / "b.txt").write_text("more text")
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "y", wanted)
    assert_names(error.value, tmp_path / "y", text.parent / "b.txt", "data.input")
    assert_names(error.value, shlex.join(["--input", str(text.parent)]))
    assert ensure_dataset(tmp_path / "y", wanted, "auto", tell=said.append) is not None
    assert "b.txt" in said[1]
    assert IndexedDataset(tmp_path / "y").document_count == 2
    other = Wanted(ByteTokenizer(), inputs=(str(text.parent / "b.txt"),))
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "y", other)
    assert_names(error.value, tmp_path / "y", text, "data.input")
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "z", Wanted(ByteTokenizer()), "auto")
    assert_names(error.value, tmp_path / "z", "data.input")
    (tmp_path / "y.json").unlink()
    with pytest.raises(DataError) as error:
        ensure_dataset(tmp_path / "y", wanted, "always")
    assert_names(error.value, tmp_path / "y.json", "data.rebuild")
