"""Every file of ds_configs/ trains, unchanged, on two ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import DS_CONFIGS, finish, losses, own_lines, pretrain, rows

pytestmark = pytest.mark.e2e

FILES = sorted(path.name for path in DS_CONFIGS.glob("*.json"))
# The first use of DeepSpeed's CPU Adam compiles it, which takes a minute or two.
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
    assert {"fp16.json", "bf16.json", "fp32.json"} < set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_trains_unchanged(small_data: SmallData, tmp_path: Path, name: str) -> None:
    words = small_data.changed(*SMALLER.get(name, ()), "train.rehearse=true", f"train.steps={STEPS}")
    command = pretrain(*words, ranks=2, json_file=name)
    finished = finish(tmp_path, command, COMPILES_SECONDS, environment=ENVIRONMENT.get(name, {}))
    assert finished.code == 0, finished.explain()
    assert finished.left == []
    assert own_lines(finished.stderr) == [], finished.explain()
    found = losses(tmp_path)
    assert list(found) == [1, 2, 3]
    # A model that knows nothing: the logarithm of the number of tokens.
    assert found[1] == pytest.approx(math.log(small_data.vocabulary), rel=0.05)
    assert 0.0 < found[3] < found[1], found
    assert [row["event"] for row in rows(tmp_path) if row["kind"] == "event"] == ["start", "checkpoint", "end"]
