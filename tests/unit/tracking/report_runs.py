"""Run folders as training leaves them, and their page as a reader sees it; for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from megalm.runs.metrics_history import History, read_history
from megalm.runs.metrics_log import MetricsWriter, Row, RowBatch
from megalm.tracking.report.page import write_report

VOID = {"meta", "br", "img", "input", "link"}


def train_row(step: int, loss: float, attempt: int = 1, **other: object) -> Row:
    numbers = {"lr": 1e-3, "grad_norm": 0.5, "loss_scale": 1.0, "tokens_per_second": 640.0, "step_seconds": 0.1}
    return (
        {"kind": "train", "step": step, "tokens": step * 64, "loss": loss, "mfu": 0.2, "attempt": attempt}
        | numbers
        | other
    )


def event(name: str, step: int = 0, **fields: object) -> Row:
    return {"kind": "event", "event": name, "step": step, "attempt": 1, **fields}


def validation(step: int, loss: float, **fields: object) -> Row:
    return {"kind": "eval", "step": step, "tokens": step * 64, "loss": loss, "dataset": "validation", **fields}


END = event("end", 30, status="finished", exit_code=0)


def write_run(folder: Path, rows: Iterable[Row], **config: object) -> Path:
    """A run folder with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"preset": None, "run": {"name": folder.name}, "train": {"steps": 30}} | config
    (folder / "config.yaml").write_text(json.dumps(settings))
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for row in rows:
            writer.row(row["kind"], **{name: value for name, value in row.items() if name != "kind"})
    return folder


class Element(NamedTuple):
    """An element of a page with all the text in it; `within`: the class of what it stands in."""

    tag: str
    attributes: dict[str, str | None]
    within: str
    text: str


@dataclass
class Page(HTMLParser):
    """The elements of a page, and all its text."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    closed: list[Element] = field(default_factory=list)
    _open: list[tuple[str, dict[str, str | None], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs), len(self.texts)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, first = self._open.pop()
        assert opened == tag, f"{tag} closes nothing"
        within = str(self._open[-1][1].get("class")) if self._open else ""
        self.closed.append(Element(tag, attributes, within, " ".join(self.texts[first:])))

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] != "style" and data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def verdict(self) -> Element:
        """What became of the run; its class says it in one word."""
        (found,) = (element for element in self.closed if element.attributes.get("id") == "verdict")
        return found

    def items(self, within: str) -> list[str]:
        """The texts of what stands in the element of this class, one after the other."""
        return [element.text for element in self.closed if element.within == within]

    @property
    def rows(self) -> list[str]:
        """The rows of all tables."""
        return [element.text for element in self.closed if element.tag == "tr"]

    def lines(self, look: str) -> list[str]:
        """The paths of the curves that look so."""
        found = (attributes for tag, attributes in self.elements if tag == "path")
        return [
            str(item["d"]) for item in found if str(item.get("class", "")).split()[:2] == ["line", *look.split()][:2]
        ]

    def marks(self) -> list[str]:
        """The looks of the marks on the first chart."""
        return [
            str(item.get("class")).split()[1]
            for item in self.first_chart()
            if str(item.get("class")).startswith("mark ")
        ]

    def first_chart(self) -> Sequence[dict[str, str | None]]:
        start = next(index for index, (tag, _) in enumerate(self.elements) if tag == "svg")
        rest = self.elements[start + 1 :]
        end = next((index for index, (tag, _) in enumerate(rest) if tag == "svg"), len(rest))
        return [attributes for tag, attributes in rest[:end] if tag == "path"]


def page_of(run_dir: Path) -> Page:
    """The page that the run gets, read as HTML: every element is closed where it has to be."""
    page = Page()
    page.feed(write_report(run_dir).read_text(encoding="utf-8"))
    page.close()
    assert not page._open
    return page


def history_of(rows: Sequence[Row]) -> History:
    """The history of a run with these rows."""
    return read_history([RowBatch(list(rows))])
