"""Run folders of earlier versions: they are resumed, extended and evaluated as the version that wrote them did."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.jobs import ROOT, finish, losses, pretrain

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FIXTURES = ROOT / "tests" / "fixtures"
# fp32 on another CPU or another number of threads; another batch or lost moments are a hundred times further off.
TOLERANCE = 1e-4


@pytest.fixture(params=["run-0.1.0"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with a copy of the run, and what its own version made of it."""
    source = FIXTURES / request.param
    shutil.copytree(source / "text", tmp_path / "text")
    shutil.copytree(source / "small", tmp_path / "runs" / "small")
    return tmp_path, json.loads((source / "expected.json").read_text())


@pytest.mark.parametrize(("kind", "flags"), [("resumed", ()), ("extended", ("--extend-steps", "4"))])
def test_training_goes_on_with_the_same_losses(old: tuple[Path, dict[str, Any]], kind: str, flags: tuple[str]) -> None:
    folder, expected = old
    finished = finish(folder, pretrain("run.name=small", "--resume", "auto", *flags))
    assert finished.code == 0, finished.explain()
    found = losses(folder)
    assert list(found)[:9] == list(range(1, 10)), "the steps before it are still there"
    wanted = {int(step): loss for step, loss in expected[kind].items()}
    assert {step: found[step] for step in wanted} == pytest.approx(wanted, abs=TOLERANCE, rel=0)


def test_it_is_evaluated_and_every_file_is_whole(old: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = old
    megalm = Path(sys.executable).with_name("megalm")
    finished = finish(folder, [megalm, "checkpoint", "verify", "runs/small"])
    assert finished.code == 0, finished.explain()
    finished = finish(folder, [megalm, "evaluate", "runs/small", "--json"])
    assert finished.code == 0, finished.explain()
    row = json.loads(finished.stdout.splitlines()[-1])
    assert {name: row[name] for name in expected["evaluated"]} == pytest.approx(expected["evaluated"], abs=TOLERANCE)
