"""Curves cut down to what a screen can show, with every peak still there.

Shapes: N points of a curve, x rising.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.tracking.history import Numbers

Point = tuple[float, float]


@dataclass(frozen=True)
class Thinned:
    """A curve to draw.

    Attributes:
        stretches: points between two gaps; a gap is where a value is no number.
        no_numbers: x of the first such value of each bucket.
    """

    stretches: list[list[Point]]
    no_numbers: list[float]


def thinned(x: Numbers, y: Numbers, low: float, high: float, buckets: int) -> Thinned:
    """Of each of `buckets` equal parts of [low, high] the first, the lowest, the highest and the last value.

    Args:
        x: [N] within [low, high].
        y: [N]; NaN and infinity are no numbers.
    """
    if not len(x):
        return Thinned([], [])
    width = (high - low) / buckets or 1.0
    number = np.clip(np.floor((x - low) / width), 0, buckets - 1)
    edges = np.flatnonzero(np.diff(number)) + 1
    stretches: list[list[Point]] = [[]]
    no_numbers: list[float] = []
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(x)], strict=True):
        part_x, part_y = x[start:end], y[start:end]
        known = np.isfinite(part_y)
        if known.all():
            stretches[-1] += _outline(part_x, part_y)
            continue
        no_numbers.append(float(part_x[~known][0]))
        if not known[0] and stretches[-1]:
            stretches.append([])
        for points in _between_gaps(part_x, part_y, known):
            stretches[-1] += _outline(*points)
            stretches.append([])
        if known[-1]:  # the curve goes on from there
            stretches.pop()
    return Thinned([points for points in stretches if points], no_numbers)


def running_median(x: Numbers, y: Numbers, points: int) -> tuple[Numbers, Numbers]:
    """About `points` medians, each over a fiftieth of the curve around it and at least five values."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) < 10:
        return x[:0], y[:0]
    half = max(2, len(y) // 100)
    centres = np.unique(np.linspace(0, len(y) - 1, min(points, len(y))).round().astype(np.int64))
    # At the ends a window gets narrower on both sides alike: a slope does not bend there.
    reach = np.maximum(np.minimum(np.minimum(half, centres), len(y) - 1 - centres), min(half, 2 + half // 8))
    medians = [np.median(y[max(0, at - side) : at + side + 1]) for at, side in zip(centres, reach, strict=True)]
    return x[centres], np.array(medians)


def _outline(x: Numbers, y: Numbers) -> list[Point]:
    chosen = sorted({0, int(y.argmin()), int(y.argmax()), len(x) - 1})
    return [(float(x[at]), float(y[at])) for at in chosen]


def _between_gaps(x: Numbers, y: Numbers, known: npt.NDArray[np.bool_]) -> list[tuple[Numbers, Numbers]]:
    """What of a bucket is before its first gap, and after its last: what is between has no width on a screen."""
    gaps = np.flatnonzero(~known)
    parts = [slice(0, gaps[0]), slice(gaps[-1] + 1, len(x))]
    inside = np.flatnonzero(known[gaps[0] : gaps[-1] + 1]) + gaps[0]
    found = [(x[part], y[part]) for part in parts]
    if len(inside):
        found.insert(1, (x[inside], y[inside]))
    return [(part_x, part_y) for part_x, part_y in found if len(part_x)]
