"""Trains the parity matrix and writes it as a table: `make parity`.

    python -m tests.distributed.parity_table [LAYOUT ...] [--write]

Without `--write` the table is only printed; with it, the part of docs/parallelism.md between its markers is replaced.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalm.parity.state_comparison import Difference, Outcome, difference
from tests.distributed.parity import LAYOUTS, Row, rows, train_rows
from tests.distributed.training import ROOT, Case, make_dataset
from tests.ranks import run_ranks

DOCUMENT = ROOT / "docs" / "parallelism.md"
STEPS = 5  # more than in the tests, so that the figures show how roundings grow
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
_HEADINGS = (
    "layout",
    "ranks",
    "model",
    "numbers",
    "ZeRO",
    "initial weights",
    "losses",
    "norms",
    "weights",
    "moments",
)


class Matrix:
    """Trains the `wanted` rows, those of a layout at the first call for one, and one rank's run of each model once."""

    def __init__(self, folder: Path, wanted: Sequence[Row], step_count: int) -> None:
        self._folder = folder
        self._wanted = wanted
        self._step_count = step_count
        self._references: dict[str, Outcome] = {}
        self._differences: dict[Row, Difference] = {}
        self._failures: dict[Row, BaseException] = {}
        make_dataset(folder / "data")

    def difference(self, row: Row) -> Difference:
        """A row's difference to one rank."""
        if row in self._failures:  # once: each row asks
            raise AssertionError(f"{row.layout} failed before") from self._failures[row]
        if row not in self._differences:
            together = [other for other in self._wanted if other.layout == row.layout]
            try:
                self._differences |= self._compare(together)
            except BaseException as error:
                self._failures |= dict.fromkeys(together, error)
                raise
        return self._differences[row]

    def reference(self, row: Row) -> Outcome:
        if row.reference not in self._references:
            cases = {wanted.reference: wanted.reference_case() for wanted in (row, *self._wanted)}
            missing = {name: case for name, case in cases.items() if name not in self._references}
            self._references |= self._train("one rank", 1, missing)[0]
        return self._references[row.reference]

    def _compare(self, together: Sequence[Row]) -> dict[Row, Difference]:
        layout = together[0].layout
        trained = self._train(layout, LAYOUTS[layout].ranks, {row.name: row.case() for row in together})
        return {row: difference([rank[row.name] for rank in trained], self.reference(row)) for row in together}

    def _train(self, name: str, ranks: int, cases: Mapping[str, Case]) -> list[dict[str, Outcome]]:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        arguments = cases, self._folder / "data", folder, self._step_count
        return run_ranks(ranks, train_rows, *arguments, timeout_seconds=550)


def table(layouts: Sequence[str], matrix: Matrix) -> list[str]:
    """Lines of Markdown: a row for all ZeRO stages of a layout, model and precision, with their largest differences."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    for layout in layouts:
        for cells in keys(layout):
            alike = [matrix.difference(row) for row in rows(layout) if _key(row) == cells]
            worst = [
                f"{max(getattr(each, name) for each in alike):.0e}" for name in ("loss", "norm", "weights", "moments")
            ]
            equal = "equal" if not any(each.initial_weights for each in alike) else "DIFFER"
            lines.append("| " + " | ".join((*cells, equal, *worst)) + " |")
    return lines


def keys(layout: str) -> list[tuple[str, ...]]:
    """What names the table's rows of a layout: the cells before the figures."""
    return list(dict.fromkeys(_key(row) for row in rows(layout)))


def _key(row: Row) -> tuple[str, ...]:
    alike = [other for other in rows(row.layout) if (other.model, other.numbers) == (row.model, row.numbers)]
    stages = " ".join(str(zero) for zero in sorted(other.zero for other in alike))
    return row.layout, str(LAYOUTS[row.layout].ranks), row.model, row.numbers, stages


def replaced(text: str, lines: Sequence[str]) -> str:
    """The document with `lines` between its markers."""
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, *lines, END + rest.split(END)[1]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"default all: {', '.join(LAYOUTS)}")
    parser.add_argument("--write", action="store_true", help=f"replace the table in {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    unknown = set(arguments.layouts) - set(LAYOUTS)
    if unknown or (arguments.write and arguments.layouts):
        parser.error(f"no such layout: {', '.join(unknown)}" if unknown else "--write takes all layouts")
    layouts = arguments.layouts or list(LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        wanted = [row for layout in layouts for row in rows(layout)]
        matrix, start = Matrix(Path(folder), wanted, STEPS), time.monotonic()
        lines = table(layouts, matrix)
        found = {row: matrix.difference(row) for row in wanted}
    wrong = [f"{row.name}: {'; '.join(each.beyond(row.tolerance))}" for row, each in found.items()]
    wrong = [line for line in wrong if not line.endswith(": ")]
    sys.stdout.write("\n".join([*lines, "", *wrong, ""]))
    sys.stdout.write(f"{len(found)} rows, {len(wrong)} of them beyond tolerance, {time.monotonic() - start:.0f} s\n")
    if arguments.write and not wrong:
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), lines))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
