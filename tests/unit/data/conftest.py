"""Small datasets and a small tokenizer, made by the real code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.tokenizers.training import train_tokenizer

MakeDataset = Callable[[Sequence[int]], IndexedDataset]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """A dataset of documents with these lengths, its tokens 0, 1, 2, ... in the order of the file."""

    def make(lengths: Sequence[int]) -> IndexedDataset:
        prefix = tmp_path / f"lengths-{hash(tuple(lengths))}"
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            writer.append_documents(np.arange(sum(lengths)), list(lengths))
        return IndexedDataset(prefix)

    return make


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """Real source code, a quarter of a megabyte."""
    names = ("argparse.py", "calendar.py", "difflib.py", "shlex.py")
    files = source_files()
    return [files[name].read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Path:
    """A SentencePiece model of 600 pieces, trained on `source_texts`."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(source_texts, path, vocab_size=600)
    return path
