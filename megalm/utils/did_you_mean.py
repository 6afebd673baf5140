"""Suggest the nearest known name for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`, or None if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def likeness(name: str, other: str) -> float:
    """Return the similarity of two names, from 0 to 1."""
    return difflib.SequenceMatcher(None, name, other).ratio()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return e.g. `", did you mean 'bf16'?"`, or ""; append it directly to the unknown name."""
    match = nearest(name, known)
    return f", did you mean {match!r}?" if match else ""
