"""Real text, a tokenizer and a dataset for the jobs of this folder, made once by the real code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megalm.data.builder.builder import build_dataset
from megalm.data.builder.stdlib_corpus import source_files
from megalm.data.readers.document_reader import Document
from megalm.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from tests.e2e.jobs import SMALL

_SOURCES = ("argparse.py", "calendar.py", "difflib.py", "shlex.py", "textwrap.py", "heapq.py", "string.py", "cmd.py")
_VOCABULARY = 600


@dataclass(frozen=True)
class SmallData:
    """About 60,000 tokens; the last tenth of its documents is validated on."""

    prefix: Path
    tokenizer: Path
    documents: list[Document]
    vocabulary: int = _VOCABULARY

    @property
    def words(self) -> tuple[str, ...]:
        """What the training command is told: this data and a small model."""
        return (f"data.train={self.prefix}", f"data.tokenizer={self.tokenizer}", "data.split=90,10", *SMALL)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    folder = tmp_path_factory.mktemp("data")
    files = source_files()
    # Pieces of a file each, so that a tenth of the documents is a tenth of the text.
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
