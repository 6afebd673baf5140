"""`megalm sweep` before it starts anything: whose command it runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli.jobs.run_words import split_launcher
from megalm.cli.main import main
from megalm.errors import ConfigError
from tests.messages import assert_names

PYTHON = ("python", "launch/pretrain.py")


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *words])
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_of_a_run_is_what_follows_the_dashes() -> None:
    assert split_launcher(["deepspeed", "--num_gpus", "2", "launch/pretrain.py", "train.steps=2"]) == (
        ["deepspeed", "--num_gpus", "2", "launch/pretrain.py"],
        ["train.steps=2"],
    )
    launcher, arguments = split_launcher(["train.steps=2"])
    assert [Path(word).name for word in launcher] == ["deepspeed", "pretrain.py"]
    assert arguments == ["train.steps=2"]
    with pytest.raises(ConfigError):
        split_launcher(["deepspeed", "train.steps=2"])


def test_a_dry_run_prints_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train.seed=1,2", "--name", "s", "--dry-run", "--", *PYTHON, "data.split=95,5", "train.steps=9")
    code, out, _ = called(capsys, *words)
    commands = [line for line in out.splitlines() if line.startswith(" ".join(PYTHON))]
    assert code == 0
    for seed, line in enumerate(commands, 1):
        assert {f"train.seed={seed}", f"run.name=s-seed_{seed}"} <= set(line.split())
    assert len(commands) == 2
    assert all("data.split=95,5 train.steps=9" in line for line in commands)
    assert called(capsys, "s", "--dry-run")[1] == out  # by its name


def test_nothing_starts_where_a_run_would_be_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capsys, "model.num_attention_heads=3,5,4", "--", *PYTHON, "model.hidden_size=256")
    assert code == 2
    assert_names(err, "model.num_attention_heads=3", "model.num_attention_heads=5", "model.hidden_size=256")
    assert not Path("runs/sweeps/num_attention_heads").exists()
    for words, names in (
        (("train.seed=1,2", "--", *PYTHON, "train.stepps=3"), ["train.stepps", "train.steps"]),
        (("no-such-sweep",), ["no-such-sweep"]),
        (("train.seed=1,2", "--", *PYTHON, "--resume", "auto"), ["--resume"]),
        (("train.seed=1,2", "--", *PYTHON, "--frobnicate"), ["--frobnicate"]),
    ):
        code, _, err = called(capsys, *words)
        assert code == 2, err
        assert_names(err, *names)


def test_a_key_of_the_json_is_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    json_file = Path("base.json")
    json_file.write_text(json.dumps({"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {}}}))
    key = "deepspeed.optimizer.params.weightdecay"
    wrong = (f"{key}=0.1,0.2", "--name", "d", "--", *PYTHON, "--deepspeed_config", "base.json")
    code, _, err = called(capsys, *wrong)
    assert code == 2
    assert_names(err, "optimizer.params.weightdecay")
    right = [word.replace("weightdecay", "weight_decay") for word in wrong]
    assert called(capsys, *right[:3], "--dry-run", *right[3:])[0] == 0
    written = sorted(Path("runs/sweeps/d").glob("d-*.json"))
    assert [json.loads(path.read_text())["optimizer"]["params"] for path in written] == [
        {"weight_decay": 0.1},
        {"weight_decay": 0.2},
    ]


def test_a_sweep_without_runs_has_a_page_already(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "train.seed=1,2", "--name", "s", "--report", "--", *PYTHON)[0] == 0
    assert Path("runs/sweeps/s/report.html").is_file()
