"""A run with a scheduler of DeepSpeed's in its JSON: its rates, also over a resume and an extension."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, pretrain, run_folder, train_rows, write_json

pytestmark = pytest.mark.e2e

PARAMS = {"warmup_min_lr": 1e-4, "warmup_max_lr": 3e-3, "warmup_num_steps": 3, "total_num_steps": 7}
HALF, STEPS, MORE = 4, 9, 3


def _deepspeed_rates() -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupDecayLR(optimizer, **PARAMS)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def test_every_step_has_deepspeed_s_rate_and_a_resume_keeps_to_it(small_data: SmallData, tmp_path: Path) -> None:
    words = [word for word in small_data.words if not word.startswith("schedule.")]
    json_file = write_json(tmp_path / "ds.json", scheduler={"type": "WarmupDecayLR", "params": PARAMS})

    def train(*more: str) -> None:
        finished = finish(tmp_path, pretrain(*words, "run.name=mine", *more, json_file=json_file))
        assert finished.code == 0, finished.explain()

    train(f"train.steps={HALF}")
    train(f"train.steps={STEPS}", "--resume", "auto")
    rates = {row["step"]: row["lr"] for row in train_rows(tmp_path)}
    assert list(rates.values()) == pytest.approx(_deepspeed_rates(), rel=1e-12)
    assert "the learning rate is another" not in (run_folder(tmp_path) / "log.txt").read_text()
    train("--resume", "auto", "--extend-steps", str(MORE))
    after = {row["step"]: row["lr"] for row in train_rows(tmp_path)}
    assert list(after)[-1] == STEPS + MORE
    assert after[STEPS + 1] == pytest.approx(rates[STEPS], rel=0.5), "a cosine from the rate of then"
    assert 0 < after[STEPS + MORE] < after[STEPS + 1]
