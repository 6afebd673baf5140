"""What a message must name: keys, files, numbers, commands. How it is worded is no business of a test."""

from __future__ import annotations

import re


def assert_names(text: object, *names: object) -> None:
    """Every name occurs in the text; numbers and bare words as whole words: 3 is neither in 13 nor in 3.5."""
    for name in map(str, names):
        whole = re.fullmatch(r"[\w.,]*\w", name) is not None
        pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(name)}(?!\w)(?![.,]\d)" if whole else re.escape(name)
        assert re.search(pattern, str(text)), f"{name!r} is not in: {text}"
