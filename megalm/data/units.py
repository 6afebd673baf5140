"""The units of a plan that are still to be made, and, once they are, all of them in the order of the input."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megalm.data.assembly import Placed
from megalm.data.inputs import BROKEN, unpacked
from megalm.data.layouts import layout_of
from megalm.data.parts import Part
from megalm.data.plan import BuildOptions, Group, Plan
from megalm.data.reader import Span, damage
from megalm.data.records import Block, ReadOptions, blocks_of
from megalm.data.workers import Unit

# These bytes travel to a worker through a pipe.
LARGEST_BLOCK = 16 << 20


@dataclass
class UnitList:
    """Walks the plan; `todo()` leaves out what is there already, `placed()` is for afterwards."""

    plan: Plan
    options: BuildOptions
    directory: Path

    def __post_init__(self) -> None:
        self._order: deque[tuple[str, tuple[Span, ...]]] = deque()  # not yet given by `ready`
        self._done: set[str] = set()
        self.reused = 0  # weight of the parts that were there

    def todo(self) -> Iterator[Unit]:
        """Raises DataError for a file that is not the one that was found."""
        for number, group in enumerate(self.plan.groups):
            for unit in self._units_of(f"{number:06}", group):
                self._order.append((unit.name, unit.spans))
                summary = Part(self.directory, unit.name).finished()
                if summary is not None and summary.content == unit.content_hash:
                    self.reused += unit.weight
                    self._done.add(unit.name)
                else:
                    yield unit

    def done(self, unit: Unit) -> None:
        self._done.add(unit.name)

    def ready(self) -> Iterator[Placed]:
        """Finished parts that are next in the order of the input, each once.

        Raises:
            DataError: a part is gone again.
        """
        while self._order and self._order[0][0] in self._done:
            name, spans = self._order.popleft()
            self._done.discard(name)
            part = Part(self.directory, name)
            summary = part.finished()
            if summary is None:
                raise part.damaged()
            yield Placed(part, summary, spans)

    def _units_of(self, name: str, group: Group) -> Iterator[Unit]:
        if not group.stream:
            yield Unit(name, group.spans, group.weight)
            return
        (span,) = group.spans
        layout = layout_of(span.file.kind, self.options.read)
        line = 0
        for place, block in enumerate(_blocks(span, self.options.read, min(LARGEST_BLOCK, self.plan.unit_bytes))):
            digest = hashlib.sha256(block.problem.encode() + b"\0" + block.content).hexdigest()
            here = replace(span, start=block.start)
            yield Unit(f"{name}-{place:06}", (here,), len(block.content), block, digest, line)
            line += layout.count(block.content, block.start)


def _blocks(span: Span, options: ReadOptions, block_bytes: int) -> Iterator[Block]:
    """A file that only one process can read: cut here, parsed and encoded elsewhere."""
    span.file.check_unchanged()
    layout, end = layout_of(span.file.kind, options), 0
    with span.file.open_raw() as raw:
        try:
            stream = unpacked(raw, span.file.packing)
            for block in blocks_of(stream, layout, options.largest_bytes, block_bytes):
                yield block
                end = block.start + len(block.content)
        except BROKEN as error:
            yield Block(b"", end, damage(error, span.file))
