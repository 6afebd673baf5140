"""What of the input gives no document: unreadable documents, files lost from some place on, empty documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megalm.data.readers.records import CONTINUED, TextRecord
from megalm.errors import DataError
from megalm.utils.formatting import format_bytes

USUAL_SHARE = 0.01
# Without a limit of the user's, so few documents of any share may be skipped: all of them are named in PREFIX.json.
FEW_DOCUMENTS, FEW_BYTES = 20, 1 << 20


@dataclass
class Losses:
    """Counts of what was read and what was lost.

    Attributes:
        read: number of documents read, unreadable and empty ones included; `read_bytes` of them in the unpacked files.
        empty: number of documents without text. They are left out, and no loss.
        skipped: number of unreadable documents; `skipped_bytes` of them in the unpacked files.
        input_bytes: bytes of all files, as they are on disk.
        lost_files: number of files that cannot be read from some place on; `lost_bytes` on disk is what follows there.
            The reader of the files counts them, each once.
    """

    read: int = 0
    read_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    skipped_bytes: int = 0
    input_bytes: int = 0
    lost_files: int = 0
    lost_bytes: int = 0

    @classmethod
    def from_report(cls, recorded: Mapping[str, Any]) -> Losses:
        """Restore what PREFIX.json recorded; zeros for a dataset from before losses were recorded."""
        return cls(**{field.name: recorded.get(field.name, 0) for field in fields(cls)})

    def count(self, record: TextRecord) -> None:
        self.read_bytes += record.size
        if record.problem == CONTINUED:  # the rest of a document that is counted already
            self.skipped_bytes += record.size
        elif record.lost_bytes is not None:
            self.lost_bytes += record.lost_bytes
        else:
            self.read += 1
            self.empty += record.is_empty
            if record.is_loss:
                self.count_unreadable(record)

    def count_unreadable(self, record: TextRecord) -> None:
        """Count a record that is already counted as read, such as one that the tokenizer cannot encode."""
        self.skipped += 1
        self.skipped_bytes += record.size

    def add(self, other: Losses) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def lines(self) -> list[str]:
        """Return what was lost as phrases, files before documents; empty if nothing was."""
        found = []
        if self.lost_files:
            size = f"{format_bytes(self.lost_bytes)} of {format_bytes(self.input_bytes)} of input are lost"
            found.append(f"{self.lost_files:,} {_plural('file', self.lost_files)} with an unreadable part: {size}")
        if self.skipped:
            size = f" ({format_bytes(self.skipped_bytes)})" if self.skipped_bytes else ""
            found.append(f"{self.skipped:,} unreadable of {self.read:,} {_plural('document', self.read)}{size}")
        return found

    def check(self, largest_share: float | None, name: object, messages: Sequence[str]) -> None:
        """Refuse a loss above the limit.

        Args:
            largest_share: the limit, for the share of documents and the share of bytes alike; None: `USUAL_SHARE`,
                and a few documents whatever their share.
            name: what would be made of the input, for the message.
            messages: about the first losses.

        Raises:
            DataError: more is lost.
        """
        limit, share = USUAL_SHARE if largest_share is None else largest_share, self._share(largest_share is None)
        if share > limit:
            first = f", the first: {messages[0]}" if messages else ""
            raise DataError(
                f"{name}: {'; '.join(self.lines())}{first}; that is more than --max-loss {100 * limit:g}% "
                f"allows: repair the input, or accept the loss (--max-loss {min(100, int(100 * share) + 1)}%)"
            )

    def _share(self, few_are_allowed: bool) -> float:
        """Return the largest of the shares that are lost, 0 to 1."""
        shares = [_share_of(self.lost_bytes, self.input_bytes)]
        if not (few_are_allowed and self.skipped <= FEW_DOCUMENTS and self.skipped_bytes <= FEW_BYTES):
            shares += [_share_of(self.skipped, self.read), _share_of(self.skipped_bytes, self.read_bytes)]
        return max(shares)


def share_of_text(text: str, option: str) -> float:
    """Parse "1%", or a fraction such as 0.01. Without a percent sign 1 could mean either, and is refused."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 <= share <= 1 or (share == 1 and not percent):
        raise DataError(f"{option} {text}: give a share of the input, such as 1% or 0.01, from 0 to 100%")
    return share


def _share_of(part: int, whole: int) -> float:
    return min(1.0, part / whole) if whole else 0.0


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
