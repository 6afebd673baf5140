"""A run folder in MLflow, against a real SQLite store: everything arrives, once, in one MLflow run."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import pytest

from megalm.errors import ConfigError, DataError, MegalmError
from megalm.runs.metrics_log import MetricsWriter, live_rows, read_metrics
from megalm.tracking.mlflow_mirror.sync_state import copied_from
from tests.e2e.tracking.run_folders import sync, write_rows
from tests.messages import assert_names

pytestmark = pytest.mark.e2e


def client_of(run_dir: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def history(run_dir: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(item.step, item.value) for item in client_of(run_dir).get_metric_history(run_id, key)]


def test_a_finished_run_arrives_whole(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5), end="finished")
    (run_dir / "profile").mkdir()
    for name in ("step-00000002.txt", "step-00000002.json", "step-00000002.rank-0.trace.json.gz"):
        (run_dir / "profile" / name).write_text("{}")
    sent = sync(run_dir)
    client = client_of(run_dir)
    run = client.get_run(sent.run_id)
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"]

    found = client.get_metric_history(sent.run_id, "train/loss")
    assert [(item.step, item.value, item.timestamp) for item in found] == [
        (row["step"], row["loss"], int(row["time"] * 1000)) for row in rows
    ]
    assert run.data.metrics["eval/perplexity"] == pytest.approx(4.48)
    assert run.data.params["train.steps"] == "4"
    assert run.data.params["model.style"] == "llama"
    assert run.data.params["model.vocab_size"] == "600"  # null in config.yaml
    assert run.data.params["model.parameters"] == "145216"
    assert not {"null", "[]", "{}"} & set(run.data.params.values())
    assert not [name for name in run.data.params if name.startswith(("run.", "tracking."))]
    assert run.data.params["deepspeed.bf16.enabled"] == "true"
    assert run.data.params["data.tokenizer"] == "x" * 5997 + "..."
    assert run.data.tags["mlflow.source.git.commit"] == "0123abc"
    assert run.data.tags["dataset_fingerprint"] == "d0"
    assert run.data.tags["tokenizer_fingerprint"] == "t0"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first-001")
    end = list(read_metrics(run_dir / "metrics.jsonl"))[-1]
    assert run.info.end_time == int(end["time"] * 1000)
    assert client.get_experiment(run.info.experiment_id).name == "trials"

    top = {item.path for item in client.list_artifacts(sent.run_id)}
    configured = {"config.yaml", "deepspeed.json", "deepspeed.resolved.json", "environment.json"}
    assert top == {*configured, "samples", "profile", "events.jsonl"}
    stored = run_dir.parent / "mlartifacts" / sent.run_id / "artifacts" / "samples" / "step-00000004.txt"
    assert stored.read_text() == "Once upon a time"
    profile = {item.path for item in client.list_artifacts(sent.run_id, "profile")}
    assert profile == {"profile/step-00000002.txt", "profile/step-00000002.json"}, "no timeline, which is large"
    assert sent.artifacts == 5 + 2
    page = run.data.tags["mlflow.note.content"]
    for name in ("145,216", "24 tokens", "1.5000", "--resume auto"):
        assert name in page
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.tags[0].value) == ("tiny", "training")
    assert json.loads(used.dataset.profile) == {"epochs": 2.0, "tokens_per_epoch": 24}


def test_a_second_sync_sends_nothing(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5), end="finished")
    first, second = sync(run_dir), sync(run_dir)
    assert (second.metrics, second.artifacts, second.run_id) == (0, 0, first.run_id)


def test_a_description_of_a_person_stays(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    client_of(run_dir).set_tag(first.run_id, "mlflow.note.content", "mine")
    write_rows(run_dir, range(3, 6), attempt=2, end="finished")
    second = sync(run_dir)
    tags = client_of(run_dir).get_run(second.run_id).data.tags
    assert (tags["mlflow.note.content"], second.run_id != first.run_id) == ("mine", True)


def test_a_failed_run_has_its_log_traceback_and_page(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 3), end="failed")
    (run_dir / "log.txt").write_text("a line")
    assert sync(run_dir).status == "FAILED"
    (run_dir / "failures").mkdir()
    (run_dir / "failures" / "attempt-1.txt").write_text("RuntimeError: out of luck")  # after the end event
    sent = sync(run_dir)
    found = artifacts(run_dir, sent.run_id)
    assert found["log.txt"] == "a line"
    assert "out of luck" in found["report.html"]
    assert "out of luck" in client_of(run_dir).get_run(sent.run_id).data.tags["mlflow.note.content"]
    assert [json.loads(line)["event"] for line in found["events.jsonl"].splitlines()] == ["start", "end"]
    assert not (run_dir / "report.html").exists()
    assert sync(run_dir).artifacts == 0


def test_system_metrics_of_every_node_arrive_once_also_after_a_take_back(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    (run_dir / "system").mkdir()
    samples = [{"time": 10.0 + index, "host": "n", "cpu_utilization_percentage": 5.0 * index} for index in range(3)]
    for node in (0, 1):
        text = "".join(json.dumps(row) + "\n" for row in samples)
        (run_dir / "system" / f"node-{node}.jsonl").write_text(text + "half a li")
    key = "system/node_1/cpu_utilization_percentage"
    first = sync(run_dir)
    assert history(run_dir, first.run_id, key) == [(0, 0.0), (1, 5.0), (2, 10.0)]
    with open(run_dir / "system" / "node-1.jsonl", "a") as file:
        file.write("ne\n" + json.dumps(samples[2] | {"time": 14.0}) + "\n")
    take_back(run_dir)
    second = sync(run_dir)
    assert second.run_id != first.run_id
    assert history(run_dir, second.run_id, key) == [(0, 0.0), (1, 5.0), (2, 10.0), (4, 10.0)]
    (run_dir / "system" / "node-1.jsonl").unlink()  # of one node alone, MLflow's names have no node
    alone = run_dir.with_name("alone-001")
    shutil.copytree(run_dir, alone)
    assert len(history(alone, sync(alone).run_id, key.replace("node_1/", ""))) == 3


def test_the_environment_names_experiment_tags_and_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the meaning that they have elsewhere: MLFLOW_RUN_ID is filled, with MLFLOW_NESTED_RUN it is the parent."""
    client = client_of(run_dir)
    given = client.create_run(client.create_experiment("theirs")).info.run_id
    write_rows(run_dir, range(1, 5))
    other = run_dir.with_name("other-001")
    shutil.copytree(run_dir, other)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "one"}')
    named = client.get_run(sync(other).run_id)
    assert client.get_experiment(named.info.experiment_id).name == "mine"
    assert named.data.tags["team"] == "one"

    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert sync(run_dir).run_id == given
    with pytest.raises(ConfigError) as error:
        sync(other)
    assert_names(error.value, "MLFLOW_RUN_ID", given, run_dir)
    take_back(run_dir)
    second = sync(run_dir)
    assert second.run_id != given
    assert [1, 2, 3, 4] in children(run_dir, second.run_id).values()
    assert sync(run_dir).run_id == second.run_id

    monkeypatch.setenv("MLFLOW_NESTED_RUN", "1")
    third = run_dir.with_name("third-001")
    third.mkdir()
    write_rows(third, range(1, 3))
    nested = client.get_run(sync(third).run_id)
    assert nested.data.tags["mlflow.parentRunId"] == given
    assert nested.info.experiment_id == client.get_run(given).info.experiment_id
    monkeypatch.setenv("MLFLOW_RUN_ID", "none")
    fourth = run_dir.with_name("fourth-001")
    shutil.copytree(run_dir, fourth)
    with pytest.raises(ConfigError) as error:
        sync(fourth)
    assert_names(error.value, "MLFLOW_RUN_ID", "none")
    monkeypatch.delenv("MLFLOW_RUN_ID")
    monkeypatch.setenv("MLFLOW_TAGS", "team=one")
    with pytest.raises(ConfigError, match="MLFLOW_TAGS"):
        sync(fourth)


