from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.cli.plan import measured_rate
from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.errors import ConfigError
from tests.messages import assert_names

CPU = DeviceFacts(kind="cpu", bf16=True, memory_bytes=64 << 30)


def write_run(folder: Path, device: str, **facts: Any) -> Path:
    """Ten steps at 1,000 tokens/s and an MFU of 0.3 after a slow first one."""
    folder.mkdir()
    rows = [
        {"kind": "train", "step": step, "tokens": step * 64, "loss": 3.0, "attempt": 1, "time": 1000.0 + step}
        | {"mfu": 0.3 if step > 1 else 0.01, "tokens_per_second": 1000.0 if step > 1 else 10.0}
        for step in range(1, 12)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {"device": device, "device_kind": "cuda", "world_size": 4, "flops_per_token": 6_000_000}
    (folder / "environment.json").write_text(json.dumps(environment | facts))
    return folder


def test_mfu_carries_over_between_known_gpus(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "NVIDIA A100-SXM4-80GB")
    rate = measured_rate(run, gpu_by_name("rtx-5090"))
    assert (rate.share, rate.flops, rate.is_assumed) == (0.3, None, False)
    assert_names(rate.origin, run)


def test_a_device_without_a_data_sheet_keeps_its_own_speed(tmp_path: Path) -> None:
    unknown = DeviceFacts("cuda", True, 8 << 30, name="NVIDIA L20")
    assert measured_rate(write_run(tmp_path / "gpu", "NVIDIA L20"), unknown).flops == 1000 * 6e6 / 4
    run = write_run(tmp_path / "cpu", "x86_64", device_kind="cpu")
    assert measured_rate(run, CPU).flops == 1000 * 6e6 / 4
    with pytest.raises(ConfigError) as caught:
        measured_rate(run, unknown)
    assert_names(str(caught.value), run, "x86_64", "NVIDIA L20", "--mfu")


def test_a_run_without_a_measured_speed_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "NVIDIA A100-SXM4-80GB", flops_per_token=None)
    with pytest.raises(ConfigError) as caught:
        measured_rate(run, gpu_by_name("A100"))
    assert_names(str(caught.value), run)
