"""The runs of a sweep in MLflow: children of one run, which trains as long as one of them does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from megalm.sweeps.expansion import make_sweep
from megalm.sweeps.ranking import RankedRun, rank
from megalm.sweeps.sweep_report import send_sweep_result, verdict
from tests.e2e.tracking.run_folders import sync, write_rows

pytestmark = pytest.mark.e2e


def test_the_runs_of_a_sweep_have_one_parent(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    assert "tracking: {" in config
    (run_dir / "config.yaml").write_text(config.replace("tracking: {", "tracking: {sweep: lr, ", 1))
    other = run_dir.with_name("second-001")
    shutil.copytree(run_dir, other)
    write_rows(run_dir, range(1, 3), end="finished")
    write_rows(other, range(1, 3))
    first, second = sync(run_dir), sync(other)
    client = mlflow.MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    parents = {client.get_run(sent.run_id).data.tags["mlflow.parentRunId"] for sent in (first, second)}
    (parent,) = map(client.get_run, parents)
    assert parent.info.run_name == "lr"
    assert "mlflow.parentRunId" not in parent.data.tags
    assert parent.info.status == "RUNNING"  # as the second run
    write_rows(other, range(3, 5), end="finished")
    sync(other)
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"
    assert len(client.search_runs([parent.info.experiment_id])) == 3

    page = run_dir.parent / "report.html"
    page.write_text("a page")
    runs = [{"train.seed": "1"}, {"train.seed": "2"}]
    sweep = make_sweep("lr", run_dir.parent, {"train.seed": ("1", "2")}, (), runs)
    assert not send_sweep_result(sweep, rank([]), page)  # its runs have not begun
    first, second = (replace(run, name=folder.name) for run, folder in zip(sweep.runs, (run_dir, other), strict=True))
    sweep = replace(sweep, runs=(first, second))
    ranking = rank([RankedRun(second, "finished", score=1.5), RankedRun(first, "waiting")])
    assert send_sweep_result(sweep, ranking, page)
    told = client.get_run(parent.info.run_id)
    assert told.data.tags["mlflow.note.content"] == verdict(ranking)
    assert told.data.tags["megalm.best_run"] == other.name
    assert told.data.metrics == {"best/validation_loss": 1.5}
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == [page.name]
