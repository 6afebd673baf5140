"""A sweep as its user runs it: interrupted, continued, grown, and looked at."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from megalm.runs.metrics_log import read_metrics
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import DS_CONFIGS, PRETRAIN, finish, job, megalm, until
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

STEPS = 120


def rows(run: Path, kind: str) -> list[dict[str, object]]:
    path = run / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == kind] if path.exists() else []


def test_a_sweep_that_is_interrupted_runs_what_is_missing(small_data: SmallData, tmp_path: Path) -> None:
    swept = ("schedule.peak_learning_rate=1e-3,3e-3", "--name", "lr")
    one_run = (sys.executable, PRETRAIN, "--deepspeed_config", DS_CONFIGS / "fp32.json")
    words = (*swept, "--", *one_run, *small_data.changed(f"train.steps={STEPS}"))
    first, second = (tmp_path / "runs" / f"lr-peak_learning_rate_{peak}" for peak in ("0.001", "0.003"))
    with job(tmp_path, megalm("sweep", *words)) as started:
        until(lambda: len(rows(second, "train")) > 5, 200)
        os.kill(started.process.pid or 0, signal.SIGINT)
        stopped = started.wait()
    assert stopped.code == 75, stopped.explain()
    assert not stopped.left
    assert_names(stopped.stderr, "runs/sweeps/lr")
    assert len(rows(first, "train")) == STEPS
    assert 5 < len(rows(second, "train")) < STEPS
    before = (first / "metrics.jsonl").read_bytes()

    finished = finish(tmp_path, megalm("sweep", "lr"))
    assert finished.code == 0, finished.explain()
    assert (first / "metrics.jsonl").read_bytes() == before
    assert len(rows(second, "train")) == STEPS
    assert [row["event"] for row in rows(second, "event") if row["event"] in ("start", "resume")] == ["start", "resume"]
    (last,) = (row for row in rows(second, "eval") if row["whole"])
    assert isinstance(last["loss_stderr"], float)
    assert 0 < last["loss_stderr"] < 1
    page = (tmp_path / "runs" / "sweeps" / "lr" / "report.html").read_text()
    assert page.count("<svg") >= 7  # the effect of the rate, and two losses over tokens, time and FLOPs

    compared = finish(tmp_path, megalm("compare", "--sweep", "lr", "--json"))
    content = json.loads(compared.stdout)
    assert [run["name"] for run in content["runs"]] == [first.name, second.name]
    ranking = content["sweep"]["ranking"]
    assert {entry["runs"][0] for entry in ranking} == {first.name, second.name}
    assert ranking[0]["score"] <= ranking[1]["score"]
    assert ranking[0]["stderr"] > 0
    by_line = finish(tmp_path, megalm("compare", "--sweep", "lr", "--csv"))
    table = list(csv.DictReader(by_line.stdout.splitlines()))
    assert [row["schedule.peak_learning_rate"] for row in table] == ["0.001", "0.003"]
    assert float(table[1]["final_validation_loss"]) == last["loss"]


def test_a_run_that_fails_is_named_and_the_next_one_starts(tmp_path: Path) -> None:
    script = tmp_path / "pretrain.py"  # in place of ours: what matters is what becomes of its end
    script.write_text("import sys\nprint('megalm: error: trouble')\nsys.exit('train.seed=2' in sys.argv and 1)\n")
    words = ("train.seed=2,3", "--name", "s", "--", sys.executable, script)
    ended = finish(tmp_path, megalm("sweep", *words))
    assert ended.code == 1, ended.explain()
    assert_names(ended.stderr, "s-seed_2", "runs/sweeps/s")
    assert "s-seed_3" not in ended.stderr
    logs = {path.name for path in (tmp_path / "runs" / "sweeps" / "s").glob("*.log")}
    assert logs == {"s-seed_2.log", "s-seed_3.log"}
    for path in (tmp_path / "runs" / "sweeps" / "s").glob("*.log"):
        path.unlink()
    stopped = finish(tmp_path, megalm("sweep", "s", "--stop-at-failure"))
    assert stopped.code == 1, stopped.explain()
    assert {path.name for path in (tmp_path / "runs" / "sweeps" / "s").glob("*.log")} == {"s-seed_2.log"}
