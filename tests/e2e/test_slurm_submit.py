"""`megalm submit` and `megalm status` on a real two-node Slurm: a chain of jobs for one run, and an array of runs."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megalm.runs.run_lock import is_held
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import DS_CONFIGS, MEGALM, rows, train_rows, until
from tests.messages import assert_names
from tests.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm]
JOB_SECONDS = 300.0
STEPS = 250  # some seconds


def megalm(slurm: SlurmCluster, folder: Path, *words: str | Path) -> str:
    return slurm.ask("env", "DS_ACCELERATOR=cpu", MEGALM, *words, folder=folder)


def status(slurm: SlurmCluster, folder: Path) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in json.loads(megalm(slurm, folder, "status", "--json"))}


def test_a_chain_trains_one_run_to_its_end(slurm: SlurmCluster, small_data: SmallData, tmp_path: Path) -> None:
    words = ("--deepspeed_config", DS_CONFIGS / "fp32.json", *small_data.words, "run.name=mine", "--resume", "auto")
    own = ("--nodes=2", "--time=5", """--comment=it's "one" \\ #1""")
    line = ("submit", *own, "--chain", "3", "--", *words, f"train.steps={STEPS}")
    told = megalm(slurm, tmp_path, *line)
    job = told.split()[1].rstrip(":")
    assert_names(told, f"mine-{job}.log", "megalm status mine", f"scancel {job}")
    assert [slurm.job(f"{job}_1")[name] for name in ("JobName", "Requeue")] == ["mine", "0"]
    assert slurm.ask("squeue", "--noheader", "--format=%k", f"--jobs={job}_1") == own[2].partition("=")[2]
    with pytest.raises(AssertionError, match=f"--after {job},"):
        megalm(slurm, tmp_path, *line)

    until(lambda: is_held(tmp_path / "runs" / "mine"), JOB_SECONDS)
    starts = status(slurm, tmp_path)["mine"]
    assert (starts["state"], starts["slurm"]["task"]) == ("running", f"{job}_1")
    until(lambda: any(row["step"] > 5 for row in train_rows(tmp_path)), JOB_SECONDS)
    # For a task of an array scancel asks twice, and the second time there is no such job any more.
    scancel = ["scancel", "--signal=TERM", starts["slurm"]["number"]]
    subprocess.run(scancel, env=slurm.environment, check=False, capture_output=True)
    ends = {number: slurm.wait(f"{job}_{number}", JOB_SECONDS) for number in (1, 2)}
    log = (tmp_path / f"mine-{job}.log").read_text()
    assert {number: end["JobState"] for number, end in ends.items()} == {1: "FAILED", 2: "COMPLETED"}, log
    assert not slurm.ask("squeue", "--noheader", "--name=mine"), "the third job has nothing to do"
    assert ends[1]["ExitCode"] == "75:0"
    assert [row["status"] for row in rows(tmp_path) if row.get("event") == "end"] == ["stopped", "finished"]
    finished = status(slurm, tmp_path)["mine"]
    assert [finished[name] for name in ("state", "step", "steps", "attempts")] == ["finished", STEPS, STEPS, 2]
    (again,) = (shlex.split(text) for text in log.splitlines() if f"train.steps={2 * STEPS}" in text)
    assert again[2:] == ["megalm", "submit", *own, "--chain=3", *again[-5:]]
    assert again[-5:] == ["--", "run.name=mine", "--resume", "auto", f"train.steps={2 * STEPS}"]


@pytest.mark.slow
def test_an_array_trains_the_runs_of_a_sweep(slurm: SlurmCluster, small_data: SmallData, tmp_path: Path) -> None:
    words = ("--deepspeed_config", DS_CONFIGS / "fp32.json", *small_data.words, "train.steps=6")
    swept = ("--sweep", "train.seed=1,2", "--sweep-name", "seeds")
    told = megalm(slurm, tmp_path, "submit", "--nodes=1", "--time=5", *swept, "--", *words)
    job = told.split()[1].rstrip(":")
    assert_names(told, "seeds", f"scancel {job}", "megalm sweep runs/sweeps/seeds --report")
    logs = [tmp_path / "runs" / "sweeps" / "seeds" / f"{job}_{task}.log" for task in (0, 1)]
    for task in (0, 1):
        assert slurm.wait(f"{job}_{task}", JOB_SECONDS)["JobState"] == "COMPLETED", logs[task].read_text()
    lines = status(slurm, tmp_path)
    assert [(line["state"], line["step"]) for line in lines.values()] == [("finished", 6)] * 2
    assert lines.keys() == {"seeds-seed_1", "seeds-seed_2"}
    assert_names(megalm(slurm, tmp_path, "sweep", "runs/sweeps/seeds", "--report"), "train.seed", "2 finished")
