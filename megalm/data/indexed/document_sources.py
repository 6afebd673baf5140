"""PREFIX.sources: the origin of each document of a dataset, one 24-byte row per document.

`file` indexes the file list in PREFIX.json. The file is optional for readers of the dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.data.indexed.dataset import sidecar_path
from megalm.data.readers.document_reader import record_name
from megalm.data.readers.input_files import InputFile
from megalm.data.readers.records import ReadOptions
from megalm.errors import DataError
from megalm.utils.atomic_files import read_json

# `line` as in records.TextRecord; start and size are bytes of the unpacked file.
SOURCE = np.dtype([("file", "<u4"), ("size", "<u4"), ("line", "<i8"), ("start", "<i8")])


def sources_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.sources")


@dataclass(frozen=True)
class DocumentSource:
    """Origin of a document: `name` is "file:line" as in errors; bytes [start, start + size), size 0 for table rows."""

    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.name}, bytes {self.start:,} to {self.start + self.size:,}" if self.size else self.name


class DocumentSources:
    """Looks up documents' origins; `available` is False if the dataset has no PREFIX.sources.

    Attributes:
        rows: SOURCE [documents], if available.

    Raises:
        DataError: the file does not match the dataset.
    """

    def __init__(self, prefix: str | Path, documents: int) -> None:
        path = sources_path(prefix)
        self.available = path.exists() and documents > 0
        if not self.available:
            return
        size = path.stat().st_size
        if size != documents * SOURCE.itemsize:
            raise DataError(
                f"{path}: {documents * SOURCE.itemsize:,} bytes expected for {documents:,} documents, {size:,} found; "
                "copy or build it again"
            )
        self.rows = np.memmap(path, dtype=SOURCE, mode="r")
        sidecar = read_json(sidecar_path(prefix))
        self._files = [InputFile(file["path"], file["kind"]) for file in sidecar["inputs"]]
        self._options = ReadOptions(documents=sidecar["options"]["read"]["documents"])

    def __getitem__(self, document: int) -> DocumentSource | None:
        if not self.available:
            return None
        row = self.rows[document]
        name = record_name(self._files[row["file"]], self._options, int(row["line"]))
        return DocumentSource(name, int(row["start"]), int(row["size"]))
