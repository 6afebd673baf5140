"""Documents out of text files: .jsonl, .json, .txt, .md, .parquet, and each of these packed as .gz .zst .bz2 .xz."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from megalm.data.inputs import KINDS, PACKINGS, ReadReport, find_files, find_inputs
from megalm.data.reader import Span, SpanCount, read_span, record_name
from megalm.data.records import ReadOptions
from megalm.errors import DataError

__all__ = ["KINDS", "PACKINGS", "Document", "OnError", "ReadReport", "find_files", "iter_documents"]

OnError = Literal["fail", "skip"]


class Document(NamedTuple):
    """A text, and where it came from: "file:line" or "file"."""

    text: str
    source: str


def iter_documents(
    paths: Iterable[str | Path],
    text_key: str = "text",
    on_error: OnError = "fail",
    report: ReadReport | None = None,
    options: ReadOptions | None = None,
    stdin_kind: str = ".jsonl",
) -> Iterator[Document]:
    """Documents of files, folders (all files below, sorted), globs and standard input ("-"), in the order given.

    A .txt or .md file is one document; .jsonl holds one object or string a line; .json an array of them; of an
    object, and of a parquet table, `text_key` is the text. `options` states all this more finely, in its place.

    Args:
        on_error: "skip" leaves out what cannot be read, and empty documents, and counts them in `report`; where a
            file breaks off, its rest is one such thing.

    Raises:
        DataError: with file and line, at the first thing that cannot be read; and, whatever `on_error`, for
            a path that matches nothing.
    """
    report = ReadReport() if report is None else report
    options = options or ReadOptions(text_key=text_key)
    for file in find_inputs(paths, report, stdin_kind):
        for records in read_span(Span(file), options, SpanCount()):
            for record in records:
                name = record_name(file, options, record.line)
                if record.text is not None:
                    report.documents += 1
                    yield Document(record.text, name)
                elif on_error == "fail":
                    raise DataError(f"{name}: {record.problem}; mend it, or leave such documents out (--on-error skip)")
                else:
                    report.skip(f"{name}: {record.problem}")
