"""metrics.jsonl: whole rows, strict JSON, torn lines, rows that a resume took back."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalm.errors import DataError
from megalm.runs.metrics_log import MetricsWriter, live_rows, read_metrics, read_rows
from tests.messages import assert_names


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_rows_come_back_with_their_time(tmp_path: Path) -> None:
    before = time.time()
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.row("train", step=1, tokens=2048, loss=np.float32(2.5), lr=1e-3)
        writer.row("event", event="start", fingerprints={"train": "ab12"}, path=tmp_path, seeds=(1, 2))
    train, event = read_metrics(tmp_path / "metrics.jsonl")
    assert before <= train.pop("time") <= time.time()
    assert train == {"kind": "train", "step": 1, "tokens": 2048, "loss": 2.5, "lr": 1e-3}
    assert event["fingerprints"] == {"train": "ab12"}
    assert event["path"] == str(tmp_path)
    assert event["seeds"] == [1, 2]


def test_numbers_that_json_lacks_survive_strict_readers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.row("train", step=1, loss=math.nan, grad_norm=np.float64("inf"), lr=-math.inf)
    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert (strict["loss"], strict["grad_norm"], strict["lr"]) == ("NaN", "Infinity", "-Infinity")
    row = next(read_metrics(path))
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["lr"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("torn", [b'{"kind":"train","st', b"x" * 200_000])
def test_a_torn_last_line_is_cut_and_reported(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.row("train", step=1)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsWriter(path) as writer:
        writer.row("train", step=2)
    assert path.read_bytes().startswith(whole)
    rows = list(read_metrics(path))
    assert [row.get("step") for row in rows] == [1, None, 2]
    assert (rows[1]["event"], rows[1]["dropped_bytes"]) == ("repair", len(torn))


def test_opening_an_intact_file_reports_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
            writer.row("train", step=step)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_kill_loses_no_row_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal, sys\nfrom megalm.runs.metrics_log import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\nfor step in range(100): writer.row('train', step=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(path)] == list(range(100))


def test_a_row_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """A file size limit stands for a full disk: the write stops in the middle of a row."""
    path = tmp_path / "metrics.jsonl"
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with MetricsWriter(path) as writer:
            writer.row("train", step=1)
            whole = path.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, old_limit[1]))
            with pytest.raises(OSError, match="too large"):
                writer.row("train", step=2)
            assert path.read_bytes() == whole
            resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
            writer.row("train", step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_rows_are_read_from_an_offset_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(3):
            writer.row("train", step=step)
    offsets = [after for _, after in read_rows(path)]
    assert offsets[-1] == os.path.getsize(path)
    assert [row["step"] for row, _ in read_rows(path, offsets[0])] == [1, 2]


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"step":1}\n'])
def test_a_broken_line_inside_is_an_error_with_its_place(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    first = b'{"kind":"train","step":1}\n'
    path.write_bytes(first + line + first)
    with pytest.raises(DataError) as refused:
        list(read_metrics(path))
    assert_names(refused.value, path, len(first))


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        list(read_metrics(tmp_path / "metrics.jsonl"))
    assert_names(refused.value, tmp_path / "metrics.jsonl")


def test_a_resume_takes_back_the_rows_after_its_step() -> None:
    def train(step: int, attempt: int) -> dict[str, object]:
        return {"kind": "train", "step": step, "attempt": attempt}

    skip = {"kind": "event", "event": "skip", "step": 4}
    resume = {"kind": "event", "event": "resume", "step": 2}
    rows = [train(1, 1), train(2, 1), train(3, 1), skip, train(4, 1), resume, train(3, 2)]
    live = live_rows(rows)
    assert [(row["step"], row["attempt"]) for row in live if row["kind"] == "train"] == [(1, 1), (2, 1), (3, 2)]
    assert skip in live
    assert resume in live


def test_a_run_that_starts_again_takes_back_everything() -> None:
    """Killed before its first checkpoint: --resume auto begins at step 0."""
    start = {"kind": "event", "event": "start", "step": 0}
    live = live_rows(
        [start, {"kind": "train", "step": 1, "attempt": 1}, start, {"kind": "train", "step": 1, "attempt": 2}]
    )
    assert [row.get("attempt") for row in live] == [None, None, 2]


def test_a_file_that_was_replaced_is_continued(tmp_path: Path) -> None:
    """An editor writes a new file and renames it; its last line may lack the end."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.row("event", event="resume", step=0, attempt=2)
        writer.row("train", step=1)
        assert not writer.reopen_if_gone()
        edited = tmp_path / "edited"
        edited.write_bytes(path.read_bytes() + b'{"kind"')
        edited.replace(path)
        assert writer.reopen_if_gone()
        assert not writer.reopen_if_gone()
        writer.row("train", step=2)
    assert [row.get("event", row.get("step")) for row in read_metrics(path)] == ["resume", 1, "repair", 2]


def test_a_full_disk_is_an_error_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with MetricsWriter(path) as writer, pytest.raises(OSError, match="too large") as failed:
            writer.row("train", step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    assert failed.value.filename == str(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError) as refused:
        list(read_metrics(tmp_path / "metrics.jsonl"))
    assert_names(refused.value, tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("left", [0, 20])
def test_a_file_that_was_emptied_is_continued(tmp_path: Path, left: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.row("event", event="resume", step=0, attempt=2)
        writer.row("train", step=1)
        os.truncate(path, left)
        assert writer.reopen_if_gone()
        assert not writer.reopen_if_gone()
        writer.row("train", step=2)
    assert [row.get("event", row.get("step")) for row in read_metrics(path)] == ["resume", 2]
