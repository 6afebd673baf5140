"""A run that is stopped and goes on is the run that was never stopped: the same losses to the last bit."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import s3_server
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, megalm, pretrain, rows, run_folder, train_rows
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

HALF, STEPS = 6, 12
# A rate that depends on `train.steps` would make six steps another run than the first half of twelve.
WORDS = ("schedule.kind=constant", "run.name=mine", "model.dropout=0.1")
# Of a layer with experts the routing follows from the state too; the first one is dense.
EXPERTS = (
    *("model.num_experts=4", "model.moe_intermediate_size=32", "model.num_dense_layers=1", "model.expert_bias=true"),
    "train.expert_capacity_factor=1",
)
# What a run of twelve steps says at step 7 to 12; times differ.
SAME = ("step", "tokens", "loss", "lr", "grad_norm", "loss_scale", "expert_load_max", "dropped_tokens")


@dataclass(frozen=True)
class Runs:
    straight: Path
    resumed: Path

    def second_half(self, folder: Path) -> list[dict[str, Any]]:
        return [{name: row[name] for name in SAME} for row in train_rows(folder) if row["step"] > HALF]


@pytest.fixture(scope="module")
def runs(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folders = Runs(tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("resumed"))

    def train(folder: Path, steps: int, *words: str) -> None:
        command = pretrain(*small_data.words, *WORDS, *EXPERTS, f"train.steps={steps}", *words, ranks=2)
        finished = finish(folder, command)
        assert finished.code == 0, finished.explain()

    train(folders.straight, STEPS)
    train(folders.resumed, HALF)
    train(folders.resumed, STEPS, "--resume", "auto")
    return folders


def test_losses_are_bit_equal(runs: Runs) -> None:
    assert len(runs.second_half(runs.resumed)) == STEPS - HALF
    assert runs.second_half(runs.resumed) == runs.second_half(runs.straight)


def test_data_goes_on_where_it_was(runs: Runs) -> None:
    assert [(row["step"], row["tokens"]) for row in train_rows(runs.resumed)] == [
        (step, step * 16 * 64) for step in range(1, STEPS + 1)
    ]


def test_the_account_tells_the_attempts_apart(runs: Runs) -> None:
    assert [row["attempt"] for row in train_rows(runs.resumed)] == [1] * HALF + [2] * (STEPS - HALF)
    events = [(row["event"], row["step"]) for row in rows(runs.resumed) if row["kind"] == "event"]
    assert events == [
        ("start", 0),
        ("checkpoint", HALF),
        ("end", HALF),
        ("resume", HALF),
        ("checkpoint", STEPS),
        ("end", STEPS),
    ]


def test_the_files_of_the_first_attempt_are_kept(runs: Runs) -> None:
    folder = run_folder(runs.resumed)
    steps = [
        yaml.safe_load((folder / name).read_text())["train"]["steps"]
        for name in ("config.attempt-1.yaml", "config.yaml")
    ]
    assert steps == [HALF, STEPS]
    for name in ("deepspeed.attempt-1.json", "deepspeed.resolved.attempt-1.json", "environment.attempt-1.json"):
        assert (folder / name).is_file()


def test_nothing_is_left_to_do(small_data: SmallData, runs: Runs) -> None:
    before = train_rows(runs.resumed)
    command = pretrain(*small_data.words, *WORDS, *EXPERTS, f"train.steps={STEPS}", "--resume", "auto")
    finished = finish(runs.resumed, command)
    assert finished.code == 0, finished.explain()
    assert f"step {STEPS} " in finished.stdout
    assert train_rows(runs.resumed) == before
    assert rows(runs.resumed)[-1]["status"] == "finished"


def test_a_lost_run_goes_on_from_its_copies(
    runs: Runs, small_data: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is deleted; the place of the copies is all that the next start is told."""
    place = ("run.name=mine", "checkpoint.copy_to=s3://models/backup")
    kept = ("checkpoint.copy_keep_last=1", "checkpoint.keep_last=1")
    own = ("checkpoint.interval_steps=3", f"train.steps={HALF}", *kept)
    with s3_server.s3_server() as port:
        s3_server.use(monkeypatch, port)
        s3_server.make_bucket("models")
        words = small_data.changed(*WORDS, *EXPERTS, *own, *place)
        first = finish(tmp_path, pretrain(*words, ranks=2))
        assert first.code == 0, first.explain()
        assert first.left == []
        events = [row for row in rows(tmp_path) if row["kind"] == "event"]
        assert "copied" in {row["event"] for row in events} | set(re.findall(r"\bcopied\b", first.stdout))
        before = train_rows(tmp_path)
        shutil.rmtree(run_folder(tmp_path))
        new = finish(tmp_path, pretrain(*words, ranks=2))
        assert new.code == 2, "a new run would replace the copies"
        assert_names(new.stderr, "s3://models/backup/mine", "run.name")
        second = finish(tmp_path, pretrain(*place, "--resume", "auto", f"train.steps={STEPS}", ranks=2))
        assert second.code == 0, second.explain()
        listed = finish(tmp_path, megalm("checkpoint", "list", "s3://models/backup/mine"))
        assert f"step-{STEPS:08d}" in listed.stdout, listed.explain()
        assert f"step-{HALF:08d}" not in listed.stdout
        fetched = finish(tmp_path, megalm("checkpoint", "fetch", "s3://models/backup/mine", "--root", "elsewhere"))
        assert (tmp_path / "elsewhere" / "mine" / "checkpoints" / f"step-{STEPS:08d}").is_dir(), fetched.explain()
    assert runs.second_half(tmp_path) == runs.second_half(runs.straight)
    assert train_rows(tmp_path)[:HALF] == before, "the metrics came back, too"
    assert [row["attempt"] for row in train_rows(tmp_path)] == [1] * HALF + [2] * (STEPS - HALF)
    assert s3_server.files_holding(run_folder(tmp_path), "a-secret-access-key") == []
