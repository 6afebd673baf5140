"""The GPU check in miniature on a CPU: a part that passes, one that hangs, one that lacks a package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu_check.__main__ import PARTS, check

pytestmark = pytest.mark.e2e

BY_NAME = {part.name: part for part in PARTS}
# Seconds that parity needs for its imports alone are more than it gets here.
WANTED = (
    replace(BY_NAME["overlap"], needs=("torch", "no_such_package")),
    replace(BY_NAME["parity"], weight=20),
    replace(BY_NAME["machine"], weight=80),
)


def test_each_part_ends_and_is_on_the_page(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    result = check(WANTED, "cpu", 40, tmp_path)
    assert {part["name"]: part["status"] for part in result["parts"]} == {
        "overlap": "not run",
        "parity": "out of time",
        "machine": "passed",
    }
    assert json.loads((tmp_path / "RESULT.json").read_text()) == result
    assert result["missing"] == ["no_such_package"]
    assert "no_such_package" in result["parts"][0]["reason"]
    machine = result["parts"][2]
    assert machine["facts"]["torch"]
    assert machine["tables"][0]["rows"]
    page = (tmp_path / "RESULT.md").read_text()
    assert all(part.title in page for part in WANTED)
    assert set(psutil.Process().children(recursive=True)) <= before
