"""Looking at every byte of a checkpoint before it is used, with the time left: there may be a terabyte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalm.checkpoint.manifest import hashed_blocks
from megalm.cli.progress import Counter
from megalm.errors import CheckpointError

if TYPE_CHECKING:
    from megalm.checkpoint.load import CheckpointReader


def verify(reader: CheckpointReader) -> None:
    """Hash every file of a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    with Counter(f"checking {reader.path.name}", hashed_blocks(reader.manifest)) as counter:
        if problem := reader.verify(tell=counter.advance):
            raise CheckpointError(problem)
