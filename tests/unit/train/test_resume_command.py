"""The commands that a run tells a person to try: they have to work as they stand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megalm.config.deepspeed.json_reader import DeviceFacts, named_json, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.planning.resolve import resolve
from megalm.rank_environment import submit_options
from megalm.runs.run_folder import ResumeCommand, RunFolder, command_line
from megalm.tracking.report.page import write_report
from megalm.train.run_summary import final_summary
from tests.messages import assert_names


def test_says_no_more_than_is_needed() -> None:
    told = ResumeCommand(Path("runs/mine")).shell("--resume", "auto", "train.steps=40")
    assert told == "deepspeed launch/pretrain.py run.name=mine --resume auto train.steps=40"


def test_says_where_and_how_many_and_quotes_for_a_shell() -> None:
    told = ResumeCommand(Path("/data/my runs/mine"), ranks=2).shell("--resume", "auto")
    assert shlex.split(told) == [
        *("deepspeed", "--num_gpus", "2", "launch/pretrain.py"),
        *("run.root=/data/my runs", "run.name=mine", "--resume", "auto"),
    ]


def test_after_a_slurm_job_asks_for_such_a_job(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "MEGALM_SUBMIT_OPTIONS": "--nodes=2 '--comment=a b'"}
    words = ["megalm", "submit", "--nodes=2", "--comment=a b", "--", f"run.root={tmp_path}", "run.name=mine"]
    told = ResumeCommand(tmp_path / "mine", ranks=8, submit=submit_options(job)).shell("--resume", "auto")
    assert shlex.split(told) == [*words, "--resume", "auto"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "environment.json").write_text(json.dumps({"submit": submit_options(job)}))
    assert shlex.split(ResumeCommand.by_folder(tmp_path / "mine").shell()) == words
    assert submit_options({"MEGALM_SUBMIT_OPTIONS": "--nodes=2"}) is None, "a shell of an earlier job"
    assert submit_options({"SLURM_JOB_ID": "7"}) is None


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("class Parser:", '"class Parser:"'),
        ("für", '"für"'),
        ("cost $HOME `ls`", "'cost $HOME `ls`'"),
        ('a "b"', "'a \"b\"'"),
    ],
)
def test_the_end_of_a_run_quotes_for_a_shell(
    prompt: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    loaded = load_run_config(None, [f"sample.prompts={json.dumps([prompt])}", "tracking.tensorboard=true"])
    run = resolve(
        loaded, read_deepspeed_json(named_json("ds_configs/fp32.json")), 1, DeviceFacts("cpu", False, 1 << 33), 99
    )
    folder = RunFolder(tmp_path / "my runs" / "mine")
    lines = final_summary(folder, run, ResumeCommand(folder.path)).splitlines()
    quoted = f"'{folder.path}'"
    told = (f"checkpoint list {quoted}", f"generate {quoted} --prompt {word}", f"tensorboard --logdir {quoted}")
    for command in told:
        assert [line for line in lines if line.endswith(command)], command
    (shown,) = (line for line in lines if "mlflow ui" in line)
    store = f"sqlite:///{tmp_path}/my runs/mlflow.db"
    assert shlex.split(shown[shown.index("mlflow ui") :]) == ["mlflow", "ui", "--backend-store-uri", store]


@pytest.mark.parametrize(
    "address", ["http://host:5000?token=SECRET", "http://SECRET@host:5000", "http://u:a SECRET@host:5000"]
)
def test_a_command_is_recorded_and_shown_without_credentials(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address.replace("SECRET", "hunter2canary")
    words = ["launch/pretrain.py", "run.name=mine", f"run.root={address}", "--config", address, "--local_rank=0"]
    monkeypatch.setattr("sys.argv", words)
    shown = "http://host:5000"
    recorded = ["launch/pretrain.py", "run.name=mine", f"run.root={shown}", "--config", shown]
    assert command_line() == recorded
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("{}")
    (tmp_path / "mine" / "environment.json").write_text(json.dumps({"command": words}))
    page = write_report(tmp_path / "mine").read_text()
    assert shown in page
    assert "hunter2canary" not in page


def test_the_end_of_a_run_shows_the_tracking_address_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run_config(None, ["tracking.mlflow=true"])
    json_file = read_deepspeed_json(named_json("ds_configs/fp32.json"))
    run = resolve(loaded, json_file, 1, DeviceFacts("cpu", False, 1 << 33), 99)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000?user=u&password=hunter2canary")
    summary = final_summary(RunFolder(tmp_path / "mine"), run, ResumeCommand(tmp_path / "mine"))
    assert_names(summary, "http://host:5000")
    assert "hunter2canary" not in summary
