"""A rank of a real job is killed in the middle of a save: the next job goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.manifest import read_manifest
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, losses, pretrain, rows, run_folder, train_rows

pytestmark = pytest.mark.e2e

STEPS, INTERVAL = 8, 2
KILLED = Path(__file__).with_name("killed_pretrain.py")
WORDS = (f"train.steps={STEPS}", "run.name=mine", "model.dropout=0.1", "schedule.kind=constant")
SETTINGS = (f"checkpoint.interval_steps={INTERVAL}", "checkpoint.keep_last=2")
VALIDATION = (f"evaluate.interval_steps={INTERVAL}", "evaluate.max_samples=16", "checkpoint.best=true")
LEFT = ["best", "latest", "step-00000006", "step-00000008"]  # 6 is the best on those samples, too
ASYNC = "checkpoint.async=true"

# Rank, save, call and how many of its kind come first; and whether training goes on meanwhile. Two are slow:
# tests/distributed/test_checkpoint_kills.py kills a save at each of its moments.
MOMENTS = {
    "rank 1 in its own file": ("1:2:write:5", False),
    "rank 0 before the manifest": ("0:2:replace:3", False),
    "rank 0 before the rename": ("0:2:rename:0", False),
    "rank 0 deleting an old one": ("0:3:unlink:2", False),
    "rank 1 in its own file, behind training": ("1:2:write:5", True),
    "rank 0 before the rename, behind training": ("0:2:rename:0", True),
}

SELDOM = ("rank 0 before the manifest", "rank 0 before the rename")


def _words(small_data: SmallData, behind: bool = False) -> tuple[str, ...]:
    own = [word for word in small_data.words if not word.startswith(("checkpoint.", "evaluate."))]
    return (*own, *WORDS, *SETTINGS, *VALIDATION, *([ASYNC] if behind else []))


def _end_state(folder: Path) -> dict[str, Any]:
    """Of the last checkpoint: the hash of every rank's file, which is weights and moments to the last bit; what it says
    of counters, data, schedule and validation; and which is the best.
    """
    checkpoints = run_folder(folder) / "checkpoints"
    manifest = read_manifest(checkpoints / f"step-{STEPS:08d}")
    files = {name: stored.sha256 for name, stored in manifest.files.items() if name.startswith("rank-")}
    said = ("tokens", "counters", "data_position", "schedule", "best_validation_loss", "stale_evaluations")
    return {**files, **{name: manifest.content[name] for name in said}, "best": (checkpoints / "best").read_text()}


def _validation(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if row["kind"] == "eval"}


@pytest.fixture(scope="module")
def straight(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    finished = finish(folder, pretrain(*_words(small_data), ranks=2))
    assert finished.code == 0, finished.explain()
    kept = sorted(path.name for path in (run_folder(folder) / "checkpoints").iterdir())
    assert kept == LEFT
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in MOMENTS]
)
def test_goes_on_as_if_nothing_had_happened(small_data: SmallData, straight: Path, tmp_path: Path, name: str) -> None:
    moment, behind = MOMENTS[name]
    words = _words(small_data, behind)
    command = pretrain(*words, ranks=2)
    command[command.index(next(word for word in command if str(word).endswith("pretrain.py")))] = KILLED
    killed = finish(tmp_path, command, environment={"MEGALM_TEST_KILL": moment}, patience_seconds=20)
    assert killed.code not in (0, 2, 75), killed.explain()
    assert killed.left == []
    save = int(moment.split(":")[1])
    assert train_rows(tmp_path)[-1]["step"] >= save * INTERVAL

    resumed = finish(tmp_path, pretrain(*words, "--resume", "auto", ranks=2))
    assert resumed.code == 0, resumed.explain()
    assert losses(tmp_path) == losses(straight)
    assert _end_state(tmp_path) == _end_state(straight)
    assert _validation(tmp_path) == _validation(straight)
    again = [row["step"] for row in train_rows(tmp_path) if row["attempt"] == 2]
    assert again[0] in ((save - 1) * INTERVAL + 1, save * INTERVAL + 1)  # no more than one interval is lost
    left = sorted(path.name for path in (run_folder(tmp_path) / "checkpoints").iterdir())
    assert left == LEFT
    assert [row["event"] for row in rows(tmp_path) if row["kind"] == "event"][-1] == "end"
