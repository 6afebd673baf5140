"""What a run measures of itself where its JSON asks for it: a profile of a step, traffic between ranks, phase times."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, losses, pretrain, rows, run_folder, train_rows, write_json

pytestmark = pytest.mark.e2e

STEPS, STEP, RANKS = 5, 3, 2
BATCH = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "bf16": None}
ACCUMULATED = 4
ASKED: dict[str, Any] = {
    "flops_profiler": {"enabled": True, "profile_step": STEP, "detailed": True, "output_file": "/nowhere/profile.log"},
    "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
    "wall_clock_breakdown": True,
    "dump_state": True,
}


def _train(folder: Path, data: SmallData, *words: str, base: str, **changes: Any) -> Path:
    folder.mkdir()
    json_file = write_json(folder / "ds.json", base, **BATCH, **changes)
    command = pretrain(*data.words, f"train.steps={STEPS}", "run.name=mine", *words, ranks=RANKS, json_file=json_file)
    finished = finish(folder, command)
    assert finished.code == 0, finished.explain()
    return folder


def _traffic(listed: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    return {(it["axis"], it["collective"]): it["bytes"] for it in listed}


def _times(profile: dict[str, Any]) -> dict[str, float]:
    """Seconds by part of a step."""
    return {it["part"]: it["seconds"] for it in profile["times"]}


def _event(folder: Path, name: str) -> dict[str, Any]:
    (event,) = (row for row in rows(folder) if row.get("event") == name)
    return event


def test_a_measured_run_is_the_same_run_and_its_traffic_is_the_documented_one(
    small_data: SmallData, tmp_path: Path
) -> None:
    measured = _train(tmp_path / "measured", small_data, "tracking.tensorboard=true", base="zero2.json", **ASKED)
    plain = _train(tmp_path / "plain", small_data, base="zero2.json")
    assert losses(measured) == losses(plain), "bit for bit"

    # docs/parallelism.md: a rank gathers the weights and reduces the gradients once a step.
    folder = run_folder(measured)
    parameters = json.loads((folder / "environment.json").read_text())["parameters"]
    profile = json.loads((folder / "profile" / f"step-{STEP:08d}.json").read_text())
    of_step = _traffic(profile["traffic"])
    assert of_step["data", "all_gather"] == 4 * parameters
    rest = of_step["data", "all_reduce"] - 4 * parameters
    assert 0 <= rest <= 64, "and a few numbers: loss and gradient norm"
    event = _event(measured, "traffic")
    assert (event["first_step"], event["last_step"], event["ranks"]) == (1, STEPS, RANKS)
    # Decisions are left out: ranks compare their pace now and then, not at each step.
    of_run = {place: count for place, count in _traffic(event["traffic"]).items() if place[0] != "control"}
    assert of_run == {place: count * STEPS * RANKS for place, count in of_step.items() if place[0] != "control"}

    # Matrix products and attention, counted as they ran, are about the model's formula.
    assert 0.9 < profile["flops_measured"] / profile["flops_computed"] < 1.2
    assert profile["phases"].keys() == {"data", "forward", "backward", "update", "logging"}
    assert profile["phases"]["forward"]["calls"] == ACCUMULATED
    assert profile["operators"]["aten::mm"]["calls"] > 0
    assert "aten::mm" in (folder / "profile" / f"step-{STEP:08d}.txt").read_text()
    for rank in range(RANKS):
        file = folder / "profile" / f"step-{STEP:08d}.rank-{rank}.trace.json.gz"
        events = {it.get("name") for it in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
        assert {"aten::mm", f"ProfilerStep#{STEP}"} <= events
    times = _times(profile)
    assert {"data", "forward", "backward", "optimizer", "communication: data", "logging"} <= times.keys()
    assert sum(times.values()) == pytest.approx(profile["seconds"], rel=0.2), "of all ranks, and of rank 0"
    assert "communication: data" in (folder / "report.html").read_text()
    assert (folder / _event(measured, "profile")["path"]).is_file()
    assert "all_gather" in (folder / "log.txt").read_text()

    shown = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert [it.step for it in shown] == list(range(1, STEPS + 1))
    assert [it.value for it in shown] == pytest.approx(list(losses(measured).values()))

    for row in train_rows(measured):
        phases = [row[f"{phase}_seconds"] for phase in ("forward", "backward", "update")]
        assert min(phases) > 0
        assert sum(phases) < row["step_seconds"]
    given = json.loads((folder / "deepspeed.resolved.json").read_text())
    assert not {"flops_profiler", "comms_logger"} & given.keys()

    assert not (run_folder(plain) / "profile").exists()
    assert not {"traffic", "profile"} & {row.get("event") for row in rows(plain)}
    assert "forward_seconds" not in train_rows(plain)[0]


@pytest.mark.slow  # tests/gpu_rehearsal has the bytes of every stage on every change, by the same counter
@pytest.mark.parametrize(
    ("base", "settings", "gradients", "weights"),
    [
        ("zero1.json", {"stage": 1}, 1, (1, 1)),
        ("zero3.json", {"stage": 3, "stage3_param_persistence_threshold": 0}, ACCUMULATED, (ACCUMULATED, 8)),
    ],
)
def test_traffic_of_the_other_stages(
    small_data: SmallData, tmp_path: Path, base: str, settings: dict[str, Any], gradients: int, weights: tuple[int, int]
) -> None:
    """Gradients and weights in bytes of all parameters, per step and rank."""
    words = ("train.count_traffic=true",)
    folder = _train(tmp_path / "run", small_data, *words, base=base, zero_optimization=settings)
    parameters = json.loads((run_folder(folder) / "environment.json").read_text())["parameters"]
    traffic = {place: count / STEPS / RANKS for place, count in _traffic(_event(folder, "traffic")["traffic"]).items()}
    reduced = traffic["data", "reduce_scatter" if "3" in base else "all_reduce"]
    assert 0 <= reduced - gradients * 4 * parameters <= 64
    assert weights[0] <= traffic["data", "all_gather"] / (4 * parameters) <= weights[1], traffic


def test_a_pipeline_is_measured_too(small_data: SmallData, tmp_path: Path) -> None:
    """DeepSpeed's own timers end such a run in its first step."""
    words = ("parallel.pipeline=2", f"profile.steps={STEP}:{STEP + 1}", "train.count_traffic=true")
    measured = _train(tmp_path / "measured", small_data, *words, base="pipeline.json", wall_clock_breakdown=True)
    traffic = _traffic(_event(measured, "traffic")["traffic"])
    micro_batches = RANKS * ACCUMULATED  # one data-parallel rank has all of them
    hidden = 2 * 64 * 64 * 4  # a micro-batch of 2 sequences of 64 tokens, 64 wide, fp32: forward and back
    assert traffic["pipeline", "send"] == traffic["pipeline", "recv"]
    tied = 2 * 4 * small_data.vocabulary * 64  # the gradients of both copies
    assert traffic["pipeline", "send"] == (2 * hidden * micro_batches + tied) * STEPS
    row = train_rows(measured)[-1]
    assert 0 < row["forward_seconds"] + row["backward_seconds"] + row["update_seconds"] < row["step_seconds"]
    name = f"steps-{STEP:08d}-{STEP + 1:08d}.json"
    profile = json.loads((run_folder(measured) / "profile" / name).read_text())
    assert {"forward", "backward", "wait", "update"} <= profile["phases"].keys()
    times = _times(profile)
    assert min(times[part] for part in ("forward", "backward", "optimizer", "communication: pipeline")) > 0
    assert "communication: tensor" not in times
