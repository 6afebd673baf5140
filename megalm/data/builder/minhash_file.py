"""PREFIX.minhash: the MinHash values of a dataset's documents, for finding near copies in a merge.

Rows of u32[P], little-endian, in document order; PREFIX.json records how they were made, and their hash. Only merging
reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.builder.minhash_dedup import PERMUTATIONS, SCHEME, SEED, SHINGLE_WORDS
from megalm.data.indexed.metadata import signatures_path
from megalm.data.readers.input_files import sha256_of
from megalm.errors import DataError

MADE = {"permutations": PERMUTATIONS, "shingle_words": SHINGLE_WORDS, "seed": SEED, "scheme": SCHEME}


def open_signatures(prefix: str | Path, recorded: dict[str, Any], documents: int) -> npt.NDArray[Any]:
    """Map the values, [documents, P]; reads them once to verify their hash.

    Args:
        recorded: `minhash` of PREFIX.json.

    Raises:
        DataError: the dataset has none, they were made another way, or they do not match the recorded hash.
    """
    path, again = signatures_path(prefix), "build it again with build_dataset.py --dedup minhash"
    if not recorded:
        raise DataError(f"{prefix}: was built without signatures, so its near copies cannot be found; {again}")
    if any(recorded.get(name) != value for name, value in MADE.items()):
        raise DataError(f"{path}: its signatures differ in kind from those of this version; {again}")
    if not path.exists():
        raise DataError(f"{path}: does not exist; copy it beside the dataset, or {again}")
    size = documents * PERMUTATIONS * 4
    if path.stat().st_size != size or sha256_of(str(path)) != recorded["sha256"]:
        raise DataError(
            f"{path}: does not match {prefix}.json ({size:,} bytes expected, {path.stat().st_size:,} found); "
            f"copy it again, or {again}"
        )
    if not documents:
        return np.zeros((0, PERMUTATIONS), dtype="<u4")
    return np.memmap(path, dtype="<u4", mode="r", shape=(documents, PERMUTATIONS))
