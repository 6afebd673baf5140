"""What a test holds a message to: the names in it, never its sentences."""

from __future__ import annotations

import re


def assert_names(text: object, *names: object) -> None:
    """Every name stands in the text (an error, a notice, a table) as a whole word.

    A name is a key, a file, a number, an option, with or without a value: `train.steps`, `train.steps=7`, 16. It does
    not count as part of a longer one: 16 is not in 16.5, 1,016 or 160, nor `train` in `train.steps`.
    """
    missing = [name for name in map(str, names) if not _occurs(name, str(text))]
    assert not missing, f"{missing} not named in: {text}"


def _occurs(name: str, text: str) -> bool:
    assert name, "every text holds the empty name"
    before = r"(?<![\w.])(?<!\d,)" if re.match(r"\w", name) else ""
    after = r"(?![\w]|[.,]\d|\.\w)" if re.search(r"\w$", name) else ""
    return re.search(before + re.escape(name) + after, text) is not None
