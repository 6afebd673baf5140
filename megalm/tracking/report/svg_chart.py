"""Charts for the template: thinned curves, scales, and SVG paths in a frame of 1000 x 1000 that the page stretches.

The frame has no text, which would be illegible when stretched to a phone's width. Labels are HTML beside it, placed by
percent. Shapes: N points of a curve, x ascending.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megalm.runs.metrics_history import Numbers

Point = tuple[float, float]


def thinned(x: Numbers, y: Numbers, across: Scale, buckets: int) -> tuple[list[list[Point]], list[float]]:
    """Reduce a curve to the points that a screen can show, with all its peaks.

    Keeps the first, lowest, highest and last value of each of `buckets` equal parts of the scale.

    Args:
        x: [N] within the scale.
        y: [N]; NaN and infinity make gaps.

    Returns:
        The stretches of points between two gaps, and x of the first value of each bucket that is not finite.
    """
    width = (across.high - across.low) / buckets or 1.0
    bucket = np.clip(np.floor((x - across.low) / width), 0, buckets - 1)
    gaps = np.flatnonzero(~np.isfinite(y))
    firsts, lasts = np.flatnonzero(np.diff(bucket[gaps], prepend=-1)), np.flatnonzero(np.diff(bucket[gaps], append=-1))
    # A bucket with gaps has three parts: up to its first gap, around its gaps, after its last one. Gaps inside the
    # second part are not drawn: they have no width on a screen.
    cuts = np.unique(np.concatenate([np.flatnonzero(np.diff(bucket)) + 1, gaps[firsts], gaps[lasts] + 1]))
    stretches: list[list[Point]] = [[]]
    for part in np.split(np.arange(len(x)), cuts):
        known = part[np.isfinite(y[part])]
        points: list[Point] = []
        if len(known):
            kept = sorted({known[0], known[y[known].argmin()], known[y[known].argmax()], known[-1]})
            points = [(float(x[at]), float(y[at])) for at in kept]
        if len(known) == len(part):
            stretches[-1] += points
        else:
            stretches += [points, []]
    return [points for points in stretches if points], x[gaps[firsts]].tolist()


def running_median(x: Numbers, y: Numbers, points: int) -> tuple[Numbers, Numbers]:
    """Return x and value of about `points` medians, each over a fiftieth of the curve and at least five values."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) < 10:
        return x[:0], y[:0]
    half = max(2, len(y) // 100)
    centres = np.unique(np.linspace(0, len(y) - 1, min(points, len(y))).round().astype(np.int64))
    # Near the ends, windows narrow on both sides equally, so that a slope does not bend there.
    reach = np.maximum(np.minimum(np.minimum(half, centres), len(y) - 1 - centres), min(half, 2 + half // 8))
    medians = [np.median(y[max(0, at - side) : at + side + 1]) for at, side in zip(centres, reach, strict=True)]
    return x[centres], np.array(medians)


FRAME = 1000  # units of the SVG in both directions

_TICKS = 5
_NEAR_END = 0.1  # of the width: a label nearer to the last one would touch it


@dataclass(frozen=True)
class Scale:
    """Maps values to a share of the frame, 0 to 1; values beyond its ends are clamped."""

    low: float
    high: float
    logarithmic: bool = False

    @staticmethod
    def around(low: float, high: float, logarithmic: bool = False) -> Scale:
        """Return a scale a little wider than [low, high], which may be a single value."""
        if logarithmic:
            return Scale(low / 1.3, high * 1.3, True)
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        return Scale(low - room if low < 0 or low > room else 0.0, high + room)

    def share(self, value: float) -> float:
        low, high = self._of(self.low), self._of(self.high)
        return min(1.0, max(0.0, (self._of(max(value, self.low)) - low) / (high - low)))

    def percent(self, value: float) -> float:
        return round(100 * self.share(value), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Return round values and their labels."""
        if self.logarithmic:
            low, high = math.log10(self.low), math.log10(self.high)
            decades = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
            if len(decades) >= 2:
                every = math.ceil(len(decades) / _TICKS)
                return [(value, label(value)) for value in decades[::every]]
            tens = range(math.floor(low), math.ceil(high) + 1)
            values = [factor * 10.0**power for power in tens for factor in (1, 2, 5)]
            inside = [(value, label(value)) for value in values if self.low <= value <= self.high]
            return inside if len(inside) >= 3 else Scale(self.low, self.high).ticks()
        step = _round_step((self.high - self.low) / _TICKS)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(number * step, label(number * step, step)) for number in range(first, last + 1)]

    def ticks_to_end(self, whole: bool = False) -> list[tuple[float, str]]:
        """Return round values, and the end of the scale in all its digits: how far a curve goes.

        Args:
            whole: whole numbers only.
        """
        ticks = self.ticks()
        if whole:
            values = [value for value, _ in ticks if value == round(value)]
            ticks = [(value, label(value, values[1] - values[0])) for value in values]
        if any(math.isclose(value, self.high) for value, _ in ticks):
            return ticks
        end = f"{self.high:,.0f}" if whole else label(self.high)
        return [*(tick for tick in ticks if self.share(tick[0]) < 1 - _NEAR_END), (self.high, end)]

    def _of(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


@dataclass(frozen=True)
class Line:
    """A curve in the frame: an SVG path, and the CSS class of its color."""

    path: str
    look: str
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """The mark of an event; `left` in percent of the width."""

    left: float
    look: str
    title: str


@dataclass
class Chart:
    """A chart that the template draws.

    Attributes:
        across, up: scales of steps and of values.
        x_ticks: percent of the width, step, tokens.
        legend: look and name of each element.
        notes: remarks such as values beyond the scale.
    """

    name: str
    unit: str
    across: Scale
    up: Scale
    tall: bool = False
    lines: list[Line] = field(default_factory=list)
    x_ticks: list[tuple[float, str, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Percent of the height from the bottom, and the label, of each tick."""
        up = self.up
        return [(up.percent(value), text) for value, text in up.ticks() if up.low <= value <= up.high]

    def draw(self, stretches: Iterable[Sequence[Point]], look: str, title: str = "") -> None:
        if words := path(stretches, self.across, self.up):
            self.lines.append(Line(words, look, title))

    def dot(self, points: Iterable[Point], look: str, title: str = "") -> None:
        """Draw dots: points with round line ends, which stay round in a stretched frame."""
        self.draw(([point] for point in points), f"{look} dots", title)

    def mark(self, step: float, look: str, title: str) -> None:
        self.marks.append(Mark(self.across.percent(step), look, f"step {step:,.0f}: {title}"))


def path(stretches: Iterable[Sequence[Point]], across: Scale, up: Scale) -> str:
    """Return the `d` attribute of an SVG path; a single point becomes a dot."""
    words = []
    for points in stretches:
        places = [f"{FRAME * across.share(x):.1f} {FRAME * (1 - up.share(y)):.1f}" for x, y in points]
        if places:
            words.append(f"M{places[0]}" + ("h0" if len(places) == 1 else f"L{' '.join(places[1:])}"))
    return "".join(words)


def label(value: float, step: float = 0.0) -> str:
    """Format a number in few characters: 1.5M, 300, 0.02, 3e-4.

    Args:
        step: distance to the neighboring ticks, which the digits must tell apart; 0: two or three digits.
    """
    largest = max(abs(value), step)
    if value == 0:
        return "0"
    if largest >= 1e15:
        return f"{value:.0e}"
    if largest < 0.01:
        digits = max(0, _power(value) - _power(step)) if step else 1
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if digits else mantissa}e{int(exponent)}"
    unit, letter = _unit(largest)
    return f"{value / unit:.{max(0, -_power(step / unit))}f}{letter}" if step else f"{value / unit:.3g}{letter}"


def _power(value: float) -> int:
    """Return the power of ten of the first digit."""
    return math.floor(math.log10(abs(value)) + 1e-9)


def _unit(size: float) -> tuple[float, str]:
    """Return the unit for a number of this size, and its letter."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    return next((unit, letter) for unit, letter in units if size >= unit or unit == 1.0)


def _round_step(rough: float) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
