"""Fragments as boxes of the whole parameter, so that any layout's fragments are put together from any other's.

A fragment is a flat range of a rectangle, which is a few boxes: the end of a row, whole rows, the start of a row.
Boxes of two fragments meet in boxes again, and those are copied by slices, without an index for each element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megalm.checkpoint.shard_spec import FragmentKey

Corner = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Elements from corner `first` to before `last` of the whole parameter, at `offset` of a fragment's values."""

    first: Corner
    last: Corner
    offset: int

    @property
    def sizes(self) -> Corner:
        return tuple(last - first for first, last in zip(self.first, self.last, strict=True))

    def view(self, values: Tensor, first: Corner, last: Corner) -> Tensor:
        """The part from `first` to before `last` (in the whole parameter) of a fragment's flat `values`."""
        own = values[self.offset : self.offset + math.prod(self.sizes)].view(self.sizes)
        return own[tuple(slice(a - start, b - start) for a, b, start in zip(first, last, self.first, strict=True))]


def chunks_of(key: FragmentKey) -> list[Chunk]:
    """The fragment as boxes, in the order of its values."""
    rectangle = key.rectangle or tuple((0, size) for size in key.shape)
    assert len(rectangle) == len(key.shape), key
    corner = tuple(first for first, _ in rectangle)
    found, offset = [], 0
    for first, last in _ranges(tuple(last - first for first, last in rectangle), key.start, key.stop):
        box = Chunk(_add(corner, first), _add(corner, last), offset)
        offset += math.prod(box.sizes)
        found.append(box)
    return found


def overlap(one: Chunk, other: Chunk) -> tuple[Corner, Corner] | None:
    """Corners of what two boxes share; None where they do not meet."""
    first = tuple(map(max, one.first, other.first))
    last = tuple(map(min, one.last, other.last))
    return (first, last) if all(a < b for a, b in zip(first, last, strict=True)) else None


def _ranges(sizes: Corner, start: int, stop: int) -> Iterator[tuple[Corner, Corner]]:
    """Flat elements [start, stop) of an array of `sizes` as boxes, in order."""
    if start >= stop:
        return
    inner = math.prod(sizes[1:])
    row, within = divmod(start, inner)
    if within or stop - start < inner:  # not from the start of a row, or not to its end
        end = min(stop, (row + 1) * inner)
        for first, last in _ranges(sizes[1:], within, end - row * inner):
            yield (row, *first), (row + 1, *last)
        yield from _ranges(sizes, end, stop)
        return
    rows = (stop - start) // inner
    yield (row, *(0 for _ in sizes[1:])), (row + rows, *sizes[1:])
    yield from _ranges(sizes, start + rows * inner, stop)


def _add(one: Corner, other: Corner) -> Corner:
    return tuple(a + b for a, b in zip(one, other, strict=True))
