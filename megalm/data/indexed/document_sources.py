"""PREFIX.sources: where each document of a dataset came from, one row of 24 bytes each.

PREFIX.json has the files that `file` numbers. Readers of the dataset do without it.
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

# `line` as in records.Record; start and size are bytes of the unpacked file.
SOURCE = np.dtype([("file", "<u4"), ("size", "<u4"), ("line", "<i8"), ("start", "<i8")])


def sources_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.sources")


@dataclass(frozen=True)
class DocumentSource:
    """`name` is "file:line" as readers and errors have it; bytes [start, start + size), of a table none."""

    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.name}, bytes {self.start:,} to {self.start + self.size:,}" if self.size else self.name


class DocumentSources:
    """Looks documents up; `available` is False where the dataset was built without, or by another toolkit.

    Attributes:
        rows: SOURCE [documents], where it is available.

    Raises:
        DataError: a table that does not belong to the dataset.
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
