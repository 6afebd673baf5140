"""Numbers that a document gives as one or as two ends: arithmetic with them, and how people read them."""

from __future__ import annotations

Range = tuple[float, float]

_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"))


def agree(claimed: Range, computed: Range, tolerance: float) -> bool:
    """Whether two ranges touch, the claimed one widened by the tolerance."""
    return claimed[0] * (1 - tolerance) <= computed[1] and computed[0] <= claimed[1] * (1 + tolerance)


def times(left: Range, right: Range, factor: float = 1.0) -> Range:
    return left[0] * right[0] * factor, left[1] * right[1] * factor


def divided(left: Range, right: Range) -> Range:
    return left[0] / right[1], left[1] / right[0]


def both_ends(value: Range, form: str) -> str:
    """ "7-8", or "3" where both ends read alike."""
    low, high = (format(end, form) for end in value)
    return low if low == high else f"{low}-{high}"


def in_full(value: Range) -> str:
    return both_ends((round(value[0]), round(value[1])), ",")


def in_short(value: Range) -> str:
    """32,800,000,000 -> "32.8 B"."""
    unit, letter = next(((unit, letter) for unit, letter in _PREFIXES if value[1] >= unit), (0.0, ""))
    if not unit:
        return in_full(value)
    ends = both_ends((value[0] / unit, value[1] / unit), ".4g" if value[1] / unit >= 100 else ".3g")
    return f"{ends}{letter}"


def in_hours(value: Range) -> str:
    return f"{both_ends(value, '.3g' if value[1] < 1000 else ',.0f')} h"


def in_percent(value: Range) -> str:
    return f"{both_ends((value[0] * 100, value[1] * 100), '.2g')}%"
