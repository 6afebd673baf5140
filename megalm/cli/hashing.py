"""Looking at every byte of a checkpoint before it is used, with the time left: there may be a terabyte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalm.checkpoint.manifest import HASH_BLOCK_BYTES
from megalm.cli.progress import Counter
from megalm.errors import CheckpointError

if TYPE_CHECKING:
    from megalm.checkpoint.load import CheckpointReader


def verify(reader: CheckpointReader) -> None:
    """Hash every file of a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    with Counter(f"checking {reader.path.name}", blocks_of(reader.manifest)) as counter:
        if problem := reader.verify(tell=counter.advance):
            raise CheckpointError(problem)


def blocks_of(manifest: Mapping[str, Any]) -> int:
    """How often hashing a whole checkpoint tells that it has come further."""
    return sum(-(-facts["bytes"] // HASH_BLOCK_BYTES) for facts in manifest["files"].values())
