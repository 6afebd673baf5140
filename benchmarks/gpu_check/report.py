"""What the parts of a GPU check find, as JSON, and the page of all of them. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_MARKS = {True: "yes", False: "**NO**", None: "-"}
_STATUSES = {"passed": "passed", "failed": "**FAILED**", "out of time": "**out of time**", "not run": "not run"}


@dataclass
class Report:
    """The findings of one part; each is in the file as soon as it is made, so that a killed part leaves the others.

    Attributes:
        checks: name, whether it holds (None: only reported), and what was found.
        tables: title, columns and rows of text.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value
        self._save()

    def check(self, name: str, holds: bool | None, found: str) -> None:
        self.checks.append({"check": name, "holds": holds, "found": found})
        self._save()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table, or replace the one of this title."""
        self.tables = [table for table in self.tables if table["title"] != title]
        self.tables.append({"title": title, "columns": list(columns), "rows": [list(row) for row in rows]})
        self._save()

    def _save(self) -> None:
        content = {name: value for name, value in asdict(self).items() if name != "path"}
        write_json(self.path, content)


def write_json(path: Path, content: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)


def page(result: Mapping[str, Any]) -> str:
    """The Markdown page of a check's JSON."""
    lines = [f"# GPU check, {result['date']}", ""]
    lines += [f"`{result['command']}`: {result['seconds']:.0f} s of {result['budget']:.0f}, commit {result['commit']}."]
    if result["missing"]:
        lines += ["", f"Not installed: {', '.join(result['missing'])}. {result['install']}"]
    lines += ["", *_table(["part", "result", "seconds", "what it is"], _summary(result["parts"]))]
    for part in result["parts"]:
        lines += ["", f"## {part['title']}: {_STATUSES[part['status']]}"]
        if part.get("reason"):
            lines += ["", part["reason"]]
        if part["facts"]:
            lines += ["", "; ".join(f"{name} {value}" for name, value in part["facts"].items())]
        if part["checks"]:
            rows = [[check["check"], _MARKS[check["holds"]], check["found"]] for check in part["checks"]]
            lines += ["", *_table(["check", "holds", "found"], rows)]
        for table in part["tables"]:
            lines += ["", f"{table['title']}:", "", *_table(table["columns"], table["rows"])]
        if part["log"]:
            lines += ["", "```text", *part["log"], "```"]
    return "\n".join(lines) + "\n"


def _summary(parts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[part["name"], _STATUSES[part["status"]], f"{part['seconds']:.0f}", part["title"]] for part in parts]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
