"""The node check of a real job on three nodes: a slow node and one with another commit are named and left out."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import ROOT, train_rows, write_json
from tests.messages import assert_names
from tests.slurm_cluster import SlurmCluster, can_name_hosts

# Slow: units and gloo ranks show the verdicts, and test_slurm_train.py a job that is queued again.
pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.slow]

JOB_SECONDS = 300.0
# In the place of a container: n3 has a checkout of its own, and n2 is throttled as soon as the run folder is there.
SITE = """#!/usr/bin/env bash
case $SLURMD_NODENAME in
n3) exec "$1" "{other}/launch/pretrain.py" "${{@:3}}" ;;
n2)
    trap : TERM
    exec 9<> <(:)
    pause() {{ read -rt "$1" -u 9; }}
    "$@" 9<&- &
    rank=$!
    until [ -d runs/mine ]; do pause 0.02; done
    while kill -STOP $rank 2>/dev/null; do
        pause 0.2
        kill -CONT $rank 2>/dev/null
        pause 0.003
    done
    wait $rank
    ;;
*) exec "$@" ;;
esac
"""


def other_checkout(folder: Path) -> str:
    """A checkout with another version of one file; its commit."""
    for name in ("megalm", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "megalm" / "topology.py").open("a") as file:
        file.write("# changed\n")
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "another"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_a_job_leaves_a_slow_node_and_one_with_another_commit(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    if not can_name_hosts():
        pytest.skip("nodes have names of their own for root alone")
    commit = other_checkout(tmp_path / "other")
    site = tmp_path / "site"
    site.write_text(SITE.format(other=tmp_path / "other"))
    site.chmod(0o755)
    json_file = write_json(tmp_path / "six.json", train_batch_size=6)  # for three ranks and for one
    line = [
        *("--partition=wide", "--nodes=1-3", f"--export=ALL,DS_ACCELERATOR=cpu,MEGALM_CONTAINER={site}"),
        *("--output=train.log", ROOT / "slurm" / "train.sh", "--deepspeed_config", json_file),
        *small_data.changed("train.steps=4", "run.name=mine"),
        *("slurm.exclude_bad=true", "train.slow_factor=2"),
    ]
    job_id = slurm.sbatch(tmp_path, *line)
    job = slurm.wait(job_id, JOB_SECONDS)
    log = (tmp_path / "train.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert (job["NumNodes"], set(job["ExcNodeList"].split(","))) == ("1", {"n2", "n3"}), log
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4]

    folder = tmp_path / "runs" / "mine"
    bad = {entry["node"]: entry for entry in json.loads((folder / "bad_nodes.json").read_text())["nodes"]}
    assert bad.keys() == {"n2", "n3"}, log
    assert all(entry["job"] == job_id and entry["excluded"] and entry["time"] for entry in bad.values())
    check = json.loads((folder / "node_check.json").read_text())
    speeds = {report["node"]: report["product_flops"] for report in check["ranks"]}
    assert speeds["n2"] * 2 < speeds["n1"]
    assert not list(folder.glob(".node*")), "nothing of the check itself is left"
    told = log[: log.index("queued again")]
    assert_names(next(text for text in told.splitlines() if "node n3" in text), commit)
    assert_names(next(text for text in told.splitlines() if "node n2" in text and "product" in text), "rank 1")
    assert not list(tmp_path.glob(".megalm-*")), "the list for Slurm is not left behind"