def test_a_lost_note_sends_the_same_values_and_mlflow_keeps_one(run_dir: Path) -> None:
    """A kill between a batch and its note: the batch goes out again."""
    write_rows(run_dir, range(1, 5), end="finished")
    first = sync(run_dir)
    before = history(run_dir, first.run_id, "train/loss")
    state = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps(state | {"offset": 0}))
    second = sync(run_dir)
    assert second.metrics == first.metrics > 0
    assert history(run_dir, second.run_id, "train/loss") == before


def test_a_lost_answer_to_create_makes_no_second_run(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    state = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps(state | {"run_id": None, "offset": 0}))
    assert sync(run_dir).run_id == first.run_id


def children(run_dir: Path, run_id: str) -> dict[str, list[int]]:
    """Name -> the steps of train/loss, for each child of an MLflow run."""
    client = client_of(run_dir)
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {run.info.status for run in found} <= {"KILLED"}
    return {run.info.run_name: train_losses(run_dir, run.info.run_id) for run in found}


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5), end="stopped")
    first = sync(run_dir)
    assert client_of(run_dir).get_run(first.run_id).info.status == "KILLED"
    config = (run_dir / "config.yaml").read_text().replace("steps: 4", "steps: 6")
    (run_dir / "config.yaml").write_text(config)
    write_rows(run_dir, range(5, 7), attempt=2)
    second = sync(run_dir)
    run = client_of(run_dir).get_run(first.run_id)
    assert second.run_id == first.run_id
    assert run.info.status == "RUNNING"
    assert train_losses(run_dir, first.run_id) == [1, 2, 3, 4, 5, 6]
    assert children(run_dir, first.run_id) == {}
    assert run.data.params["train.steps"] == "4"  # MLflow's parameters cannot change ...
    assert run.data.tags["changed.train.steps"] == "6"  # ... so what changed stands beside them
    assert "changed.model.style" not in run.data.tags
    assert second.artifacts == 1  # the changed config.yaml


