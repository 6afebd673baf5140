"""Real text, a tokenizer and a dataset for the jobs of this folder, made once by the real code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from megalm.data.builder.builder import build_dataset
from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.readers.document_reader import Document
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer
from tests.e2e.jobs import SMALL, finish, pretrain
from tests.slurm_cluster import SlurmCluster, slurm_cluster

_SOURCES = ("argparse.py", "calendar.py", "difflib.py", "shlex.py", "textwrap.py", "heapq.py", "string.py", "cmd.py")
_VOCABULARY = 600
# What the run of the fixture `six_steps` states besides the small job's words; it saves at steps 3 and 6.
SIX_STEPS = ("run.name=mine", "checkpoint.interval_steps=3")


@dataclass(frozen=True)
class SmallData:
    """About 60,000 tokens; the last twentieth of its documents is validated on."""

    prefix: Path
    tokenizer: Path
    documents: list[Document]
    vocabulary: int = _VOCABULARY

    @property
    def words(self) -> tuple[str, ...]:
        """What the training command is told: this data and a small model."""
        return (f"data.train={self.prefix}", f"data.tokenizer={self.tokenizer}", "data.split=95,5", *SMALL)

    def changed(self, *own: str) -> tuple[str, ...]:
        """`words` with others in their place, the last one of each key; flags of the command stay as they are."""
        is_key = [("=" in word and not word.startswith("-")) for word in own]
        stated = {word.partition("=")[0]: word for word in self.words}
        stated |= {word.partition("=")[0]: word for word, key in zip(own, is_key, strict=True) if key}
        return (*stated.values(), *(word for word, key in zip(own, is_key, strict=True) if not key))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    folder = tmp_path_factory.mktemp("data")
    files = source_files()
    # Pieces of a file each, so that a twentieth of the documents is a twentieth of the text.
    texts = [(name, files[name].read_text(encoding="utf-8")) for name in _SOURCES]
    documents = [
        Document(text[start : start + 4000], f"{name}:{start}")
        for name, text in texts
        for start in range(0, len(text), 4000)
    ]
    model = folder / "small.model"
    train_tokenizer((document.text for document in documents), model, vocab_size=_VOCABULARY)
    build_dataset(documents, load_tokenizer(model), folder / "small")
    return SmallData(folder / "small", model, documents)


@pytest.fixture(scope="session")
def six_steps(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for copies."""
    folder = tmp_path_factory.mktemp("six")
    finished = finish(folder, pretrain(*small_data.changed(*SIX_STEPS, "train.steps=6")))
    assert finished.code == 0, finished.explain()
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new mlflow.db: making its tables takes seconds, copying them does not. Workers side by side share it."""
    from mlflow import MlflowClient

    root = tmp_path_factory.getbasetemp()
    store = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "mlflow.db"
    with FileLock(f"{store}.lock"):
        if not store.is_file():
            (partial := store.with_name("partial.db")).unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{partial}").search_experiments(max_results=1)
            partial.rename(store)
    return store


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster
