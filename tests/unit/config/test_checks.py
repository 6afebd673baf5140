"""Every rule across files, by its message; the run is the quickstart preset, bent in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_cases import CPU, GPU, refused

from megalm.config.deepspeed.json_reader import read_deepspeed_json
from megalm.config.loading import config_to_yaml, load_run_config
from megalm.config.precision import DeviceFacts
from megalm.planning.checks.run_checks import RULES, check_run
from megalm.planning.resolve import ResolvedRun

Start = Callable[..., ResolvedRun]
OFFLOAD = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/tmp"}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, **more}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.name=a/b"], "run.name='a/b' is no folder name"),
        (["run.name=.."], "run.name='..' is no folder name"),
        (["run.name="], None),
        (["model.num_attention_heads=3"], "model.hidden_size=256 does not divide into model.num_attention_heads=3"),
        (["model.num_attention_heads=3", "model.head_dim=64"], None),
        (
            ["model.num_key_value_heads=3"],
            "num_attention_heads=4 does not divide into model.num_key_value_heads=3",
        ),
        (
            ["model.num_key_value_heads=8"],
            "num_attention_heads=4 does not divide into model.num_key_value_heads=8",
        ),
        (["model.head_dim=63"], "head_dim=63 (model.hidden_size / model.num_attention_heads) is odd"),
        (["model.hidden_size=252"], "head_dim=63"),
        (["model.hidden_size=252", "model.style=gpt2"], None),
        (
            ["data.sequence_length=512", "model.max_position_embeddings=256"],
            "data.sequence_length=512 is longer than model.max_position_embeddings=256",
        ),
        (["checkpoint.keep_every_steps=400"], "checkpoint.keep_every_steps=400 has no effect without"),
        (
            ["checkpoint.keep_last=2", "checkpoint.keep_every_steps=300", "checkpoint.interval_steps=200"],
            "keep_every_steps=300 is no multiple of checkpoint.interval_steps=200",
        ),
        (["checkpoint.keep_last=2", "checkpoint.keep_every_steps=400", "checkpoint.interval_steps=200"], None),
        (["train.max_wall_time=4x"], "train.max_wall_time='4x' is no duration; write 30m, 4h, 1h30m or 2d"),
        (["train.max_wall_time=0s"], "train.max_wall_time='0s' is no duration"),
        (["train.max_wall_time=1h30m"], None),
        (["guard.window=20", "guard.warmup_steps=21"], "guard.warmup_steps=21 is more than guard.window=20"),
        (["guard.window=20", "guard.warmup_steps=20"], None),
        (["guard.stop_above=7"], "guard.stop_above=7 needs guard.after_step"),
        (["guard.after_step=1000"], "guard.after_step=1000 needs guard.stop_above"),
        (["guard.stop_above=7", "guard.after_step=1000"], None),
        (
            ["guard.policy=rollback", "checkpoint.interval_steps=null"],
            "guard.policy=rollback goes back to a checkpoint",
        ),
        (["guard.policy=rollback", "checkpoint.interval_steps=100"], None),
        (
            ["data.recipe=null"],
            "data.train is not stated; give a dataset prefix and its tokenizer: data.train=PREFIX data.tokenizer=FILE",
        ),
        (["data.recipe=null", "model.vocab_size=30000"], "data.tokenizer=FILE of at most 30,000 entries ("),
        (["data.recipe=null", "data.tokenizer=bytes"], "is not stated; give a dataset prefix, or data.recipe="),
        (["data.train=x"], "data.train=x needs data.tokenizer"),
        (["data.validation=x"], "data.validation=x needs data.train"),
        (
            ["data.train=x", "data.tokenizer=bytes", "data.validation=y", "data.split=9,1"],
            "data.validation=y and data.split=9,1 both say what is validated on",
        ),
        (["data.split=95"], "data.split='95' is not TRAIN,VALIDATION"),
        (["data.split=95,x"], "data.split='95,x' is not"),
        (["data.split=95,-5"], "data.split='95,-5' is not"),
        (["data.split=0,1"], "data.split='0,1' is not"),
        (["data.split=nan,1"], "data.split='nan,1' is not"),
        (["data.split=90,5,5"], "data.split='90,5,5' is not"),
        (["data.split=1,0"], None),
        (["data.train=x", "data.tokenizer=bytes"], "data.train=x: x.bin does not exist"),
        (["data.tokenizer=no.model"], "data.tokenizer=no.model does not exist"),
        (["data.tokenizer=bytes"], None),
        (["schedule.warmup_steps=400"], "schedule.warmup_steps=400 is not below train.steps=400"),
        (["schedule.warmup_steps=50", "train.steps=50"], "schedule.warmup_steps=50 is not below train.steps=50"),
        (["schedule.decay_steps=5"], "schedule.decay_steps=5 has no effect with schedule.kind=cosine"),
        (
            ["schedule.kind=wsd", "schedule.decay_steps=390"],
            "schedule.warmup_steps=40 and schedule.decay_steps=390 are more than train.steps=400",
        ),
        (
            ["schedule.kind=constant", "schedule.final_learning_rate=1e-4"],
            "schedule.final_learning_rate=0.0001 has no effect with schedule.kind=constant",
        ),
        (
            ["schedule.final_learning_rate=1"],
            "=1 (command line) is above schedule.peak_learning_rate=0.003 (preset quickstart)",
        ),
        (["compile=true"], None),
        (["train.steps=1"], None),
    ],
)
def test_rules_of_the_run(start: Start, overrides: list[str], message: str | None) -> None:
    if message is None:
        start(*overrides)
    else:
        assert message in refused(start, *overrides)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
            ["schedule.peak_learning_rate=1e-3"],
            "and schedule.peak_learning_rate=0.001 (command line) state the same fact",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            ["schedule.final_learning_rate=6e-5"],
            "schedule.final_learning_rate=6e-05 (command line) is above optimizer.params.lr=1e-05 (",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, ["schedule.final_learning_rate=1e-5"], None),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["schedule.final_learning_rate=0.5"], None),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            ["schedule.kind=wsd"],
            "and schedule.kind=wsd (command line) state the same fact",
        ),
        ({"scheduler": {"type": "WarmupDecayLR"}}, [], "the nearest is schedule.kind=linear"),
        ({"scheduler": {"type": "OneCycle"}}, [], 'scheduler "OneCycle" is not honoured'),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, [], "fp16.enabled and bf16.enabled are both true"),
        ({"zero_optimization": zero(0)}, [], "stage=0 with bf16 trains wrongly in DeepSpeed 0.19.8; use stage 1"),
        ({"zero_optimization": None}, [], "stage=0 with bf16"),
        ({"zero_optimization": zero(0), "bf16": None}, [], None),
        ({"zero_optimization": zero(0, offload_optimizer=OFFLOAD), "bf16": None}, [], "offload_optimizer needs"),
        ({"zero_optimization": zero(2, offload_param=OFFLOAD)}, [], "offload_param needs zero_optimization.stage 3"),
        ({"zero_optimization": zero(2, offload_param={"device": "none"})}, [], None),
        (
            {"zero_optimization": zero(2, offload_optimizer={"device": "nvme"})},
            [],
            "offload_optimizer.device=nvme needs zero_optimization.stage 3",
        ),
        (
            {"zero_optimization": zero(3, offload_param={"device": "nvme"})},
            [],
            "offload_param.device=nvme needs offload_param.nvme_path",
        ),
        (
            {"zero_optimization": zero(3, offload_param={"device": "nvme", "nvme_path": "/tmp"})},
            [],
            "offload_param.device=nvme is not proven here; use cpu there",
        ),
        ({"zero_optimization": zero(3, offload_optimizer=NVME)}, [], None),
        (
            {"zero_optimization": zero(3, offload_optimizer={**NVME, "pipeline_read": True})},
            [],
            "offload_optimizer.pipeline_read=true is not proven here",
        ),
        (
            {"zero_optimization": zero(3, offload_optimizer={**NVME, "buffer_count": 3})},
            [],
            "buffer_count=3; a master, its moments and its gradient are read at one time: 4 or more",
        ),
        (
            {"zero_optimization": zero(3, offload_optimizer=NVME)},
            ["checkpoint.async=true"],
            "checkpoint.async=true writes from a copy in memory",
        ),
        (
            {
                "zero_optimization": zero(2, offload_optimizer=OFFLOAD),
                "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            },
            [],
            "optimizer.params.torch_adam=true with offload_optimizer",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, [], None),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, [], 'write type "Adam"'),
        (
            {"data_types": {"grad_accum_dtype": "fp16"}},
            [],
            "grad_accum_dtype=fp16 cannot hold gradients of bf16",
        ),
        ({"communication_data_type": "fp16"}, [], "communication_data_type=fp16 cannot carry gradients of bf16"),
        ({"zero_optimization": zero(1, allgather_bucket_size=5)}, [], "allgather_bucket_size=5 is odd; use 6"),
        ({"zero_optimization": zero(2, round_robin_gradients=True)}, [], None),
        ({"aio": {"queue_depth": 16}}, [], None),
    ],
)
def test_rules_of_the_json(start: Start, changes: dict[str, Any], overrides: list[str], message: str | None) -> None:
    if message is None:
        start(*overrides, **changes)
    else:
        assert message in refused(start, *overrides, **changes)


def test_a_yaml_file_against_the_json(start: Start, tmp_path: Path) -> None:
    mine = tmp_path / "my.yaml"
    mine.write_text("preset: quickstart\nschedule: {peak_learning_rate: 2e-3}\n")
    said = refused(start, config=str(mine), optimizer={"type": "Adam", "params": {"lr": 1e-4}})
    assert f"schedule.peak_learning_rate=0.002 ({mine})" in said
    assert "optimizer.params.lr=0.0001" in said


def test_fp16_on_a_cpu_only_when_asked_for_in_the_environment(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    fp16 = {"fp16": {"enabled": True}, "bf16": None}
    assert "use bf16 or fp32, or set MEGALM_ALLOW_CPU_FP16=1" in refused(start, **fp16)
    assert start(device=GPU, **fp16).precision == "fp16"
    monkeypatch.setenv("MEGALM_ALLOW_CPU_FP16", "1")
    assert start(**fp16).precision == "fp16"


def test_bf16_on_a_gpu_without_it(start: Start) -> None:
    old = DeviceFacts(kind="cuda", bf16=False, memory_bytes=16 << 30)
    assert "this device does not compute in bf16" in refused(start, device=old, bf16={"enabled": True})
    slow = DeviceFacts(kind="cpu", bf16=False, memory_bytes=16 << 30)
    assert start(device=slow, bf16={"enabled": True}).precision == "bf16"  # emulated, slow, right


def test_both_files_of_a_dataset_are_looked_for(start: Start, tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    Path(f"{prefix}.bin").touch()
    stated = [f"data.train={prefix}", "data.tokenizer=bytes"]
    assert f"{prefix}.idx does not exist" in refused(start, *stated)
    Path(f"{prefix}.idx").touch()
    start(*stated)
    assert "data.validation=" in refused(start, *stated, f"data.validation={tmp_path}/other")


def test_a_recipe_keeps_its_batch(start: Start, tmp_path: Path, write_json: Callable[..., Path]) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"train_batch_size": 64}')
    mine = tmp_path / "recipe.yaml"
    mine.write_text(f"preset: quickstart\ndeepspeed_config: {own}\n")
    said = refused(start, config=str(mine))
    assert "has train_batch_size=16, but preset quickstart belongs to" in said
    assert "with train_batch_size=64" in said
    start(config=str(mine), train_batch_size=64)
    start("deepspeed_config=null", config=str(mine))
    mine.write_text("preset: quickstart\ndeepspeed_config: ds_configs/zero1.json\n")
    start(config=str(mine))  # found from anywhere, with the same batch
    mine.write_text("preset: quickstart\ndeepspeed_config: ds_configs/zero_one.json\n")
    assert "ds_configs/zero_one.json: no such file" in refused(start, config=str(mine))


def test_a_preset_gives_way_to_what_a_person_states(start: Start, tmp_path: Path) -> None:
    """Only train.steps is stated: the preset's warm-up is shortened, said so, and kept for the run folder."""
    run = start("train.steps=20")
    assert run.schedule.warmup_steps == run.config.schedule.warmup_steps == 2
    assert run.sources["schedule.warmup_steps"] == "preset quickstart, shortened"
    assert "schedule.warmup_steps=40 (preset quickstart) is not below train.steps=20: 2" in run.notices
    kept = tmp_path / "config.yaml"
    kept.write_text(config_to_yaml(run.config))
    assert start(config=str(kept)).schedule == run.schedule


def test_check_run_runs_every_rule(write_json: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(
        "megalm.planning.checks.run_checks.RULES", tuple(lambda case, rule=rule: ran.append(rule) for rule in RULES)
    )
    check_run(load_run_config(None, []), read_deepspeed_json(write_json()), 2, CPU)
    assert ran == list(RULES)
    assert len(set(RULES)) == len(RULES)
