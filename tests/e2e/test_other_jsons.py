"""DeepSpeed JSONs of other toolkits, trained: as they are, resumed, and converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import PRETRAIN, finish, launcher, losses, megalm, pretrain, run_folder

pytestmark = pytest.mark.e2e

# A template for a trainer that fills in "auto", with comments and a trailing comma.
TEMPLATE = """{
  // of another toolkit
  "_comment": "filled in by the trainer",
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "gradient_accumulation_steps": "auto",
  "bf16": {"enabled": false},
  "fp16": {"enabled": "auto", "loss_scale": 0, "min_loss_scale": 0},
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
  "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": "true"}, # text
  "activation_checkpointing": {"partition_activations": true},
  "gradient_clipping": "auto",
  "steps_per_print": 2000,
}
"""


def test_a_template_trains_and_resumes_as_it_is(small_data: SmallData, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_text(TEMPLATE)
    words = (*small_data.words, "run.name=mine", "batch.global_sequences=8")
    for steps, resume in ((3, ()), (4, ("--resume", "auto"))):
        finished = finish(tmp_path, pretrain(*words, f"train.steps={steps}", *resume, json_file=theirs))
        assert finished.code == 0, finished.explain()
    folder = run_folder(tmp_path)
    assert (folder / "deepspeed.json").read_text() == TEMPLATE
    resolved = json.loads((folder / "deepspeed.resolved.json").read_text())
    assert resolved["train_batch_size"] == 8
    assert resolved["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert len(losses(tmp_path)) == 4
    # The run's own settings, the batch of the command line with them, stand without being given again.
    finished = finish(tmp_path, [*launcher("forked"), PRETRAIN, "run.name=mine", "train.steps=5", "--resume", "auto"])
    assert finished.code == 0, finished.explain()
    assert len(losses(tmp_path)) == 5


def test_what_is_converted_trains(small_data: SmallData, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_text(TEMPLATE.replace('"AdamW"', '"OneBitAdam"').replace('"auto", "betas"', '0.1, "betas"'))
    made = finish(tmp_path, megalm("config", "convert", "theirs.json", "--write", "mine"))
    assert made.code == 0, made.explain()
    assert "optimizer" in made.stderr
    words = (*small_data.words, "--config", "mine/run.yaml", "train.steps=3")
    finished = finish(tmp_path, pretrain(*words, json_file=tmp_path / "mine" / "deepspeed.json"))
    assert finished.code == 0, finished.explain()
    assert len(losses(tmp_path)) == 3
