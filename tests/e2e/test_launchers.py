"""The same job under every launcher and on any number of ranks: the same batch, the same losses, exit code 0.

And without one, as most tests of this folder run it. One rank of deepspeed is in test_own_text.py.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, losses, own_lines, pretrain, run_folder, train_rows

pytestmark = pytest.mark.e2e

STEPS = 12
STARTS = {
    "python": ("python", 1),
    "deepspeed 2": ("deepspeed", 2),
    "torchrun 2": ("torchrun", 2),
    "forked 4": ("forked", 4),
}


@dataclass(frozen=True)
class Outcome:
    finished: Finished
    losses: dict[int, float]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]


@pytest.fixture(scope="module")
def outcomes(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    def outcome(name: str, folder: Path) -> Outcome:
        using, ranks = STARTS[name]
        # A shell's own setting must not decide how fast, or in which order, a rank adds.
        environment = {"OMP_NUM_THREADS": "7"} if name == "python" else {}
        command = pretrain(*small_data.changed("train.rehearse=true", f"train.steps={STEPS}"), using=using, ranks=ranks)
        finished = finish(folder, command, environment=environment)
        assert finished.code == 0, finished.explain()
        facts = json.loads((run_folder(folder) / "environment.json").read_text())
        return Outcome(finished, losses(folder), train_rows(folder), facts)

    folders = [tmp_path_factory.mktemp("launch") for _ in STARTS]
    with ThreadPoolExecutor(2) as pool:  # a launcher mostly imports, on one core
        return dict(zip(STARTS, pool.map(outcome, STARTS, folders), strict=True))


@pytest.mark.parametrize("name", list(STARTS))
def test_every_launcher_trains_the_same_model(outcomes: dict[str, Outcome], name: str) -> None:
    expected, found = outcomes["python"].losses, outcomes[name].losses
    assert list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-5)
    # Adam and clipping hide a gradient of the wrong size; its norm, which feels rounding more, does not.
    norms = [[row["grad_norm"] for row in outcomes[each].rows] for each in ("python", name)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert [row["tokens"] for row in outcomes[name].rows] == [16 * 64 * step for step in range(1, STEPS + 1)]
    assert found[STEPS] < found[1] - 0.2  # equal to a model that stands still would prove nothing


@pytest.mark.parametrize("name", list(STARTS))
def test_threads_are_the_cores_divided(outcomes: dict[str, Outcome], name: str) -> None:
    using, ranks = STARTS[name]
    expected = 1 if using == "forked" else max(1, len(os.sched_getaffinity(0)) // ranks)
    assert outcomes[name].environment["threads_per_rank"] == expected
    assert re.search(rf"\b{ranks} rank.*\b{expected} thread", outcomes[name].finished.stdout)


@pytest.mark.parametrize("name", list(STARTS))
def test_people_see_one_rank_and_no_noise(outcomes: dict[str, Outcome], name: str) -> None:
    finished = outcomes[name].finished
    assert finished.left == []
    assert len(re.findall(rf"^step {STEPS}/{STEPS}  loss", finished.stdout, re.MULTILINE)) == 1
    assert own_lines(finished.stderr) == [], finished.stderr


def test_another_seed_is_seen(small_data: SmallData, outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    """The comparison can fail: another order of the data gives other losses."""
    command = pretrain(*small_data.words, f"train.steps={STEPS}", "train.seed=99")
    finished = finish(tmp_path, command)
    assert finished.code == 0, finished.explain()
    assert losses(tmp_path) != pytest.approx(outcomes["python"].losses, rel=1e-5)
