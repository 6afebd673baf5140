"""`megalm parity`: equal where the code is right, not equal where a collective is broken, gone when it is stopped."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.parity.miniature import ParityCase, make_case
from megalm.parity.miniature_training import SAVED, RankFindings, train_and_resume
from megalm.parity.parity_report import ParityReport, allowed, compare
from megalm.runs.run_settings import read_settings
from tests.distributed.faults import Broken, Site, find_sites
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

MEGALM = Path(sys.executable).with_name("megalm")
JSON = "zero2.json"
OVERRIDES = ("train.reduce_gradients=micro_batch",)


def _reduction() -> Site:
    """Where DeepSpeed averages gradients over the data ranks."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    lines, first = inspect.getsourcelines(DeepSpeedZeroOptimizer.average_tensor)
    return Site("runtime/zero/stage_1_and_2.py", first, first + len(lines), "average_tensor", "dist.reduce", True)


def _weights() -> Site:
    """Where ranks exchange the initial weights that they draw by turns."""
    (site,) = [each for each in find_sites(("megalm/engine",)) if each.function == "_InitialWeights.fill"]
    return site


BROKEN: dict[str, Callable[[], Site]] = {"gradients": _reduction, "initial weights": _weights}


def _train(comm: Any, device: torch.device, case: ParityCase, folder: Path) -> RankFindings:
    return train_and_resume(comm, device, case.reference, case.shape, folder)


def _train_broken(comm: Any, device: torch.device, case: ParityCase, folder: Path, other: Path) -> list[RankFindings]:
    found = []
    for name, site in BROKEN.items():
        with Broken([site()], "skipped") as broken:
            found.append(train_and_resume(comm, device, case.run, case.shape, folder / name, other))
        assert broken.met, name
    return found


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParityReport]:
    folder = tmp_path_factory.mktemp("parity")
    files = read_settings(None, ["model.hidden_size=64", *OVERRIDES], JSON, resume=False, ranks=2)
    case = make_case(files, 2, DeviceFacts("cuda", bf16=False, memory_bytes=2**40))
    (alone,) = run_ranks(1, _train, case, folder / "alone")
    ranks = run_ranks(2, _train_broken, case, folder, folder / "alone" / f"step-{SAVED:08d}")
    on_one, exact = (alone.saved, alone.second_half), allowed("fp32", "fp32")
    return {name: compare(alone, found, on_one, exact) for name, *found in zip(BROKEN, *ranks, strict=True)}


def _different(report: ParityReport) -> set[str]:
    return {line.what for line in report.lines if not line.equal}


def test_gradients_that_are_not_averaged_are_seen(broken: dict[str, ParityReport]) -> None:
    report = broken["gradients"]
    assert not report.equal
    different = _different(report)
    assert {"gradient norms", "weights after the steps", "moments after the steps"} <= different
    assert "weights before step 1" not in different


def test_ranks_that_begin_with_other_weights_are_seen(broken: dict[str, ParityReport]) -> None:
    assert not broken["initial weights"].equal
    assert "weights before step 1" in _different(broken["initial weights"])


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(MEGALM), "parity", "--deepspeed_config", JSON, *OVERRIDES, *words]
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_the_command_finds_a_layout_equal(tmp_path: Path) -> None:
    words = ("data.document_mask=true", "train.checkpoint_activations_every=1")
    process = _start(tmp_path, "--json", *words, "schedule.batch=[{from_step: 100, sequences: 32}]")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    found = json.loads(out)
    assert found["verdict"] == "equal"
    assert found["failure"] is None
    assert (found["layout"]["data"], found["zero_stage"], found["precision"]) == (2, 2, "bf16")
    exact = [line for line in found["comparisons"] if line["unit"] == "elements"]
    assert {line["difference"] for line in exact} == {0}
    assert len(exact) == 4
    losses = [mine for mine, _ in found["losses"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert min(mine for mine, _ in found["norms"]) > 0.5  # each update is clipped
    assert "comparing" in error


def _processes(parent: int, generations: int) -> list[psutil.Process]:
    """The command's descendants, once there are that many generations."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = psutil.Process(parent).children(recursive=True)
        depth = {parent: 0}
        for each in found:
            depth[each.pid] = depth.get(each.ppid(), 0) + 1
        if max(depth.values()) >= generations:
            return found
        time.sleep(0.1)
    raise AssertionError("the ranks have not started")


@pytest.mark.parametrize(
    ("number", "code", "generations"),
    [
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        (signal.SIGKILL, -9, 2),
    ],
)
def test_nothing_is_left_when_it_is_stopped(tmp_path: Path, number: int, code: int, generations: int) -> None:
    process = _start(tmp_path)
    started = _processes(process.pid, generations)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == code
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("megalm-parity-*"))


def test_what_a_run_would_refuse_is_refused(tmp_path: Path) -> None:
    process = _start(tmp_path, "parallel.pipeline=2")
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert error.startswith("megalm: error: ")
