"""Ranks of a Slurm job that are killed, stand still or never start: named with their node, restarted where asked."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from megalm.runs.metrics_log import ATTEMPT_EVENTS
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import DS_CONFIGS, PRETRAIN, rows, train_rows, until
from tests.e2e.test_slurm_train import JOB_SECONDS, TRAIN, telling_checkout
from tests.messages import assert_names
from tests.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm]

HANG_SECONDS = 8
# A rank that stands in the prologue of its node for ever.
LATE = f"""
import os, runpy, sys, time
if os.environ["RANK"] == "1":
    time.sleep(600)
sys.argv[0] = {str(PRETRAIN)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def line(small_data: SmallData, *words: str) -> list[str | Path]:
    own = ("schedule.kind=constant", "train.steps=1000000", "run.name=mine")
    return ["--deepspeed_config", DS_CONFIGS / "fp32.json", *small_data.changed(*own, *words)]


def rank_of(job_id: str, rank: int) -> tuple[psutil.Process, str]:
    """The training process of a rank of a job, and the node it runs on."""
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        is_rank = any(word.endswith("pretrain.py") for word in words[1:3])
        if is_rank and (environment.get("SLURM_JOB_ID"), environment.get("RANK")) == (job_id, str(rank)):
            return process, environment["SLURMD_NODENAME"]
    raise AssertionError(f"rank {rank} of job {job_id} is not alive")


def wait_for_step(folder: Path, step: int, attempt: int = 1) -> None:
    until(lambda: any(row["step"] >= step and row["attempt"] >= attempt for row in train_rows(folder)), JOB_SECONDS)


def test_the_rank_that_failed_is_named_with_its_node(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    """Under plain srun: one rank is killed, one of another job never starts."""
    killed, late = tmp_path / "killed", tmp_path / "late"
    killed.mkdir()
    late.mkdir()
    options = ("--export=ALL,DS_ACCELERATOR=cpu", "--output=train.log")
    never = slurm.sbatch(
        late, *options, telling_checkout(late, LATE), *line(small_data, "train.start_timeout_seconds=18")
    )
    job_id = slurm.sbatch(killed, *options, TRAIN, *line(small_data))
    wait_for_step(killed, 2)
    process, node = rank_of(job_id, 1)
    assert node == slurm.nodes[1]
    process.kill()

    ended = slurm.wait(job_id, JOB_SECONDS)
    log = (killed / "train.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log
    (said,) = (text for text in log.splitlines() if text.startswith("megalm: error: "))
    assert said.startswith(f"megalm: error: rank 1 on {node} (cpu) ")
    assert_names(said, "vanished", f"rank 0 on {slurm.nodes[0]}", f"--exclude={node}")
    (ended_by,) = (text for text in log.splitlines() if text.startswith("megalm: rank 1 "))
    assert_names(ended_by, node, 9)
    assert "Traceback" not in log
    run = killed / "runs" / "mine"
    assert said in (run / "failures" / "attempt-1.txt").read_text()
    assert said in (run / "log.txt").read_text()
    assert rows(killed)[-1]["reason"] == said.removeprefix("megalm: error: ")

    ended = slurm.wait(never, JOB_SECONDS)
    log = (late / "train.log").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), log
    (said,) = (text for text in log.splitlines() if text.startswith("megalm: error: "))
    for text in (said, next(text for text in log.splitlines() if "missing" in text)):
        assert_names(text, "1 of 2", f"rank 1 on {node}", "train.start_timeout_seconds")
    assert_names(said, f"--exclude={node}")


@pytest.mark.slow
def test_ranks_are_started_again_inside_the_allocation(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    """A rank is killed: torchrun starts all again. The job is stopped: saved, queued again. A rank stands still."""
    options = ("--export=ALL,DS_ACCELERATOR=cpu,MEGALM_RESTARTS=1", "--output=train.log")
    words = ("checkpoint.interval_steps=3", f"train.hang_timeout_seconds={HANG_SECONDS}")
    job_id = slurm.sbatch(tmp_path, *options, TRAIN, *line(small_data, *words))
    log = tmp_path / "train.log"

    wait_for_step(tmp_path, 4)
    process, node = rank_of(job_id, 1)
    process.kill()
    wait_for_step(tmp_path, 4, attempt=2)
    assert slurm.job(job_id)["Restarts"] == "0", "in the same allocation"
    assert f"rank 1 on {node} (cpu)" in log.read_text()
    begun = [row for row in rows(tmp_path) if row.get("event") in ATTEMPT_EVENTS]
    assert [row["event"] for row in begun] == ["start", "resume"]
    assert begun[1]["step"] >= 3

    slurm.ask("scancel", "--signal=TERM", job_id)
    wait_for_step(tmp_path, 4, attempt=3)
    assert slurm.job(job_id)["Restarts"] == "1", log.read_text()
    ends = [row["status"] for row in rows(tmp_path) if row.get("event") == "end"]
    assert ends == ["failed", "stopped"]

    process, node = rank_of(job_id, 1)
    process.send_signal(signal.SIGSTOP)
    report = tmp_path / "runs" / "mine" / "failures" / "attempt-3.txt"
    until(report.exists, JOB_SECONDS)
    until(lambda: len(report.read_text().splitlines()) > 1, 10)
    said = report.read_text().splitlines()[1]
    assert said.startswith(f"megalm: error: rank 1 on {node} (cpu) ")
    assert_names(said, "SIGSTOP", "train.hang_timeout_seconds", f"--exclude={node}")
    slurm.ask("scancel", "--signal=KILL", job_id)
    slurm.wait(job_id, JOB_SECONDS)
    assert not list(tmp_path.glob(".megalm-*"))
