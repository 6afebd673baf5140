"""Looking at every byte of a checkpoint before it is used, with the time left: there may be a terabyte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.checkpoint.manifest import hashed_blocks
from megalm.errors import CheckpointError
from megalm.runs.metrics_log import Row, read_metrics, read_rows
from megalm.utils.progress import ProgressBar, sizes

if TYPE_CHECKING:
    from megalm.checkpoint.checkpoint_reader import CheckpointReader


# Reading a long metrics.jsonl where somebody waits for it: half a million rows take some seconds.

_LONG_BYTES = 20_000_000  # half a second
_ROWS_A_LOOK = 5_000


def read_watched(path: Path) -> Iterator[Row]:
    """The rows of `read_metrics`, with the time left where there are many.

    Raises:
        DataError: as there.
    """
    total = path.stat().st_size if path.is_file() else 0
    if total < _LONG_BYTES:
        yield from read_metrics(path)
        return
    with ProgressBar(f"reading {path}", total, shown=sizes) as bar:
        for number, (row, offset) in enumerate(read_rows(path)):
            yield row
            if number % _ROWS_A_LOOK == 0:
                bar.update(offset)


def verify(reader: CheckpointReader) -> None:
    """Hash every file of a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    with ProgressBar(f"checking {reader.path.name}", hashed_blocks(reader.manifest)) as counter:
        if problem := reader.verify(tell=counter.advance):
            raise CheckpointError(problem)
