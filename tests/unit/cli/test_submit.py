"""`megalm submit --print`: what is refused on the login node, and the job that comes of the rest."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.cluster.batch_script import SbatchOptions
from megalm.rank_environment import expand_job_fields
from tests.messages import assert_names


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)


def submit(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["submit", "--print", *words])
    return int(left.value.code or 0)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[SbatchOptions, str]:
    """The options and the last line of the script."""
    code = submit(*words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return SbatchOptions.of_script(out), out.splitlines()[-1]


def test_the_job_has_the_runs_name_and_the_options_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run.name=mine", "--resume", "auto")
    options, last = printed(capsys, "-N", "4", "--ntasks-per-node=2", "--after", "7", "--", *words)
    wanted = {"job-name": "mine", "nodes": "4", "ntasks-per-node": "2", "output": "%x-%j.log", "open-mode": "append"}
    assert wanted.items() <= options.values.items()
    assert options.get("dependency") == "afterany:7"
    assert "requeue" in options.values
    assert last == 'exec bash "$MEGALM_HOME/slurm/train.sh" run.name=mine --resume auto'


def test_the_environment_of_sbatch_is_below_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "slow")
    monkeypatch.setenv("SBATCH_ACCOUNT", "ours")
    options, _ = printed(capsys, "-N1", "-p", "fast", "-J", "own", "--", "run.name=mine")
    assert (options.get("partition"), options.get("account"), options.get("job-name")) == ("fast", "ours", "own")


def test_a_chain_is_an_array_of_one_at_a_time_with_one_log(capsys: pytest.CaptureFixture[str]) -> None:
    options, _ = printed(capsys, "-N1", "--chain", "3", "--", "run.name=mine", "--resume", "auto")
    assert (options.get("array"), options.get("output")) == ("1-3%1", "%x-%A.log")
    assert "no-requeue" in options.values
    assert "requeue" not in options.values


def test_runs_of_an_array_have_names_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    options, last = printed(capsys, "-N1", "--array=2-3", "--", "run.name=mine-%a")
    assert (options.get("job-name"), options.get("output")) == ("mine", "%x-%A_%a.log")
    assert last.endswith(" run.name=mine-%a")
    assert "SLURM_ARRAY_TASK_ID" not in os.environ
    options, last = printed(capsys, "-N1", "-J", "own", "--", "run.name=%x")
    assert (options.get("job-name"), last.split()[-1]) == ("own", "run.name=%x")


def test_the_runs_of_a_sweep_are_tasks_of_an_array(capsys: pytest.CaptureFixture[str]) -> None:
    swept = ("--sweep", "train.seed=1,2,3", "--sweep-name", "seeds")
    options, _ = printed(capsys, "-N1", *swept, "--", "train.steps=20")
    assert (options.get("job-name"), options.get("array")) == ("seeds", "0,1,2")
    assert options.get("output") == "runs/sweeps/seeds/%A_%a.log"
    names = [run["name"] for run in json.loads(Path("runs/sweeps/seeds/sweep.json").read_text())["runs"]]
    finished = Path("runs", names[1])
    finished.mkdir(parents=True)
    (finished / "metrics.jsonl").write_text('{"kind":"event","time":1,"event":"end","status":"finished","attempt":1}\n')
    assert submit("-N1", *swept, "--", "train.steps=20") == 0
    script = capsys.readouterr().out
    assert SbatchOptions.of_script(script).get("array") == "0,2"
    tasks = dict(re.findall(r"^ +(\d+)\) set -- (.*) ;;$", script, re.MULTILINE))
    assert tasks.keys() == {"0", "2"}
    words = shlex.split(tasks["2"])
    assert {"train.steps=20", "train.seed=3", f"run.name={names[2]}", "tracking.sweep=seeds", "--resume"} <= set(words)


def test_a_sweep_with_a_run_that_is_refused_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("-N1", "--sweep", "model.hidden_size=64,63,62", "--", "model.num_attention_heads=4") == 2
    assert_names(capsys.readouterr().err, 63, 62)
    assert not Path("runs/sweeps").exists() or not list(Path("runs/sweeps").iterdir())
    assert submit("-N1", "--chain", "3", "--sweep", "train.seed=1,2", "--", "--resume", "auto") == 2


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("-N1", "--", "train.stepz=3", "model.hiddensize=3"), ("train.stepz", "model.hiddensize")),
        (("-N1", "--", "--resum", "auto"), ("--resum", "--resume")),
        (("--nodes=2-3", "--", "--resum", "auto"), ("--nodes=2-3", "--resum")),
        (("-N3", "--gpus-per-node=7", "--", "--deepspeed_config", "zero2.json"), ("train_batch_size", 21)),
        (("-N1", "--", "data.recipe=null"), ("data.train",)),
        (("-N1", "--", "--deepspeed_config", "nowhere.json"), ("nowhere.json",)),
        (("-N1", "--", "--extend-steps", "5"), ("--resume",)),
        (("-N1", "--gpu", "H100", "--"), ("--gpu", "--gpus-per-node=N")),
        (("-N1", "--gpus-per-node=1", "--gpu", "H1000", "--"), ("H1000",)),
        (("-N1", "--array=0-3", "--", "run.name=one"), ("--array", "run.name=NAME-%a")),
        (("-N1", "--", "run.name=one-%a"), ("%a", "SLURM_ARRAY_TASK_ID")),
        (("-N1", "--chain", "2", "--", "run.name=one"), ("--chain", "--resume")),
        (("-N1", "--array=1-3%1", "--", "run.name=one"), ("--array=...%1", "--resume")),
        (("-N1", "--chain", "2", "--", "--resume", "auto"), ("run.name=NAME",)),
        (("-N1", "--chain", "2", "--array=1-3%1", "--"), ("--chain", "--array")),
        (("-N1", "--after", "7", "-d", "afterok:8", "--"), ("--after", "--dependency")),
        (("-N1", "--after", "mine", "--"), ("--after",)),
    ],
)
def test_what_is_wrong_is_refused_here(
    words: tuple[str, ...], names: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*words) == 2
    out, err = capsys.readouterr()
    assert not out
    assert_names(err, *names)


def test_an_existing_run_is_refused_without_resume(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/mine").mkdir(parents=True)
    assert submit("-N1", "--", "run.name=mine") == 2
    assert_names(capsys.readouterr().err, "runs/mine", "run.name")


def test_names_by_the_job() -> None:
    environment = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_NAME": "job"}
    assert expand_job_fields("a-%a-%x%%", environment) == "a-3-job%%"
    assert expand_job_fields("a-%a", {"SLURM_ARRAY_TASK_ID": ""}) == "a-%a"