def take_back(run_dir: Path) -> None:
    """A resume from step 2, then a rollback to it: steps 3 and 4 are trained three times."""
    write_rows(run_dir, range(3, 6), attempt=2)
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.row("event", event="rollback", step=2, at_step=5, attempt=3, rollbacks=1, samples_skipped=48)
        for step in range(3, 7):
            writer.row("train", step=step, tokens=step * 100, loss=1.1, lr=1e-3, attempt=3)


def counted(run_dir: Path) -> list[tuple[int, float]]:
    rows = live_rows(read_metrics(run_dir / "metrics.jsonl"))
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def test_rows_taken_back_are_a_child_run(run_dir: Path) -> None:
    """The page of the run has each step once; MLflow's runs of earlier attempts are its children."""
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    client = client_of(run_dir)
    client.set_tag(first.run_id, "mine", "kept")
    take_back(run_dir)
    second = sync(run_dir)
    run = client.get_run(second.run_id)
    assert second.run_id != first.run_id
    assert history(run_dir, second.run_id, "train/loss") == counted(run_dir)
    assert [step for step, _ in history(run_dir, second.run_id, "eval/loss")] == []
    tags = run.data.tags
    assert (run.info.run_name, tags["attempt"], tags["rollbacks"], tags["mine"]) == ("first-001", "3", "1", "kept")
    assert run.info.status == "RUNNING"
    assert children(run_dir, second.run_id) == {
        "first-001 (attempt 1, taken back from step 3 on)": [1, 2, 3, 4],
        "first-001 (attempt 2, taken back from step 3 on)": [3, 4, 5],
    }
    assert sync(run_dir).metrics == 0
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:  # and once more, while the run goes on
        writer.row("event", event="rollback", step=5, at_step=6, attempt=4, rollbacks=2)
        writer.row("train", step=6, tokens=600, loss=0.9, lr=1e-3, attempt=4)
    third = sync(run_dir)
    assert history(run_dir, third.run_id, "train/loss") == counted(run_dir)
    assert len(children(run_dir, third.run_id)) == 3
    assert children(run_dir, second.run_id) == {}


@pytest.mark.parametrize("crash", ["rename", "create_run", "log_metrics"])
def test_a_crash_while_rows_are_taken_back_changes_nothing(
    run_dir: Path, crash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalm.tracking.mlflow_mirror.client import MlflowStore

    write_rows(run_dir, range(1, 5))
    sync(run_dir)
    take_back(run_dir)
    whole = getattr(MlflowStore, crash)

    def done_and_lost(*values: Any) -> None:
        whole(*values)
        raise MegalmError("the answer is lost")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowStore, crash, done_and_lost)
        with pytest.raises(MegalmError):
            sync(run_dir)
    sent = sync(run_dir)
    assert history(run_dir, sent.run_id, "train/loss") == counted(run_dir)
    assert len(children(run_dir, sent.run_id)) == 2


