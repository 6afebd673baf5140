"""The order that Megatron-LM's GPTDataset gives to documents and samples, number for number.

Legend: L sequence length, T tokens of one epoch, E epochs. Kept for continuing runs of the peers; it depends on
the number of samples asked for, so a longer run sees other samples from the start.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

# A last epoch of which less than this share is needed is shuffled apart from the others.
SEPARATE_BELOW = 0.80


def count_samples(epochs: int, tokens_per_epoch: int, sequence_length: int) -> int:
    """Whole samples in so many epochs; the stream's last token can only be a label."""
    return (epochs * tokens_per_epoch - 1) // sequence_length


def count_epochs(requested: int, tokens_per_epoch: int, sequence_length: int) -> int:
    """The fewest epochs that give `requested` samples."""
    return max(1, -(-(requested * sequence_length + 1) // tokens_per_epoch))


def build(
    documents: npt.NDArray[np.int32], tokens_per_epoch: int, sequence_length: int, requested: int, seed: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(document index [E x documents], shuffle index [samples]); sample i is number shuffle[i] of the stream."""
    epochs = count_epochs(requested, tokens_per_epoch, sequence_length)
    total = count_samples(epochs, tokens_per_epoch, sequence_length)
    before_last = count_samples(epochs - 1, tokens_per_epoch, sequence_length) if epochs > 1 else 0
    per_epoch = count_samples(1, tokens_per_epoch, sequence_length)
    separate = epochs > 1 and requested - before_last < int(SEPARATE_BELOW * per_epoch)
    random = np.random.RandomState(seed)  # one state for all shuffles, in this order
    parts = [epochs - 1, 1] if separate else [epochs]
    index = []
    for part in parts:
        tiled = np.tile(documents, part)
        random.shuffle(tiled)
        index.append(tiled)
    bounds = [0, before_last, total] if separate else [0, total]
    shuffle = np.arange(total, dtype=np.int64)
    for start, end in pairwise(bounds):
        random.shuffle(shuffle[start:end])
    return np.concatenate(index), shuffle
