"""Filter out low-quality documents by cheap measures of their text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from megalm.errors import DataError


@dataclass(frozen=True)
class Filters:
    """Bounds that a document must meet; None disables a bound.

    Attributes:
        min_characters, max_characters: length of the text.
        min_letter_share: share of letters among the characters that are not whitespace.
        max_repeated_line_share: share of characters in lines that occurred before in the same document.
        max_word_length: mean characters per word; text that is neither prose nor code (e.g. base64) has long words.

    Raises:
        DataError: a bound outside its valid range, or a minimum above its maximum.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_letter_share: float | None = None
    max_repeated_line_share: float | None = None
    max_word_length: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_letter_share", "max_repeated_line_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise DataError(f"--{name.replace('_', '-')} {share:g}: give a share from 0 to 1, such as 0.5")
        for name in ("min_characters", "max_characters", "max_word_length"):
            bound = getattr(self, name)
            if bound is not None and not 0 < bound < float("inf"):
                raise DataError(f"--{name.replace('_', '-')} {bound:g}: give a number above 0")
        if (self.min_characters or 0) > (self.max_characters or float("inf")):
            raise DataError(
                f"--min-characters {self.min_characters} is more than --max-characters {self.max_characters}, so "
                "no document can pass; change one of them"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The configured bounds, in the order in which they are checked."""
        return tuple(name for name, bound in vars(self).items() if bound is not None)

    def removes(self, text: str) -> str | None:
        """Return the first bound that the text violates, or None."""
        for name in self.names:
            bound, value = getattr(self, name), MEASURES[name.partition("_")[2]](text)
            if value < bound if name.startswith("min_") else value > bound:
                return name
        return None


def letter_share(text: str) -> float:
    dense = "".join(text.split())
    return sum(map(str.isalpha, dense)) / max(1, len(dense))


def repeated_line_share(text: str) -> float:
    counts = Counter(line.strip() for line in text.splitlines())
    repeated = sum(len(line) * (times - 1) for line, times in counts.items())
    return repeated / max(1, sum(len(line) * times for line, times in counts.items()))


def mean_word_length(text: str) -> float:
    words = text.split()
    return sum(map(len, words)) / max(1, len(words))


MEASURES: dict[str, Callable[[str], float]] = {
    "characters": len,
    "letter_share": letter_share,
    "repeated_line_share": repeated_line_share,
    "word_length": mean_word_length,
}
