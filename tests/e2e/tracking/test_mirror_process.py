"""The mirror as a process of its own: it never touches training, and ends with it however that ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest

from megalm.errors import MegalmError
from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.mlflow_mirror import mirror_process
from megalm.tracking.mlflow_mirror.sync_state import MirrorState
from tests.e2e.tracking.run_folders import sync, write_rows
from tests.messages import assert_names

pytestmark = pytest.mark.e2e

# The mirror yields to everything else on the machine: beside other tests its imports alone may take half a minute.
PATIENCE_SECONDS = 180.0

# A trainer that dies without a word: it writes its rows, maybe a signal event, and is killed with -9.
KILLED_TRAINER = """
import os, signal, sys
from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.mlflow_mirror.mirror_process import start_mirror
run_dir, signalled = sys.argv[1], sys.argv[2] == "signalled"
handle = start_mirror(run_dir)
assert not {"mlflow", "torch"} & set(sys.modules), "the trainer must not load these"
writer = MetricsWriter(run_dir + "/metrics.jsonl")
writer.row("event", event="start", attempt=1)
for step in range(1, 6):
    writer.row("train", step=step, loss=1.0 / step)
if signalled:
    writer.row("event", event="signal", step=5, name="SIGTERM")
print(handle.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} still lives after {seconds} s"
        time.sleep(0.1)


def mlflow_run(run_dir: Path, uri: str | None = None) -> mlflow.entities.Run:
    state = MirrorState.load(run_dir / "mlflow.json")
    assert state.run_id, (run_dir / "mlflow.log").read_text()
    return mlflow.MlflowClient(uri or state.tracking_uri).get_run(state.run_id)


