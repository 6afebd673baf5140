"""The quickstart corpus: sources and manual texts of the running Python's own standard library.

Real text that every machine has, so the first run needs no download. The same Python gives the same documents
in the same order, whatever the virtual environment or the place it is installed in.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from megalm.data.corpus import Document, ReadReport
from megalm.errors import DataError

# Not the library's text, or made on the machine where Python was built.
LEFT_OUT_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload")
)
LEFT_OUT_FILES = frozenset(("sitecustomize.py", "usercustomize.py", "pydoc_data/topics.py"))
LEFT_OUT_STARTS = ("_sysconfigdata", "_sysconfig_vars")
FEWEST_FILES = 100


def standard_library() -> Path:
    """Folder of the running Python's library, also inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path | None = None) -> dict[str, Path]:
    """Name relative to the library (with "/") -> path, of every source file that the corpus takes; sorted.

    Raises:
        DataError: a Python that comes without its library's sources.
    """
    root = standard_library() if root is None else root
    found: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT_FOLDERS and not name.startswith("config-")]
        for name in names:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name.endswith(".py") and not name.startswith(LEFT_OUT_STARTS) and relative not in LEFT_OUT_FILES:
                found[relative] = Path(folder) / name
    if len(found) < FEWEST_FILES:
        raise DataError(
            f"{root}: only {len(found)} sources of the standard library there; "
            "use a Python that has them, or state data.train"
        )
    return dict(sorted(found.items()))


def stdlib_documents(report: ReadReport | None = None) -> list[Document]:
    """All documents, in an order by the hash of their names: any contiguous part is a fair sample of the whole.

    Empty files give none; a file that is not text in its declared encoding is skipped and an exact copy of
    another document dropped, both counted in `report`.
    """
    report = ReadReport() if report is None else report
    seen: set[str] = set()
    documents = []
    for document in (*_sources(report), *_topics()):
        if document.text in seen:
            report.duplicates += 1
        elif document.text:
            seen.add(document.text)
            documents.append(document)
    report.documents += len(documents)
    return sorted(documents, key=lambda document: hashlib.sha256(document.source.encode()).digest())


def _sources(report: ReadReport) -> Iterator[Document]:
    for name, path in source_files().items():
        try:
            with tokenize.open(path) as file:  # honours the encoding that the source declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            report.skip(f"{path}: is not text in its declared encoding ({error})")
            continue
        yield Document(_newlines(text), name)


def _topics() -> Iterator[Document]:
    """The language reference that `help()` shows; a slim Python may come without."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document(_newlines(text), f"topics/{name}")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
