"""Every file of ds_configs/ trains, unchanged, on two ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megalm.engine.cpp_extensions import load_async_io, load_cpu_adam
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import DS_CONFIGS, finish, losses, own_lines, pretrain, rows
from tests.ranks import run_ranks

pytestmark = pytest.mark.e2e

FILES = sorted(path.name for path in DS_CONFIGS.glob("*.json"))
COMPILES_SECONDS = 540.0
ENVIRONMENT = {"fp16.json": {"MEGALM_ALLOW_CPU_FP16": "1"}}
# A CPU needs seconds for what a step of this model takes in fp16; a smaller one learns too slowly to show it in three.
SMALLER = {
    "fp16.json": (
        *("model.hidden_size=16", "model.num_hidden_layers=1", "data.sequence_length=16"),
        "schedule.peak_learning_rate=0.02",
    )
}
STEPS = 3


def test_there_are_files() -> None:
    assert {"zero1.json", "zero2.json", "zero3.json", "zero2_offload.json", "zero3_offload.json"} < set(FILES)
    assert {"fp16.json", "bf16.json", "fp32.json", "muon.json"} < set(FILES)


def _compile(_: object, __: object, name: str) -> None:
    """What DeepSpeed compiles at its first use, on all cores: the ranks of the run have one each."""
    load_cpu_adam()
    if "nvme" in name:
        load_async_io()


# async_io takes five minutes of a core to compile; tests/distributed/test_nvme.py trains with it.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "nvme" in name else []) for name in FILES]
)
def test_trains_unchanged(small_data: SmallData, tmp_path: Path, name: str) -> None:
    if "offload" in name or "nvme" in name:
        run_ranks(1, _compile, name, timeout_seconds=COMPILES_SECONDS)
    words = small_data.changed(*SMALLER.get(name, ()), "train.rehearse=true", f"train.steps={STEPS}")
    command = pretrain(*words, ranks=2, json_file=name)
    finished = finish(tmp_path, command, environment=ENVIRONMENT.get(name, {}))
    assert finished.code == 0, finished.explain()
    assert finished.left == []
    assert own_lines(finished.stderr) == [], finished.explain()
    found = losses(tmp_path)
    assert list(found) == [1, 2, 3]
    # A model that knows nothing: the logarithm of the number of tokens.
    assert found[1] == pytest.approx(math.log(small_data.vocabulary), rel=0.05)
    assert 0.0 < found[3] < found[1], found
    assert [row["event"] for row in rows(tmp_path) if row["kind"] == "event"] == ["start", "checkpoint", "end"]