def wait_for(run_dir: Path, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, (run_dir / "mlflow.log").read_text()
        time.sleep(0.1)


def state(run_dir: Path) -> MirrorState:
    return MirrorState.load(run_dir / "mlflow.json")


def test_a_run_is_followed_to_its_end(run_dir: Path) -> None:
    """With what is written after the last row, too: report.html tells of the run's end, so it comes after that.

    It samples its own node meanwhile; another node's process samples only.
    """
    environment = json.loads((run_dir / "environment.json").read_text())
    (run_dir / "environment.json").write_text(json.dumps({**environment, "nodes": [{"host": "n0"}, {"host": "n1"}]}))
    handle = mirror_process.start_mirror(run_dir, system_metrics=True)
    other = mirror_process.start_mirror(run_dir, node=1, system_metrics=True, feeds_trackers=False)
    wait_for(run_dir, (run_dir / "system" / "node-1.jsonl").exists)
    assert other.finish(PATIENCE_SECONDS), (run_dir / "system" / "node-1.log").read_text()
    write_rows(run_dir, range(1, 5), end="finished")
    wait_for(run_dir, lambda: state(run_dir).status_sent == "FINISHED")
    time.sleep(1.0)
    (run_dir / "report.html").write_text("<p>the end</p>")
    assert handle.finish(PATIENCE_SECONDS), (run_dir / "mlflow.log").read_text()
    run = mlflow_run(run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 1.0
    listed = mlflow.MlflowClient(state(run_dir).tracking_uri).list_artifacts(run.info.run_id)
    assert "report.html" in [item.path for item in listed]
    for node in (0, 1):
        assert 0 <= run.data.metrics[f"system/node_{node}/cpu_utilization_percentage"] <= 100
        assert run.data.metrics[f"system/node_{node}/system_memory_usage_megabytes"] > 0


def test_rows_arrive_while_training_goes_on_and_signals_do_not_stop_it(run_dir: Path) -> None:
    """Slurm sends them to every process; the mirror has to bring the news that the run was stopped."""
    handle = mirror_process.start_mirror(run_dir)
    process = psutil.Process(handle.process.pid)
    wait_for(run_dir, lambda: process.nice() == 19)  # it yields the processor
    assert process.environ()["OMP_NUM_THREADS"] == "1"
    assert os.getsid(process.pid) == process.pid  # a Ctrl-C in the terminal is not for the mirror
    write_rows(run_dir, range(1, 5))
    wait_for(run_dir, lambda: state(run_dir).offset > 0)
    run = mlflow_run(run_dir)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("RUNNING", 1.0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        handle.process.send_signal(number)
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.row("event", event="end", step=4, status="stopped", exit_code=75)
    assert handle.finish(PATIENCE_SECONDS), (run_dir / "mlflow.log").read_text()
    assert mlflow_run(run_dir).info.status == "KILLED"


@pytest.mark.parametrize("sent_before", [True, False])
def test_the_end_of_an_earlier_attempt_is_not_this_ones(run_dir: Path, sent_before: bool) -> None:
    """The mirror of a resumed run starts before the resume event is written."""
    write_rows(run_dir, range(1, 5), end="stopped")
    if sent_before:
        sync(run_dir)
    handle = mirror_process.start_mirror(run_dir)
    wait_for(run_dir, lambda: state(run_dir).offset > 0)
    time.sleep(3.0)  # a pass or two with nothing but the earlier attempt
    assert handle.process.poll() is None, (run_dir / "mlflow.log").read_text()
    write_rows(run_dir, range(5, 7), attempt=2, end="finished")
    assert handle.finish(PATIENCE_SECONDS)
    run = mlflow_run(run_dir)
    assert (run.info.status, run.data.metrics["train/tokens"]) == ("FINISHED", 600.0)


@pytest.mark.parametrize(("word", "status"), [("silent", "FAILED"), ("signalled", "KILLED")])
def test_it_ends_soon_after_a_killed_trainer(run_dir: Path, word: str, status: str) -> None:
    trainer = subprocess.run(
        [sys.executable, "-c", KILLED_TRAINER, str(run_dir), word], capture_output=True, text=True, check=False
    )
    assert trainer.returncode == -signal.SIGKILL, trainer.stderr
    wait_until_gone(int(trainer.stdout), seconds=PATIENCE_SECONDS)
    run = mlflow_run(run_dir)
    assert (run.info.status, run.data.metrics["train/loss"]) == (status, 0.2)


def test_a_dead_server_costs_training_nothing_and_sync_delivers_later(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        begun = time.monotonic()
        handle = mirror_process.start_mirror(run_dir)
        write_rows(run_dir, range(1, 5), end="finished")
        assert time.monotonic() - begun < 5.0  # a request alone may wait for 20
        wait_for(run_dir, lambda: "trying again" in (run_dir / "mlflow.log").read_text())
        assert not handle.finish(0.5)
        handle.process.kill()
        handle.process.wait()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    assert sync(run_dir).status == "FINISHED"


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9?user=me@corp.example&password=SECRET",
        "http://127.0.0.1:9/?token=SECRET",
        "http://me:a@b/SECRET c@127.0.0.1:9",
        "http://SECRET@127.0.0.1:9",
        "unknown://me:SECRET@127.0.0.1:9/db",
    ],
)
def test_credentials_in_the_address_are_written_nowhere(
    address: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by MLflow and what it uses, whose errors and warnings quote the address."""
    secret = "hunter2canary"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("SECRET", secret))
    handle = mirror_process.start_mirror(run_dir)
    write_rows(run_dir, range(1, 5))
    wait_for(run_dir, lambda: "trying again" in (run_dir / "mlflow.log").read_text())
    handle.process.kill()
    handle.process.wait()
    with pytest.raises(MegalmError) as error:
        sync(run_dir, deadline_seconds=0.0)
    assert secret not in str(error.value)
    assert_names(error.value, address.partition(":")[0], "127.0.0.1:9")
    assert [path for path in run_dir.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()] == []


def test_it_gives_up_within_its_bound_and_says_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror_process, "_DEADLINE_SECONDS", 1.0)
    monkeypatch.setattr(mirror_process, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(os, "nice", lambda _: 0)  # this very process runs `main` here
    write_rows(run_dir, range(1, 5))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(
            mirror_process.ParentWatch, "run", lambda watch: watch.ended.set()
        )  # no end by force in here
        assert mirror_process.main([str(run_dir), "--follow", "--parent-pid", gone.stdout.decode().strip()]) == 1
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"megalm track sync {run_dir}" in said


@pytest.mark.slow
def test_a_server_that_comes_up_late_gets_everything(
    run_dir: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real MLflow server over HTTP: dead while training starts, there before it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    handle = mirror_process.start_mirror(run_dir)
    write_rows(run_dir, range(1, 5), end="finished")
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--artifacts-destination", tmp_path / "art"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        assert handle.finish(180), (run_dir / "mlflow.log").read_text() + (tmp_path / "server.log").read_text()
        run = mlflow_run(run_dir, uri)
        assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)
        files = {item.path for item in mlflow.MlflowClient(uri).list_artifacts(run.info.run_id)}
        assert "config.yaml" in files
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its own session: the server and its workers only
        server.wait()
