"""A rank that gets less of its core than the other one is an event of the run, and on its page."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.tracking.report.page import write_report
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import job, pretrain, rows, run_folder, until
from tests.messages import assert_names

pytestmark = pytest.mark.e2e


def test_a_slow_rank_is_named(small_data: SmallData, tmp_path: Path) -> None:
    words = small_data.changed("train.steps=100000", "train.slow_seconds=1")

    def events() -> list[dict[str, Any]]:
        return [row for row in rows(tmp_path) if row.get("event") == "straggler"]

    with job(tmp_path, pretrain(*words, ranks=2)) as started:
        started.wait_for_step(3)
        slow = started.rank(1)

        def is_told() -> bool:
            slow.suspend()
            time.sleep(0.1)
            slow.resume()
            time.sleep(0.02)
            return bool(events())

        until(is_told, 120)
    (event,) = events()
    assert (event["rank"], event["host"], event["device"]) == (1, socket.gethostname(), "cpu")
    assert event["quantity"] == "compute"
    assert event["own_seconds"] > 1.3 * event["median_seconds"] > 0
    assert event["lasted_seconds"] >= 1
    folder = run_folder(tmp_path)
    named = ("rank 1", socket.gethostname())
    assert_names(next(line for line in (folder / "log.txt").read_text().splitlines() if "rank 1" in line), *named)
    assert_names(write_report(folder).read_text(), *named)
