"""Sizes as people write them."""

from __future__ import annotations

import re

from megalm.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


def bytes_of(text: str, option: str) -> int:
    """`5GB` and `500MB` in powers of 1000, `5GiB` in powers of 1024.

    Raises:
        ConfigError: it is no size above 0; says which `option` it was for.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        base = 1024 if match[3] else 1000
        found = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
        if found > 0:
            return found
    raise ConfigError(f"{option} {text!r} is no size; write it as 5GB, 500MB or 2GiB")
