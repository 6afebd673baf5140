"""The nearest known name for a name that nobody knows, and how such a thing is said."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where nothing is like it."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def likeness(name: str, other: str) -> float:
    """From 0 to 1."""
    return difflib.SequenceMatcher(None, name, other).ratio()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'bf16'?"`, or nothing; to be put straight after what is unknown."""
    match = nearest(name, known)
    return f", did you mean {match!r}?" if match else ""
