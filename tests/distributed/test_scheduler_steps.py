"""The rate in force at each optimizer step of DeepSpeed's own engine, with its own scheduler, against megalm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.planning.lr_schedule import learning_rate
from megalm.planning.resolve import resolve
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LR, STEPS = 3e-4, 12
SCHEDULERS: list[dict[str, Any]] = [
    {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3, "warmup_num_steps": 5}},
    {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear", "total_num_steps": 8}},
    {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3, "warmup_min_ratio": 0.1, "total_num_steps": 20}},
]


def _rates_of_deepspeed(comm: Any, device: torch.device) -> list[list[float]]:
    import deepspeed

    return [_rates(deepspeed, scheduler) for scheduler in SCHEDULERS]


def _rates(deepspeed: Any, scheduler: dict[str, Any]) -> list[float]:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda used, *_: rates.append(used.param_groups[0]["lr"]))
    config = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "scheduler": scheduler,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    rates.clear()  # the engine's own dry step
    for _ in range(2 * STEPS):
        engine.backward(engine(torch.ones(2, 4)).sum())
        engine.step()
    return rates


def test_megalm_has_the_rates_that_deepspeed_s_engine_applies(tmp_path: Path) -> None:
    (applied,) = run_ranks(1, _rates_of_deepspeed)
    loaded = load_run_config(None, [f"train.steps={STEPS}"])
    for scheduler, rates in zip(SCHEDULERS, applied, strict=True):
        path = tmp_path / "ds.json"
        optimizer = {"type": "AdamW", "params": {"lr": LR}}
        path.write_text(json.dumps({"train_batch_size": 4, "optimizer": optimizer, "scheduler": scheduler}))
        schedule = resolve(loaded, read_deepspeed_json(path), 1, DeviceFacts("cpu", False, 1 << 33)).schedule
        assert [learning_rate(schedule, step) for step in range(1, STEPS + 1)] == pytest.approx(rates, rel=1e-12, abs=0)
