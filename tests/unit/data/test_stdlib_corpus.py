"""The quickstart corpus and its cache: made once, found quickly, never half there."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import pytest

from megalm.data.builder import stdlib_corpus
from megalm.data.builder import stdlib_corpus as recipe_module
from megalm.data.builder.stdlib_corpus import (
    PreparedData,
    default_cache_dir,
    prepare_recipe,
    source_files,
    stdlib_documents,
)
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.readers.document_reader import Document
from megalm.data.readers.input_files import ReadReport
from megalm.data.sampling.index_cache import ArrayCache
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.errors import DataError
from tests.messages import assert_names

LIST_NAMES = (
    "from megalm.data.builder.stdlib_corpus import stdlib_documents; import hashlib;"
    "print(hashlib.sha256(repr(stdlib_documents()).encode()).hexdigest())"
)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return stdlib_documents()


def test_the_corpus_is_the_library_s_own_text(documents: list[Document]) -> None:
    names = {document.source for document in documents}
    assert {"argparse.py", "json/decoder.py", "topics/assert"} <= names
    assert not [name for name in names if "/test/" in name or "/tests/" in name or name.startswith("_sysconfigdata")]
    assert "pydoc_data/topics.py" not in names
    assert sum(len(document.text) for document in documents) > 8_000_000
    assert len({document.text for document in documents}) == len(documents)
    assert all(document.text and "\r" not in document.text for document in documents)
    ast.parse(next(document.text for document in documents if document.source == "argparse.py"))


def test_any_part_of_the_corpus_is_a_fair_one(documents: list[Document]) -> None:
    """Sorted by name, the last twentieth would be xml and zipfile."""
    last = documents[-len(documents) // 20 :]
    assert len({document.source[0] for document in last}) > 10


def test_the_same_documents_in_another_environment(tmp_path: Path, documents: list[Document]) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    path = os.pathsep.join([str(Path(stdlib_corpus.__file__).parents[2]), *filter(None, sys.path)])
    environment = {"PYTHONPATH": path, "PATH": os.environ["PATH"]}
    python = tmp_path / "venv" / "bin" / "python"
    there = subprocess.run([python, "-c", LIST_NAMES], env=environment, capture_output=True, text=True, check=True)
    here = subprocess.run([sys.executable, "-c", LIST_NAMES], capture_output=True, text=True, check=True)
    assert there.stdout == here.stdout != ""


def test_what_is_left_out_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        (tmp_path / f"m{number:03}.py").write_text(f"x = {number}\n")
    (tmp_path / "copy.py").write_text("x = 7\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\r\ny = '\xe9'\r\n")
    (tmp_path / "broken.py").write_bytes(b"z = '\xff'\n")
    for folder in ("site-packages", "pkg/tests", "config-3.11-x86", "__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text(folder)
    (tmp_path / "_sysconfigdata__linux.py").write_text("machine = 1")
    monkeypatch.setattr(stdlib_corpus, "standard_library", lambda: tmp_path)
    monkeypatch.setattr(stdlib_corpus, "_topics", list)
    report = ReadReport()
    sources = {document.source: document.text for document in stdlib_documents(report)}
    assert len(sources) == 101
    assert sources["latin.py"] == "# coding: latin-1\ny = 'é'\n"
    assert "m007.py" not in sources  # copy.py comes first by name
    assert (report.duplicates, report.skipped) == (1, 1)
    assert "broken.py" in report.messages[0]
    for path in tmp_path.glob("m00*.py"):
        path.unlink()
    with pytest.raises(DataError) as error:
        source_files(tmp_path)
    assert_names(error.value, tmp_path, 94, "data.train")


@pytest.fixture
def small_corpus(monkeypatch: pytest.MonkeyPatch, documents: list[Document]) -> None:
    """The recipe on a few of the real documents: the machinery is what is tested, not the size."""
    few = [document for document in documents if len(document.text) < 8000][:20]
    monkeypatch.setattr(recipe_module, "stdlib_documents", lambda report: few)


@pytest.mark.usefixtures("small_corpus")
def test_prepares_once_and_finds_it_again(tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare_recipe("python-stdlib", tmp_path, 500, said.append)
    assert len(said) > 2
    start = time.process_time()
    again = prepare_recipe("python-stdlib", tmp_path, 500, pytest.fail)
    assert time.process_time() - start < 1.0  # takes 0.03 s
    assert again == first
    tokenizer = load_tokenizer(first.tokenizer_path)
    dataset = IndexedDataset(first.train_prefix)
    assert (tokenizer.vocab_size, len(dataset), len(dataset.tokens)) == (500, first.documents, first.tokens)
    sidecar = json.loads(Path(f"{first.train_prefix}.json").read_bytes())
    assert sidecar["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert sidecar["tokenizer"]["spec"] == "tokenizer.model"
    assert sidecar["inexact_documents"] == 0
    assert not list(tmp_path.glob("*.tmp"))
    other = prepare_recipe("python-stdlib", tmp_path, 510)
    assert other.fingerprint != first.fingerprint
    assert first.directory.exists()


@pytest.mark.usefixtures("small_corpus")
@pytest.mark.parametrize(
    "damage", ["cut", "lost", "folder", "", "{", "{}", "[]", '{"fingerprint": 3}', '{"files": {"x": []}}']
)
@pytest.mark.parametrize("damaged", ["manifest", "stamp"])
def test_damage_in_the_cache_is_mended(tmp_path: Path, damage: str, damaged: str) -> None:
    first = prepare_recipe("python-stdlib", tmp_path, 500)
    tokens = Path(f"{first.train_prefix}.bin")
    whole = tokens.read_bytes()
    if damage == "cut":
        tokens.write_bytes(whole[:-2])
    elif damage == "lost":
        first.tokenizer_path.unlink()
    elif damage == "folder":
        first.directory.rename(tmp_path / "elsewhere")
    elif damaged == "manifest":
        (first.directory / "recipe.json").write_text(damage)
    else:
        for stamp in (tmp_path / "stamps").iterdir():
            stamp.write_text(damage)
    assert prepare_recipe("python-stdlib", tmp_path, 500) == first
    assert tokens.read_bytes() == whole


@pytest.mark.usefixtures("small_corpus")
def test_a_failure_leaves_no_half_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "build_dataset", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare_recipe("python-stdlib", tmp_path, 500)
    assert [path.name for path in tmp_path.iterdir()] == ["python-stdlib.lock"]
    with pytest.raises(DataError, match=r"\b1,?000,?000\b"):
        prepare_recipe("python-stdlib", tmp_path, 1_000_000)
    assert prepare_recipe("python-stdlib", tmp_path, 500).tokens > 0


def test_what_a_killed_process_left_is_cleared_away(
    tmp_path: Path, small_corpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_recipe("python-stdlib", tmp_path, 500)
    left = tmp_path / f"{first.directory.name}.abc.tmp"
    first.directory.rename(left)
    assert prepare_recipe("python-stdlib", tmp_path, 500) == first
    assert not left.exists()


def prepare_there(cache: Path, answers: multiprocessing.SimpleQueue[PreparedData]) -> None:
    recipe_module.stdlib_documents = lambda report: stdlib_documents()[:20]  # type: ignore[assignment,misc]
    train, trained = recipe_module.train_tokenizer, list[bool]()
    recipe_module.train_tokenizer = lambda *args, **options: (  # type: ignore[assignment]
        trained.append(True) or train(*args, **options)  # type: ignore[func-returns-value]
    )
    answers.put((prepare_recipe("python-stdlib", cache, 500), bool(trained)))  # type: ignore[arg-type]


def test_two_processes_at_once_do_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.SimpleQueue[tuple[PreparedData, bool]] = context.SimpleQueue()
    processes = [context.Process(target=prepare_there, args=(tmp_path, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    (one, trained), (two, trained_too) = answers.get(), answers.get()
    for process in processes:
        process.join()
    assert one == two
    assert [trained, trained_too].count(True) == 1


def test_without_locks_it_is_prepared_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = stdlib_documents()[:20]

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as on Lustre, mounted without them

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(recipe_module, "stdlib_documents", lambda report: documents)
    assert prepare_recipe("python-stdlib", tmp_path, 500).documents == 20


def test_unknown_recipe(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare_recipe("wikipedia", tmp_path)
    assert_names(error.value, "data.recipe", "'wikipedia'", "python-stdlib")


@pytest.mark.usefixtures("small_corpus")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    with pytest.raises(DataError) as error:
        prepare_recipe("python-stdlib", tmp_path / "a-file" / "cache", 500)
    assert_names(error.value, "data.cache", "MEGALM_CACHE", os.strerror(errno.ENOTDIR))
    with pytest.raises(DataError) as error:
        ArrayCache(tmp_path / "a-file" / "orders").get((1,), lambda: {"a": np.zeros(1)})
    assert_names(error.value, "data.cache", "MEGALM_CACHE")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALM_CACHE", "/x/y")
    assert default_cache_dir() == Path("/x/y")
    monkeypatch.delenv("MEGALM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/megalm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "megalm"
