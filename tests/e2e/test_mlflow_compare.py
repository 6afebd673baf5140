"""Two runs side by side in MLflow's own compare page: a real server on loopback, looked at with a real browser."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megalm.runs.metrics_log import read_metrics
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, job, megalm, pretrain, until

pytestmark = pytest.mark.e2e

PEAKS = ("0.002", "0.0003")
STEPS = 4
WINDOW = (1400, 2400)
# Nothing of a person's profile, and no word to anybody but the server.
BROWSER = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", f"--window-size={WINDOW[0]},{WINDOW[1]}", "--virtual-time-budget=30000"),
)
# Without processes for MLflow's own jobs, each of which imports all of it.
SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Tracked:
    """Two runs of different learning rates, in run folders and on a server."""

    folder: Path
    server: str
    run_ids: list[str]

    @property
    def compare_page(self) -> str:
        query = urllib.parse.urlencode({"runs": json.dumps(self.run_ids), "experiments": json.dumps(["1"])})
        return f"{self.server}/#/compare-runs?{query}"

    def last(self, peak: str, kind: str) -> float:
        rows = read_metrics(self.folder / "runs" / f"peak-{peak}" / "metrics.jsonl")
        return [row["loss"] for row in rows if row["kind"] == kind][-1]


@pytest.fixture(scope="module")
def tracked(
    require: Callable[[str, object, str], None],
    small_data: SmallData,
    empty_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Tracked]:
    require("chromium", shutil.which("chromium"), "no chromium; apt-get install -y --no-install-recommends chromium")
    folder = tmp_path_factory.mktemp("compare")
    programs = Path(sys.executable).parent
    for peak in PEAKS:
        own = (f"run.name=peak-{peak}", f"schedule.peak_learning_rate={peak}", "evaluate.interval_steps=2")
        training = finish(folder, pretrain(*small_data.changed(*own, f"train.steps={STEPS}")))
        assert training.code == 0, training.explain()
    shutil.copy(empty_store, folder / "server.db")
    port = _free_port()
    server = f"http://127.0.0.1:{port}"
    serve = [programs / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    storage = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", folder / "artifacts"]
    to_log = ["bash", "-c", 'exec "$@" > server.log 2>&1', "server"]  # a pipe that nobody reads would fill
    with job(folder, [*to_log, *serve, *storage], SERVER) as started:
        until(lambda: started.process.poll() is not None or _answers(server), 120)
        sync = megalm("track", "sync", *(f"peak-{peak}" for peak in PEAKS))
        synced = finish(folder, sync, environment={"MLFLOW_TRACKING_URI": server})
        assert synced.code == 0, f"{synced.explain()}\n{(folder / 'server.log').read_text()}"
        states = [json.loads((folder / "runs" / f"peak-{peak}" / "mlflow.json").read_text()) for peak in PEAKS]
        yield Tracked(folder, server, [state["run_id"] for state in states])


def test_the_compare_page_shows_both_runs(tracked: Tracked) -> None:
    """And can be pictured."""
    picture = tracked.folder / "compare.png"
    shown = browse(tracked, "--dump-dom", f"--screenshot={picture}")
    content = picture.read_bytes()
    assert content.startswith(PNG_START)
    assert struct.unpack(">II", content[16:24]) == WINDOW
    run_names = shown[shown.index("Run Name:") + 1 :][:2]
    assert run_names == [f"peak-{peak}" for peak in PEAKS]
    parameters = shown[shown.index("Parameters") : shown.index("Metrics")]
    for name in ("data.sequence_length", "deepspeed.train_batch_size", "schedule.peak_learning_rate", *PEAKS):
        assert name in parameters
    metrics = shown[shown.index("Metrics") : shown.index("Artifacts")]
    assert {"train/loss", "eval/loss", "train/optimizer/lr"} <= set(metrics)
    numbers = {float(word) for word in metrics if _is_number(word)}
    for peak in PEAKS:
        for kind in ("train", "eval"):
            assert round(tracked.last(peak, kind), 3) in numbers


def browse(tracked: Tracked, *words: str) -> list[str]:
    """The visible texts of the compare page, one an element."""
    profile = tracked.folder / "profile"
    command = ["chromium", *BROWSER, f"--user-data-dir={profile}", *words, tracked.compare_page]
    seen = finish(tracked.folder, command, environment={"HOME": str(tracked.folder), "TZ": "UTC"})
    shutil.rmtree(profile, ignore_errors=True)
    assert seen.code == 0, seen.explain()
    page = _Texts()
    page.feed(seen.stdout)
    return page.texts


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._inside not in ("style", "script"):
            self.texts.append(data.strip())


def _answers(server: str) -> bool:
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
