"""Who holds what of a split dimension: pure integers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DimRange:
    """Elements [first, last) of a dimension, held by `sharers` neighbouring ranks, of which this is number `sharer`."""

    first: int
    last: int
    sharer: int = 0
    sharers: int = 1

    @property
    def size(self) -> int:
        return self.last - self.first


def whole_parts(features: int, parts: int, ranks: int, index: int) -> DimRange:
    """The share of rank `index` in `features` that consist of equal `parts`, none of which is cut.

    With fewer parts than ranks (key/value heads) neighbours hold the same part: the ones whose query heads need it.
    """
    assert features % parts == 0, (features, parts)
    assert parts % ranks == 0 or ranks % parts == 0, (parts, ranks)  # config.checks_parallel refuses the others
    if parts < ranks:
        sharers = ranks // parts
        part, sharer = divmod(index, sharers)
        size = features // parts
        return DimRange(part * size, (part + 1) * size, sharer, sharers)
    size = features // ranks
    return DimRange(index * size, (index + 1) * size)


def rows(total: int, ranks: int, index: int) -> DimRange:
    """The share of rank `index` in `total` rows of a vocabulary: equal but for one row.

    Shares of unequal size need no rows of padding, which would have to be kept out of losses, norms and checkpoints.
    """
    assert total >= ranks, (total, ranks)
    size, longer = divmod(total, ranks)
    first = index * size + min(index, longer)
    return DimRange(first, first + size + (index < longer))
