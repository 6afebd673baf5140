"""Cut texts into normalized words and hash them, a piece of text at a time, with arrays only.

A word is a run of letters and digits of any script; everything else separates. Case, accents and width of a character
do not count, nor do invisible characters in a word. Each character of a script that is written without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese) is a word of its own. n: words, C: characters.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.builder.disk_hash_table import SPREAD, Int64s, UInt64s

PIECE = 1 << 17  # characters that are hashed at once: their arrays stay in the processor's cache
ASCII = 128
SEPARATOR, INSIDE, ALONE, IGNORED = range(4)
Kinds = npt.NDArray[np.uint8]
# Scripts without spaces between words; the supplementary planes 2 and 3 are Chinese.
_ALONE = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x9FFF))
_CHINESE = range(0x20000, 0x40000)


class Words(NamedTuple):
    """Hashes [n] of a text's words, and the characters [first, end) of the text that each of them is."""

    hashes: UInt64s
    first: Int64s
    end: Int64s


def words_of(text: str) -> Words:
    """Return the words of a text. One that is longer than PIECE, which no prose has, counts as several."""
    if len(text) <= PIECE:
        return _words_of_piece(text)
    hashes, first, end = zip(*_pieces(text), strict=True)
    return Words(np.concatenate(hashes), np.concatenate(first), np.concatenate(end))


def _pieces(text: str) -> Iterator[Words]:
    start = 0
    while start < len(text):
        found = _words_of_piece(text[start : start + PIECE])
        stop = start + PIECE
        if stop < len(text) and len(found.end) > 1 and start + int(found.end[-1]) == stop:
            stop = start + int(found.first[-1])  # this word may continue
            found = Words(found.hashes[:-1], found.first[:-1], found.end[:-1])
        yield Words(found.hashes, found.first + start, found.end + start)
        start = stop


def _words_of_piece(text: str) -> Words:
    if text.isascii():
        raw = text.encode("ascii")
        values, kinds = _ascii_table()
        inside = np.frombuffer(raw.translate(kinds), dtype=np.bool_)
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        first, end = edges[0::2], edges[1::2]
        return Words(_hashes(values.take(np.frombuffer(raw, dtype=np.uint8)), first), first, end)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    values, all_kinds = _table_of(sys.maxunicode + 1)
    found = all_kinds.take(codes)
    places = np.flatnonzero(found != IGNORED)
    if whole := len(places) == len(codes):
        places = np.arange(0)
    else:
        codes, found = codes[places], found[places]
    apart = (found[1:] != found[:-1]) | (found[1:] == ALONE)  # a word or a gap begins behind the first character
    edges = np.concatenate((np.zeros(1, np.bool_), apart, np.zeros(1, np.bool_)))
    edges[0] = edges[-1] = True
    inside = found != SEPARATOR
    first, end = np.flatnonzero(edges[:-1] & inside), np.flatnonzero(edges[1:] & inside) + 1
    hashes = _hashes(values.take(codes), first)
    return Words(hashes, first, end) if whole else Words(hashes, places[first], places[end - 1] + 1)


def _hashes(values: UInt64s, first: Int64s) -> UInt64s:
    """Return the hashes of the words that begin at `first`; what separates words has the value 0."""
    if not len(first):
        return np.zeros(0, dtype=np.uint64)
    powers, inverses = _powers()
    sums = np.add.reduceat(values * powers[: len(values)], first) * inverses[first]
    sums = (sums ^ (sums >> np.uint64(32))) * np.uint64(SPREAD)
    return sums ^ (sums >> np.uint64(29))


@functools.cache
def _powers() -> tuple[UInt64s, UInt64s]:
    """Return [PIECE] the powers of an odd number modulo 2^64, and their inverses."""
    base = 0xD6E8FEB86659FD93
    return _powers_of(base), _powers_of(pow(base, -1, 1 << 64))


def _powers_of(base: int) -> UInt64s:
    factors = np.full(PIECE, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


@functools.cache
def _ascii_table() -> tuple[UInt64s, bytes]:
    values, kinds = _table_of(ASCII)
    return values, kinds.tobytes().ljust(256, b"\0")


@functools.cache
def _table_of(count: int) -> tuple[UInt64s, Kinds]:
    """Return [C] a number for each character, equal for those that count as one and 0 if it separates; and its kind."""
    folded, kinds = np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.uint8)
    for code in range(min(count, _CHINESE.start)):
        character = chr(code)
        kind = _kind_of(character)
        kinds[code] = kind
        if kind == INSIDE and not (0xAC00 <= code < 0xD7A4):  # Hangul syllables have no case
            folded[code] = ord(_folded(character))
    kinds[_CHINESE.start : _CHINESE.stop] = ALONE
    mixed = (folded + np.uint64(1)) * np.uint64(SPREAD)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed[(kinds == SEPARATOR) | (kinds == IGNORED)] = 0
    return mixed, kinds


def _kind_of(character: str) -> int:
    category = unicodedata.category(character)
    if category == "Cf" or unicodedata.combining(character):
        return IGNORED
    if category[0] not in "LNM":
        return SEPARATOR
    return ALONE if any(low <= ord(character) <= high for low, high in _ALONE) else INSIDE


def _folded(character: str) -> str:
    """Return the character without case, accent and width; as it is if it stands for several."""
    bare = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
    lower = (bare[0] if len(bare) == 1 else character).casefold()
    return lower if len(lower) == 1 else character


class Group(NamedTuple):
    """Texts that were hashed together: `bounds` [texts + 1] of their words, `starts` [texts] of their characters.

    Characters are counted in the joined text, also those of `words`.
    """

    first_text: int
    words: Words
    bounds: Int64s
    starts: Int64s


def grouped_words(texts: Sequence[str]) -> Iterator[Group]:
    """Yield the words of texts, many short ones at a time; those of a text do not depend on the texts around it."""
    first = 0
    while first < len(texts):
        end, size = first + 1, len(texts[first])
        while end < len(texts) and size + len(texts[end]) < PIECE:
            size += len(texts[end]) + 1
            end += 1
        lengths = np.array([len(text) + 1 for text in texts[first:end]], dtype=np.int64)
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        words = words_of("\n".join(texts[first:end]))
        yield Group(first, words, np.searchsorted(words.first, starts), starts[:-1])
        first = end
