"""Which steps are measured, and what is written of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from megalm.communicator import SingleProcessCommunicator
from megalm.engine.interface import Traffic
from megalm.planning.diagnostics import TRAFFIC_STEPS, Diagnostics
from megalm.train.step_diagnostics import (
    StepDiagnostics,
    measured_flops,
    part_times,
    phase_of_step,
    times_table,
)
from megalm.train.step_trace import PartTime
from tests.messages import assert_names


class Meter:
    """One message of 8 bytes a step."""

    def __init__(self) -> None:
        self.starts = 0

    def start(self) -> None:
        self.starts += 1

    def stop(self) -> list[Traffic]:
        return [Traffic("data", "all_reduce", 1, 8)]


def run(folder: Path, steps: list[int], **wanted: Any) -> tuple[list[dict[str, Any]], list[str], Meter]:
    """Events, lines and the meter of a run of these steps, of which the last one is its end."""
    meter, events, lines = Meter(), [], []
    place = folder / "profile"
    found = StepDiagnostics(
        Diagnostics(**wanted), place, SingleProcessCommunicator(), meter, lambda step: 10.0 * step, steps[-1]
    )
    for step in steps:
        with found.observed(step), phase_of_step("forward"):
            torch.ones(3, 4) @ torch.ones(4, 5)
        found.report(step, lambda name, **fields: events.append({"event": name, **fields}), lines.append)
    return events, lines, meter


def test_nothing_is_measured_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert run(tmp_path, [1, 2, 3])[:2] == ([], [])
    assert not list(tmp_path.iterdir())


def test_traffic_is_that_of_the_first_steps(tmp_path: Path) -> None:
    for steps, last in ((30, TRAFFIC_STEPS), (4, 4)):
        (event,), lines, meter = run(tmp_path, list(range(1, steps + 1)), count_traffic=True)
        assert (event["event"], event["first_step"], event["last_step"], event["ranks"]) == ("traffic", 1, last, 1)
        assert event["traffic"] == [{"axis": "data", "collective": "all_reduce", "calls": last, "bytes": 8 * last}]
        assert meter.starts == last, "later steps are not counted"
        assert any("all_reduce" in line for line in lines)
    # A rollback repeats steps; the second time is not added.
    (event,), *_ = run(tmp_path, [1, 2, 1, 2, 3], count_traffic=True)
    assert event["traffic"][0]["bytes"] == 24
    # Of a run that resumes, its own first steps.
    (event,), *_ = run(tmp_path, list(range(101, 131)), count_traffic=True)
    assert (event["first_step"], event["last_step"]) == (101, 100 + TRAFFIC_STEPS)


def test_a_profile_is_written_once(tmp_path: Path) -> None:
    (event,), *_ = run(tmp_path, [1, 2, 3, 2, 3], profile_steps=range(2, 3))
    assert (event["event"], event["profiled_step"], event["flops_measured"]) == ("profile", 2, 2 * 3 * 4 * 5)
    assert event["flops_computed"] == 20, "of step 2"
    files = {path.name.partition(".")[2] for path in (tmp_path / "profile").iterdir()}
    assert files == {"json", "txt", "rank-0.trace.json.gz"}
    assert (tmp_path / event["path"]).is_file()
    content = json.loads((tmp_path / "profile" / "step-00000002.json").read_text())
    assert content["operators"]["aten::mm"]["calls"] == 1
    assert content["traffic"] == [{"axis": "data", "collective": "all_reduce", "calls": 1, "bytes": 8}]
    run(tmp_path, [1], profile_steps=range(1, 2), profile_operators=False)
    assert json.loads((tmp_path / "profile" / "step-00000001.json").read_text())["operators"] == {}


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    events, lines, _ = run(tmp_path, [1, 2], profile_steps=range(1, 2))
    assert not events
    assert any("WARNING" in line and str(tmp_path / "profile") in line for line in lines)


@pytest.mark.parametrize(
    ("steps", "wanted", "profiled"),
    [
        ([1, 2, 3, 4, 5, 6], range(3, 6), (3, 5)),
        ([4, 5, 6, 7], range(3, 6), (4, 5)),  # a resume in the middle
        ([1, 2, 3], range(2, 9), (2, 3)),  # the end of the run
        ([1, 2, 3, 1, 2, 3, 4], range(2, 5), (2, 3)),  # rolled back after step 3
    ],
)
def test_the_steps_of_a_profile(tmp_path: Path, steps: list[int], wanted: range, profiled: tuple[int, int]) -> None:
    (event,), lines, meter = run(tmp_path, steps, profile_steps=wanted)
    assert (event["profiled_step"], event["last_step"]) == profiled
    count = profiled[1] - profiled[0] + 1
    assert meter.starts == count, "other steps are left alone"
    content = json.loads((tmp_path / event["path"]).with_suffix(".json").read_text())
    assert content["operators"]["aten::mm"]["calls"] == 1, "numbers are of one step"
    assert content["traffic"] == [{"axis": "data", "collective": "all_reduce", "calls": 1, "bytes": 8}]
    assert sum(row["share"] for row in content["times"]) == pytest.approx(1)
    assert sum(row["seconds"] for row in content["times"]) == pytest.approx(content["seconds"], rel=1e-6)
    (trace,) = (tmp_path / "profile").glob("*.rank-0.trace.json.gz")
    marks = {it["name"] for it in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {f"ProfilerStep#{step}" for step in range(profiled[0], profiled[1] + 1)} <= marks
    assert any(it.startswith("forward") for it in lines), "the table is printed"


def test_the_rank_that_takes_longest() -> None:
    fast, slow = {"forward": PartTime(0.1)}, {"forward": PartTime(0.3), "communication: data": PartTime(0.1)}
    forward, data = part_times([fast, slow])
    assert (forward["part"], forward["seconds"], forward["share"]) == (
        "forward",
        pytest.approx(0.2),
        pytest.approx(0.8),
    )
    assert data["rank_seconds"] == [0.0, 0.1]
    assert_names(times_table([forward, data]).splitlines()[2], "forward", "300.00", 1)


@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_products_and_attention(backward: bool) -> None:
    left, right = (torch.randn(7, 16, 8, requires_grad=backward) for _ in range(2))
    query, key, value = (torch.randn(2, 3, 16, 8, requires_grad=backward) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        product = torch.bmm(left, right.transpose(1, 2)).sum()
        attention = scaled_dot_product_attention(query, key, value).sum()
        if backward:
            (product + attention).backward()
    products = 2 * 7 * 16 * 8 * 16
    attentions = 2 * (2 * 2 * 3 * 16 * 8 * 16)  # scores, and their products with the values
    expected = 3 * products + 3.5 * attentions if backward else products + attentions
    assert measured_flops((it.name, it.input_shapes) for it in recorded.events()) == expected
