"""`--dry-run`: what a run amounts to, for any number of ranks; nothing is started or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.config.loading import load_run_config
from megalm.model.model_config import build_model_config
from megalm.model.transformer import LanguageModel
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, pretrain

pytestmark = pytest.mark.e2e


def test_tells_everything_and_touches_nothing(small_data: SmallData, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("preset: quickstart\ntrain: {steps: 50}\n")
    before = sorted(tmp_path.rglob("*"))
    words = (*small_data.words, "--config", "mine.yaml", "--dry-run")
    command = pretrain(*words, using="python", json_file="zero3.json")
    finished = finish(tmp_path, command, environment={"MEGALM_CACHE": str(tmp_path / "cache")})
    assert finished.code == 0, finished.explain()
    assert finished.stderr == ""
    assert sorted(tmp_path.rglob("*")) == before
    lines = {tuple(line.split()) for line in finished.stdout.splitlines()}
    assert ("model.hidden_size", "64", "command", "line") in lines
    assert ("train.steps", "50", "mine.yaml") in lines
    assert ("train.log_interval_steps", "1", "default") in lines
    assert any(
        line[0] == "schedule.peak_learning_rate" and line[2:] == ("preset", "quickstart") for line in lines if line
    )
    assert ("tokens", "per", "step", "1,024") in lines
    assert ("total", "tokens", "51,200") in lines
    assert ("ZeRO", "stage", "3") in lines
    (total,) = (line[1] for line in lines if line[:1] == ("total",) and "," in line[1])
    assert int(total.replace(",", "")) == parameters(small_data)
    for part in ("Memory of one rank", "activations", "gradients", "available"):
        assert part in finished.stdout


def parameters(small_data: SmallData) -> int:
    """Those that the model really has."""
    config = load_run_config(None, small_data.words).config
    model = LanguageModel(build_model_config(config.model, small_data.vocabulary, config.data.sequence_length))
    return sum(parameter.numel() for parameter in model.parameters())


def test_plans_for_a_cluster(small_data: SmallData, tmp_path: Path) -> None:
    finished = finish(tmp_path, pretrain(*small_data.words, "--dry-run", "--world-size", "16"))
    assert finished.code == 0, finished.explain()
    assert "16 = pipeline 1 x data 16 x tensor 1" in finished.stdout
    assert "1 x 1 x 16" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_tells_the_grid(small_data: SmallData, tmp_path: Path) -> None:
    grid = ("parallel.tensor=2", "parallel.pipeline=2", "--world-size", "64", "--ranks-per-node", "4")
    finished = finish(tmp_path, pretrain(*small_data.words, *grid, "--dry-run", json_file="zero1.json"))
    assert finished.code == 0, finished.explain()
    assert "64 = pipeline 2 x data 16 x tensor 2\n" in finished.stdout
    (stage,) = (line for line in finished.stdout.splitlines() if line.strip().startswith("stage 1"))
    assert "32-63" in stage
    assert "8-15" in stage
    assert "50.0%" in next(line for line in finished.stdout.splitlines() if "(this run)" in line)
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_the_run_would_refuse(small_data: SmallData, tmp_path: Path) -> None:
    """16 sequences a step do not divide among 64 ranks."""
    finished = finish(tmp_path, pretrain(*small_data.words, "--dry-run", "--world-size", "64"))
    assert finished.code == 2, finished.explain()
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("megalm: ")
    assert "train_batch_size" in line
    assert "64" in line


def test_of_several_ranks_one_tells(small_data: SmallData, tmp_path: Path) -> None:
    finished = finish(tmp_path, pretrain(*small_data.words, "--dry-run", ranks=2))
    assert finished.code == 0, finished.explain()
    assert finished.stdout.count("2 = pipeline 1 x data 2 x tensor 1") == 1
    assert not (tmp_path / "runs").exists()
