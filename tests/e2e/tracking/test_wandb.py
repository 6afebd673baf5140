"""A run folder at Weights & Biases, by its own package in offline mode: what it would upload, read from its files."""

from __future__ import annotations

import importlib.metadata
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.mlflow_mirror.mirror_process import start_mirror, sync_trackers
from tests.e2e.tracking.run_folders import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # it installs the package, which the locks leave out

_BLOCK = 32768


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, object, str], None]) -> Path | None:
    """A folder with wandb and what it needs; None if it is installed."""
    try:
        importlib.metadata.distribution("wandb")
        return None
    except importlib.metadata.PackageNotFoundError:
        folder = tmp_path_factory.mktemp("wandb")
    lock = Path(__file__).parents[3] / "requirements.lock"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "2", "--constraint", str(lock)]
    done = subprocess.run([*command, "--target", str(folder), "wandb"], capture_output=True, text=True, check=False)
    reached = not re.search(r"connection broken|Could not fetch|name resolution|timed out", done.stderr, re.IGNORECASE)
    require("index", reached, "the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def tracked(run_dir: Path, package: Path | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    if package is not None:
        monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("tracking: {", "tracking: {mlflow: false, wandb: true, "))
    return run_dir


def records(run_dir: Path) -> list[dict[str, list[Any]]]:
    """Of each of its runs in order: kind -> what was recorded."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        kinds: dict[str, list[Any]] = {}
        for content in _entries(file.read_bytes()):
            record = Record.FromString(content)
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        found.append(kinds)
    return found


def _entries(content: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log, behind seven bytes of its own."""
    place, entry = 7, b""
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:  # no header fits into the rest of a block
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        entry += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def history(kinds: dict[str, list[Any]], key: str) -> list[tuple[int, float]]:
    rows = [{item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in kinds["history"]]
    return [(row["_step"], row[key]) for row in rows if key in row]


def test_each_run_of_the_group_has_the_rows_that_counted(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = start_mirror(tracked)
    write_rows(tracked, range(1, 7), end="stopped")
    with MetricsWriter(tracked / "metrics.jsonl") as writer:
        writer.row("event", event="end", step=6, status="stopped", exit_code=75)
    assert handle.finish(120.0), (tracked / "mlflow.log").read_text()
    assert not (tracked / "mlflow.json").exists(), "only the tracker that is asked for"
    (first,) = records(tracked)
    (begun,) = first["run"]
    assert (begun.project, begun.run_group, begun.display_name) == ("trials", tracked.name, tracked.name)
    assert history(first, "train/loss") == [(step, 4.0 / step) for step in range(1, 7)]
    assert history(first, "eval/perplexity") == [(6, 4.48)]
    moments = [moment for _, moment in history(first, "_timestamp")]
    assert moments[0] > begun.start_time.seconds - 60
    config = {item.key: json.loads(item.value_json) for update in first["config"] for item in update.update}
    assert config["train.steps"] == 4
    assert config["deepspeed.bf16.enabled"] is True
    assert {file.path for files in first["files"] for file in files.files} >= {
        f"{tracked.name}/{name}" for name in ("config.yaml", "samples/step-00000004.txt")
    }
    assert (first["exit"][0].exit_code, "preempting" in first) == (75, True)

    # A resume takes steps 5 and 6 back. Its own variables come before the run's settings.
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "large,slow")
    write_rows(tracked, range(5, 6), attempt=2, end="finished")
    (sink,) = sync_trackers(tracked)
    assert "wandb sync" in sink.outcome
    second = records(tracked)[1]
    (begun,) = second["run"]
    assert (begun.project, begun.run_group, list(begun.tags)) == ("theirs", tracked.name, ["large", "slow"])
    assert begun.run_id != first["run"][0].run_id
    assert history(second, "train/loss") == [(step, 4.0 / step) for step in range(1, 6)]
    assert [step for step, _ in history(second, "eval/loss")] == [5]
    assert second["exit"][0].exit_code == 0