def test_a_run_sent_after_the_fact_shows_what_counts(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    take_back(run_dir)
    sent = sync(run_dir)
    assert history(run_dir, sent.run_id, "train/loss") == counted(run_dir)
    assert children(run_dir, sent.run_id) == {
        "first-001 (attempt 1, taken back from step 3 on)": [3, 4],
        "first-001 (attempt 2, taken back from step 3 on)": [3, 4, 5],
    }


def test_a_sawtooth_of_an_older_version_is_mended(run_dir: Path) -> None:
    """Its state has no highest step; the rows that were sent and do not count are found in metrics.jsonl."""
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    take_back(run_dir)
    state = json.loads((run_dir / "mlflow.json").read_text())
    for name in ("last_step", "sent_before", "earlier_runs"):
        del state[name]
    size = (run_dir / "metrics.jsonl").stat().st_size
    (run_dir / "mlflow.json").write_text(json.dumps(state | {"offset": size}))
    second = sync(run_dir)
    assert history(run_dir, second.run_id, "train/loss") == counted(run_dir)
    assert len(children(run_dir, second.run_id)) == 1
    assert sync(run_dir).run_id == second.run_id != first.run_id


@pytest.mark.parametrize(
    ("end", "status"), [("finished", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED"), (None, "RUNNING")]
)
def test_the_status_is_that_of_the_end_event(run_dir: Path, end: str | None, status: str) -> None:
    write_rows(run_dir, range(1, 3), end=end)
    sent = sync(run_dir)
    assert (sent.status, client_of(run_dir).get_run(sent.run_id).info.status) == (status, status)


def test_more_rows_than_one_request_takes(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 701), end="finished")
    sent = sync(run_dir)
    assert sent.metrics > 2 * 1000
    assert [step for step, _ in history(run_dir, sent.run_id, "train/optimizer/lr")] == list(range(1, 701))


def test_odd_names_and_values_do_not_stop_the_rest(run_dir: Path) -> None:
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.row(
            "train", step=1, loss=math.nan, grad_norm=math.inf, note="text", flag=True, **{"a%b": 1.0}, loss_of_web=2.5
        )
        writer.row("eval", step=1, loss=2.0, dataset="/data/news é")
        writer.row("event", event="skip", step=1, count=3)
    sent = sync(run_dir)
    metrics = client_of(run_dir).get_run(sent.run_id).data.metrics
    assert math.isnan(metrics["train/loss"])
    assert metrics["train/optimizer/grad_norm"] > 1e300
    assert metrics["train/speed/a_b"] == 1.0
    assert metrics["eval/news _/loss"] == 2.0
    assert metrics["train/loss_of_web"] == 2.5
    own = {"train/loss", "train/loss_of_web", "train/optimizer/grad_norm"}
    assert set(metrics) == own | {"train/speed/a_b", "eval/news _/loss"}


def test_validation_sets_of_one_run_are_series_of_their_own(run_dir: Path) -> None:
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        for dataset, loss in (("validation", 1.0), ("news", 2.0), ("books", 3.0)):
            writer.row("eval", step=1, loss=loss, dataset=dataset)
    metrics = client_of(run_dir).get_run(sync(run_dir).run_id).data.metrics
    assert metrics == {"eval/loss": 1.0, "eval/news/loss": 2.0, "eval/books/loss": 3.0}


def test_a_store_that_is_down_is_named_and_gets_everything_later(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(run_dir, range(1, 5), end="finished")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(MegalmError, match=re.escape(uri)) as caught:
            sync(run_dir, deadline_seconds=0.0)
    assert "megalm track sync" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    sent = sync(run_dir)
    assert len(history(run_dir, sent.run_id, "train/loss")) == 4
    assert sent.status == "FINISHED"


def test_a_locked_database_is_waited_for(run_dir: Path) -> None:
    """Another process holds the database; the delivery goes on when it lets go."""
    import sqlite3
    import threading

    write_rows(run_dir, range(1, 5), end="finished")
    database = sqlite3.connect(run_dir.parent / "mlflow.db", check_same_thread=False, isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(3.0, lambda: database.execute("ROLLBACK"))
    timer.start()
    begun = time.monotonic()
    sent = sync(run_dir)
    timer.join()
    database.close()
    assert time.monotonic() - begun >= 2.9
    assert len(history(run_dir, sent.run_id, "train/loss")) == 4


def test_two_mirrors_never_work_on_one_run(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    with open(run_dir / "mlflow.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="mirror"):
            sync(run_dir)
    assert sync(run_dir).metrics > 0


def test_a_moved_run_root_keeps_its_mlflow_run(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    moved = tmp_path_factory.mktemp("elsewhere") / "runs"
    run_dir.parent.rename(moved)
    write_rows(moved / run_dir.name, range(5, 7), attempt=2)
    second = sync(moved / run_dir.name)
    assert second.run_id == first.run_id
    assert len(history(moved / run_dir.name, first.run_id, "train/loss")) == 6


def train_losses(run_dir: Path, run_id: str) -> list[int]:
    return [step for step, _ in history(run_dir, run_id, "train/loss")]


def test_a_copied_run_folder_gets_an_mlflow_run_of_its_own(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    copy = run_dir.with_name("second-001")
    shutil.copytree(run_dir, copy)
    assert copied_from(copy) == run_dir
    assert copied_from(run_dir) is None
    write_rows(copy, range(5, 7), attempt=2)
    second = sync(copy)
    assert second.run_id != first.run_id
    assert train_losses(run_dir, first.run_id) == [1, 2, 3, 4]
    assert train_losses(run_dir, second.run_id) == [1, 2, 3, 4, 5, 6]
    tags = client_of(run_dir).get_run(second.run_id).data.tags
    assert (tags["megalm.copied_from"], tags["megalm.run_dir"]) == (str(run_dir), str(copy))
    (said,) = [record.getMessage() for record in caplog.records if first.run_id in record.getMessage()]
    assert_names(said, copy, run_dir)
    for folder, sent in ((copy, second), (run_dir, first)):  # from now on each knows its own
        assert sync(folder).run_id == sent.run_id


def test_a_moved_run_folder_keeps_its_mlflow_run(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    for name, copied in (("renamed", False), ("on-another-disk", True)):  # there a move is a copy and a removal
        before, run_dir = run_dir, run_dir.with_name(name)
        shutil.copytree(before, run_dir) if copied else before.rename(run_dir)
        shutil.rmtree(before, ignore_errors=True)
        assert copied_from(run_dir) is None
        assert sync(run_dir).run_id == first.run_id
        assert client_of(run_dir).get_run(first.run_id).data.tags["megalm.run_dir"] == str(run_dir)


def test_of_two_copies_of_a_removed_run_one_keeps_its_mlflow_run(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    copies = [run_dir.with_name("one"), run_dir.with_name("two")]
    for copy in copies:
        shutil.copytree(run_dir, copy)
    shutil.rmtree(run_dir)
    found = [sync(copy).run_id for copy in copies]
    assert found[0] == first.run_id != found[1]
    assert [sync(copy).run_id for copy in copies] == found


@pytest.mark.parametrize("first_is", ["original", "copy"])
def test_a_copy_put_in_the_place_of_the_original_never_shares_its_mlflow_run(run_dir: Path, first_is: str) -> None:
    write_rows(run_dir, range(1, 5))
    sync(run_dir)
    original = run_dir.with_name("original")
    run_dir.rename(original)
    shutil.copytree(original, run_dir)
    folders = [original, run_dir] if first_is == "original" else [run_dir, original]
    found = [sync(folder).run_id for folder in folders]
    assert found[0] != found[1]
    assert [sync(folder).run_id for folder in folders] == found


def test_a_folder_behind_a_link_is_no_copy(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    link = run_dir.with_name("link")
    link.symlink_to(run_dir)
    assert (sync(link).run_id, copied_from(link)) == (first.run_id, None)


def test_a_run_that_version_0_1_0_sent_keeps_its_mlflow_run_and_its_copy_gets_another(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    state = json.loads((run_dir / "mlflow.json").read_text())
    del state["owner"]
    (run_dir / "mlflow.json").write_text(json.dumps(state))
    copy = run_dir.with_name("copy")
    shutil.copytree(run_dir, copy)
    assert sync(copy).run_id != first.run_id
    assert sync(run_dir).run_id == first.run_id


def test_runs_of_a_moved_and_a_copied_root_in_a_common_store(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(run_dir.parent / "mlflow.db", elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}/mlflow.db")
    monkeypatch.chdir(run_dir)
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    assert (elsewhere / "mlartifacts" / first.run_id / "artifacts" / "config.yaml").is_file()
    assert not list(run_dir.rglob("mlruns"))
    copied = elsewhere / "copied"
    shutil.copytree(run_dir.parent, copied)
    assert sync(copied / run_dir.name).run_id != first.run_id
    moved = elsewhere / "moved"
    run_dir.parent.rename(moved)
    assert sync(moved / run_dir.name).run_id == first.run_id


def artifacts(run_dir: Path, run_id: str) -> dict[str, str]:
    """The text of every artifact where the store says that they are; MLflow's client remembers it by run id alone."""
    folder = Path(unquote(urlsplit(client_of(run_dir).get_run(run_id).info.artifact_uri).path))
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_moved_run_root_takes_its_artifacts_along(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    before, root = run_dir.parent, tmp_path_factory.mktemp("elsewhere") / "moved runs"
    before.rename(root)
    other = root / "other-001"
    shutil.copytree(root / run_dir.name, other, ignore=shutil.ignore_patterns("mlflow.*"))
    second = sync(other)
    assert not before.exists()
    assert artifacts(other, second.run_id) == artifacts(other, first.run_id) != {}


def test_a_copied_run_root_leaves_the_artifacts_of_the_original_alone(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    before = artifacts(run_dir, first.run_id)
    copy = tmp_path_factory.mktemp("elsewhere") / "copied" / run_dir.name
    shutil.copytree(run_dir.parent, copy.parent)
    (copy / "environment.json").write_text('{"host": "another"}')
    write_rows(copy, range(5, 7), attempt=2)
    second = sync(copy)
    assert artifacts(run_dir, first.run_id) == before
    assert train_losses(run_dir, first.run_id) == [1, 2, 3, 4]
    assert artifacts(copy, second.run_id) == before | {"environment.json": '{"host": "another"}'}
    assert train_losses(copy, second.run_id) == [1, 2, 3, 4, 5, 6]


def test_a_deleted_mlflow_run_is_made_anew(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 5))
    first = sync(run_dir)
    client_of(run_dir).delete_run(first.run_id)
    second = sync(run_dir)
    assert second.run_id != first.run_id
    assert second.metrics == first.metrics


def test_damaged_files_are_errors_that_name_them(run_dir: Path) -> None:
    write_rows(run_dir, range(1, 3))
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b"{oops\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        sync(run_dir)
    (run_dir / "mlflow.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"mlflow\.json"):
        sync(run_dir)
    with pytest.raises(ConfigError, match="nothing"):
        sync(run_dir / "nothing")


def test_a_folder_that_is_no_run_gets_none_in_mlflow(run_dir: Path) -> None:
    """The run root, given in place of a run: nothing is made in it or beside it."""
    root = run_dir.parent
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(ConfigError, match=rf"{root}.*metrics\.jsonl"):
        sync(root)
    assert sorted(root.parent.rglob("*")) == before


def test_no_request_holds_more_than_mlflow_takes(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server refuses a larger batch; SQLite does not, so the sizes are looked at on their way."""
    sizes, log_batch = [], mlflow.MlflowClient.log_batch

    def watched(client: mlflow.MlflowClient, run_id: str, **entities: Any) -> None:
        sizes.append({name: len(items) for name, items in entities.items() if isinstance(items, list)})
        log_batch(client, run_id, **entities)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", watched)
    (run_dir / "config.yaml").write_text(json.dumps({f"key{index}": index for index in range(250)}))
    write_rows(run_dir, range(1, 701), end="finished")
    sent = sync(run_dir)
    assert sum(size.get("metrics", 0) for size in sizes) == sent.metrics > 2000
    assert max(size.get("metrics", 0) for size in sizes) <= 1000
    assert sum(size.get("params", 0) for size in sizes) > 250
    assert max(size.get("params", 0) for size in sizes) <= 100


def test_a_store_that_was_left_half_made_is_made_anew(tmp_path: Path) -> None:
    """A mirror that is ended while it makes the tables leaves them under another name, which nobody opens."""
    from megalm.tracking.mlflow_mirror.client import MlflowStore

    (tmp_path / "mlflow.db.partial").write_bytes(b"not all of a database")
    store = MlflowStore(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)
    assert store.run_tags("none") is None
    assert (tmp_path / "mlflow.db").is_file()
    assert not list(tmp_path.glob("mlflow.db.partial*"))
