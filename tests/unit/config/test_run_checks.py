"""Every rule across files, by what its message names; the run is the quickstart preset, bent in one place."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_cases import CPU, GPU, notice_of, refused

from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import config_to_yaml, load_run_config
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_checks import RULES, check_run
from megalm.utils.process_setup import require_extra
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
OFFLOAD = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/tmp"}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, **more}


YARN = "{rope_type: yarn, factor: 4, original_max_position_embeddings: 64"


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["run.name=a/b"], ["run.name='a/b'", "run.root"]),
        (["run.name=.."], ["run.name='..'"]),
        (["run.name="], None),
        (["model.num_attention_heads=3"], ["model.hidden_size=256", "model.num_attention_heads=3", "model.head_dim"]),
        (["model.num_attention_heads=3", "model.head_dim=64"], None),
        (["model.num_key_value_heads=3"], ["model.num_attention_heads=4", "model.num_key_value_heads=3"]),
        (["model.num_key_value_heads=8"], ["model.num_attention_heads=4", "model.num_key_value_heads=8"]),
        (["model.head_dim=63"], ["head_dim=63", "even"]),
        (
            ["model.no_rope_layers=[1, 4]", "model.full_attention_layers=[9]", "model.rope_local_theta=5"],
            ["model.no_rope_layers", "layer 4", "model.full_attention_layers", "layer 9", "model.sliding_window"],
        ),
        (["model.no_rope_layers=4", "model.sliding_window=5", "model.full_attention_layers=[3]"], None),
        (["model.partial_rotary_factor=0.11"], ["head_dim=64", "model.partial_rotary_factor=0.11"]),
        (
            ["model.style=gpt2", "model.partial_rotary_factor=0.5", "model.norm_zero_centered=true"],
            ["model.partial_rotary_factor", "model.position_embedding_type=rope", "model.normalization=rms_norm"],
        ),
        (["model.rope_scaling={rope_type: yarn, factor: 4}"], ["yarn", "original_max_position_embeddings"]),
        (["model.rope_scaling={rope_type: linear, factor: 4}"], None),
        (["model.num_shared_experts=1", "model.moe_layers=2"], ["model.num_shared_experts", "model.moe_layers"]),
        (
            ["model.num_experts=4", "model.num_experts_per_token=5", "model.num_dense_layers=4", "model.mlp_bias=true"],
            ["model.num_experts=4", "model.num_experts_per_token=5", "model.num_dense_layers=4", "model.mlp_bias=true"],
        ),
        (
            ["model.num_experts=4", "model.moe_layers=[1, 9]", "model.moe_intermediate_size=50"],
            ["layer 9", "model.moe_intermediate_size=50", 48, 56, "bf16"],
        ),
        (
            ["model.num_experts=4", "model.mup_base_width=64", "train.mlp_chunk_tokens=64"],
            ["model.mup_base_width", "train.mlp_chunk_tokens"],
        ),
        (["model.expert_bias=true"], ["model.expert_bias"]),
        (["train.expert_bias_rate=0.1", "model.num_experts=4"], ["train.expert_bias_rate", "model.expert_bias=true"]),
        (["model.num_experts=4", "train.expert_capacity_factor=1", "parallel.context=2"], None),
        (["train.expert_capacity_factor=1"], ["train.expert_capacity_factor", "model.num_experts"]),
        (["model.num_experts=4", "compile=true", "model.moe_layers=2", "model.num_dense_layers=1"], None),
        (
            ["model.rope_scaling={rope_type: linear, factor: 4, beta_fast: 3, truncate: false}"],
            ["linear", "beta_fast", "truncate"],
        ),
        (
            [f"model.rope_scaling={YARN}, beta_fast: 1, beta_slow: 2}}", "model.rope_theta=1"],
            ["beta_slow", "beta_fast", "model.rope_theta"],
        ),
        ([f"model.rope_scaling={YARN}, beta_fast: 2, beta_slow: 1}}", "model.rope_theta=2"], None),
        (
            [f"model.rope_scaling={YARN}}}", "model.sliding_window=5"],
            ["model.rope_scaling", "model.full_attention_layers"],
        ),
        ([f"model.rope_scaling={YARN}}}", "model.sliding_window=5", "model.full_attention_layers=4"], None),
        (
            ["model.no_rope_layers=5", "model.sliding_window=5", "model.full_attention_layers=[0, 1, 2, 3]"],
            ["model.no_rope_layers=5", "model.full_attention_layers", "model.sliding_window"],
        ),
        (["model.no_rope_layers=1"], ["model.no_rope_layers", "model.position_embedding_type=none"]),
        (
            ["model.vocab_size=8193", "model.vocab_multiple=64"],
            ["model.vocab_size=8193", "model.vocab_multiple=64", "model.vocab_size=8256"],
        ),
        (["model.vocab_size=8256", "model.vocab_multiple=64"], None),
        (["model.hidden_size=252"], ["head_dim=63"]),
        (["model.hidden_size=252", "model.style=gpt2"], None),
        (
            ["data.sequence_length=512", "model.max_position_embeddings=256"],
            ["data.sequence_length=512", "model.max_position_embeddings=256"],
        ),
        (["data.sequence_length=256", "model.max_position_embeddings=256"], None),
        (["checkpoint.keep_every_steps=400"], ["checkpoint.keep_every_steps=400", "checkpoint.keep_last"]),
        (
            ["checkpoint.keep_last=2", "checkpoint.keep_every_steps=300", "checkpoint.interval_steps=200"],
            ["checkpoint.keep_every_steps=300", "checkpoint.interval_steps=200"],
        ),
        (["checkpoint.keep_last=2", "checkpoint.keep_every_steps=400", "checkpoint.interval_steps=200"], None),
        (["data.train=s3://bucket/my", "data.tokenizer=bytes"], ["data.train=s3://bucket/my", "--input"]),
        (["checkpoint.copy_keep_last=2"], ["checkpoint.copy_keep_last=2", "checkpoint.copy_to"]),
        (["checkpoint.copy_to=hf://me/models"], ["checkpoint.copy_to=hf://me/models", "s3", "gs"]),
        (["checkpoint.copy_to=ftp://host/models"], ["checkpoint.copy_to=ftp://host/models"]),
        (["checkpoint.copy_to=s3://key:secret@bucket/x"], ["checkpoint.copy_to=s3://bucket/x", "AWS_ACCESS_KEY_ID"]),
        (["checkpoint.copy_to=runs"], ["checkpoint.copy_to=runs", "run.root"]),
        (["checkpoint.copy_to=elsewhere", "checkpoint.copy_keep_last=2"], None),
        (
            ["train.parameter_groups=[{match: 'embed_*'}]"],
            ["train.parameter_groups", "match='embed_*'", "embedding.*", "embedding.tokens.weight"],
        ),
        (["train.parameter_groups=[{match: head.weight}]", "model.tie_word_embeddings=true"], ["match='head.weight'"]),
        (["train.parameter_groups=[{match: '*.mlp.*'}, {match: layers.*}, {match: '*.up.*'}]"], ["match='*.up.*'"]),
        (["train.parameter_groups=[{match: '*.mlp.*', learning_rate_scale: 0}]"], ["train.parameter_groups", "match"]),
        (["train.parameter_groups=[{match: '*', weight_decay: -1}]"], ["train.parameter_groups", "weight_decay"]),
        (["train.parameter_groups=[{match: '*.mlp.*', weight_decay: 0}, {match: layers.*}]"], None),
        (["train.parameter_groups=[{match: '*', frozen: true}]"], ["train.parameter_groups", "frozen=true", "'*'"]),
        (
            ["train.parameter_groups=[{match: '*.mlp.*', frozen: true, weight_decay: 0}]"],
            ["match='*.mlp.*'", "frozen=true", "weight_decay"],
        ),
        (["train.parameter_groups=[{match: '*.mlp.*', frozen: true}]"], None),
        (["train.ema_decay=1"], ["train.ema_decay"]),
        (["train.ema_decay=0"], ["train.ema_decay"]),
        (["train.ema_decay=0.999"], None),
        (["evaluate.ema=true"], ["evaluate.ema=true", "train.ema_decay"]),
        (["evaluate.ema=0.9", "train.ema_decay=0.9"], ["evaluate.ema"]),
        (["evaluate.ema=true", "train.ema_decay=0.9"], None),
        (["evaluate.ema=false"], None),
        (["train.max_wall_time=4x"], ["train.max_wall_time='4x'", "30m", "4h", "1h30m", "2d"]),
        (["train.max_wall_time=0s"], ["train.max_wall_time='0s'"]),
        (["train.max_wall_time=1h30m"], None),
        (["guard.window=20", "guard.warmup_steps=21"], ["guard.warmup_steps=21", "guard.window=20"]),
        (["guard.window=20", "guard.warmup_steps=20"], None),
        (["guard.stop_above=7"], ["guard.stop_above=7", "guard.after_step"]),
        (["guard.after_step=900"], ["guard.after_step=900", "guard.stop_above"]),
        (["guard.stop_above=7", "guard.after_step=1000"], None),
        (
            ["guard.policy=rollback", "checkpoint.interval_steps=null"],
            ["guard.policy=rollback", "checkpoint.interval_steps"],
        ),
        (["guard.policy=rollback", "checkpoint.interval_steps=100"], None),
        (["slurm.exclude_bad=true", "train.check_nodes=false"], ["slurm.exclude_bad=true", "train.check_nodes"]),
        (["slurm.exclude_bad=true"], None),
        (["data.recipe=null"], ["data.train=PREFIX", "data.tokenizer=FILE", "data.recipe=python-stdlib"]),
        (["data.recipe=null", "model.vocab_size=30000"], ["data.tokenizer=FILE", "30,000"]),
        (
            ["model.vocab_size=30000", "model.vocab_multiple=128"],
            ["model.vocab_multiple=128", "model.vocab_size=30080"],
        ),
        (["model.vocab_size=30080", "model.vocab_multiple=128"], None),
        (["model.vocab_multiple=128"], None),
        (["data.recipe=null", "data.tokenizer=bytes"], ["data.train", "data.recipe=python-stdlib"]),
        (["data.train=x"], ["data.train=x", "data.tokenizer"]),
        (["data.validation=x"], ["data.validation=x", "data.train"]),
        (
            ["data.train=x", "data.tokenizer=bytes", "data.validation=y", "data.split=9,1"],
            ["data.validation=y", "data.split=9,1"],
        ),
        (["data.split=95"], ["data.split='95'", "95,5"]),
        (["data.split=95,x"], ["data.split='95,x'"]),
        (["data.split=95,-5"], ["data.split='95,-5'"]),
        (["data.split=0,1"], ["data.split='0,1'"]),
        (["data.split=nan,1"], ["data.split='nan,1'"]),
        (["data.split=90,5,5"], ["data.split='90,5,5'"]),
        (["data.split=1,0"], None),
        (["data.train=x", "data.tokenizer=bytes"], ["data.train=x", "x.bin", "data_tools/build_dataset.py"]),
        (["data.tokenizer=no.model"], ["data.tokenizer=no.model", "data_tools/train_tokenizer.py"]),
        (["data.tokenizer=bytes"], None),
        (["schedule.warmup_steps=400"], ["schedule.warmup_steps=400", "train.steps=400"]),
        (["schedule.warmup_steps=50", "train.steps=50"], ["schedule.warmup_steps=50", "train.steps=50"]),
        (["schedule.decay_steps=5"], ["schedule.decay_steps=5", "schedule.kind=cosine", "wsd"]),
        (
            ["schedule.kind=wsd", "schedule.decay_steps=390"],
            ["schedule.warmup_steps=40", "schedule.decay_steps=390", "train.steps=400"],
        ),
        (["schedule.kind=wsd", "schedule.decay_steps=360"], None),
        (
            ["schedule.kind=constant", "schedule.final_learning_rate=1e-4"],
            ["schedule.final_learning_rate=0.0001", "schedule.kind=constant"],
        ),
        (
            ["schedule.final_learning_rate=1"],
            [
                "schedule.final_learning_rate=1",
                "command line",
                "schedule.peak_learning_rate=0.003",
                "preset quickstart",
            ],
        ),
        (
            ["schedule.initial_learning_rate=1"],
            ["schedule.initial_learning_rate=1", "command line", "schedule.peak_learning_rate=0.003"],
        ),
        (
            ["schedule.final_learning_rate=1e-4", "schedule.final_ratio=0.2"],
            ["schedule.final_learning_rate=0.0001", "schedule.final_ratio=0.2"],
        ),
        (
            ["schedule.kind=constant", "schedule.final_ratio=0.2"],
            ["schedule.final_ratio=0.2", "schedule.kind=constant"],
        ),
        (["schedule.decay_end_step=40"], ["schedule.decay_end_step=40", "schedule.warmup_steps=40"]),
        (["schedule.decay_end_step=41"], None),
        (
            ["schedule.kind=wsd", "schedule.decay_steps=70", "schedule.decay_end_step=100"],
            ["schedule.warmup_steps=40", "schedule.decay_steps=70", "schedule.decay_end_step=100"],
        ),
        (
            ["schedule.kind=constant", "schedule.decay_end_step=90"],
            ["schedule.decay_end_step=90", "schedule.kind=constant"],
        ),
        (
            ["schedule.kind=wsd", "schedule.step_convention=deepspeed"],
            ["schedule.step_convention=deepspeed", "schedule.kind=wsd", "linear"],
        ),
        (["schedule.step_convention=deepspeed", "schedule.warmup_steps=900"], None),
        (["compile=true"], None),
        (["train.steps=1"], None),
    ],
)
def test_rules_of_the_run(start: Start, overrides: list[str], names: list[str] | None) -> None:
    if names is None:
        start(*overrides)
    else:
        assert_names(refused(start, *overrides), *names)


@pytest.mark.parametrize(
    ("changes", "overrides", "names"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
            ["schedule.peak_learning_rate=1e-3"],
            ["optimizer.params.lr=0.0003", "schedule.peak_learning_rate=0.001", "command line"],
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}},
            ["schedule.final_learning_rate=6e-5"],
            ["schedule.final_learning_rate=6e-05", "command line", "optimizer.params.lr=1e-05"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, ["schedule.final_learning_rate=1e-5"], None),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["schedule.final_learning_rate=0.5"], None),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, [], ["fp16.enabled", "bf16.enabled"]),
        ({"zero_optimization": zero(0), "bf16": None}, [], None),
        ({"zero_optimization": zero(2, offload_param={"device": "none"})}, [], None),
        (
            {"zero_optimization": zero(2, offload_optimizer={"device": "nvme"})},
            [],
            ["offload_optimizer.device=nvme", "zero_optimization.stage", 3, "cpu"],
        ),
        (
            {"zero_optimization": zero(3, offload_param={"device": "nvme"})},
            [],
            ["offload_param.device=nvme", "cpu"],
        ),
        (
            {"zero_optimization": zero(3, offload_param=NVME)},
            [],
            ["offload_param.device=nvme", "cpu", "offload_optimizer"],
        ),
        ({"zero_optimization": zero(3, offload_optimizer=NVME)}, [], None),
        (
            {"zero_optimization": zero(3, offload_optimizer=NVME)},
            ["train.ema_decay=0.99"],
            ["train.ema_decay=0.99", "offload_optimizer.device=nvme", "offload_optimizer.device=cpu"],
        ),
        ({"zero_optimization": zero(3, offload_optimizer={"device": "cpu"})}, ["train.ema_decay=0.99"], None),
        (
            {"zero_optimization": zero(3, offload_optimizer={**NVME, "pipeline_read": True})},
            [],
            ["offload_optimizer.pipeline_read=true"],
        ),
        (
            {"zero_optimization": zero(3, offload_optimizer={**NVME, "buffer_count": 3})},
            [],
            ["offload_optimizer.buffer_count=3", 4],
        ),
        (
            {"zero_optimization": zero(3, offload_optimizer=NVME)},
            ["checkpoint.async=true"],
            ["checkpoint.async=true", "offload_optimizer.device=nvme"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, [], None),
        (
            {"data_types": {"grad_accum_dtype": "fp16"}},
            [],
            ["data_types.grad_accum_dtype=fp16", "bf16", "fp32"],
        ),
        ({"communication_data_type": "fp16"}, [], ["communication_data_type=fp16", "bf16", "fp32"]),
        (
            {"zero_optimization": zero(1, allgather_bucket_size=5)},
            [],
            ["zero_optimization.allgather_bucket_size=5", 6],
        ),
        ({"zero_optimization": zero(2, round_robin_gradients=True)}, [], None),
        ({"aio": {"queue_depth": 16}}, [], None),
        ({"aio": {"use_gds": True}}, [], None),
        (
            {"aio": {"use_gds": True}, "zero_optimization": zero(3, offload_optimizer=NVME)},
            [],
            ["aio.use_gds=true", "GPU"],
        ),
    ],
)
def test_rules_of_the_json(
    start: Start, tmp_path: Path, changes: dict[str, Any], overrides: list[str], names: list[object] | None
) -> None:
    if names is None:
        start(*overrides, **changes)
    else:
        assert_names(refused(start, *overrides, **changes), tmp_path / "ds.json", *names)


def test_a_yaml_file_against_the_json(start: Start, tmp_path: Path) -> None:
    mine = tmp_path / "my.yaml"
    mine.write_text("preset: quickstart\nschedule: {peak_learning_rate: 2e-3}\n")
    message = refused(start, config=str(mine), optimizer={"type": "Adam", "params": {"lr": 1e-4}})
    assert_names(message, "schedule.peak_learning_rate=0.002", mine, "optimizer.params.lr=0.0001")


def test_fp16_on_a_cpu_only_when_asked_for_in_the_environment(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    fp16 = {"fp16": {"enabled": True}, "bf16": None}
    assert_names(refused(start, **fp16), "fp16.enabled=true", "bf16", "fp32", "MEGALM_ALLOW_CPU_FP16=1")
    assert start(device=GPU, **fp16).precision == "fp16"
    monkeypatch.setenv("MEGALM_ALLOW_CPU_FP16", "1")
    assert start(**fp16).precision == "fp16"


def test_bf16_on_a_gpu_without_it(start: Start) -> None:
    old = DeviceFacts(kind="cuda", bf16=False, memory_bytes=16 << 30)
    assert_names(refused(start, device=old, bf16={"enabled": True}), "bf16.enabled=true", '"auto"', "fp16", "fp32")
    slow = DeviceFacts(kind="cpu", bf16=False, memory_bytes=16 << 30)
    run = start(device=slow, bf16={"enabled": True})
    assert run.precision == "bf16"  # emulated, slow, right
    assert_names(notice_of(run, "bf16.enabled"), "bf16.enabled=true", "fp32", '"auto"')


def test_both_files_of_a_dataset_are_looked_for(start: Start, tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    Path(f"{prefix}.bin").touch()
    overrides = [f"data.train={prefix}", "data.tokenizer=bytes"]
    assert_names(refused(start, *overrides), f"data.train={prefix}", f"{prefix}.idx")
    Path(f"{prefix}.idx").touch()
    start(*overrides)
    other = f"data.validation={tmp_path}/other"
    assert_names(refused(start, *overrides, other), other, f"{tmp_path}/other.bin")


def test_a_recipe_keeps_its_batch(start: Start, tmp_path: Path, write_json: Callable[..., Path]) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"train_batch_size": 64}')
    mine = tmp_path / "recipe.yaml"
    mine.write_text(f"preset: quickstart\ndeepspeed_config: {own}\n")
    message = refused(start, config=str(mine))
    assert_names(message, tmp_path / "ds.json", "train_batch_size=16", "quickstart", own, "train_batch_size=64")
    assert_names(message, "--deepspeed_config", "deepspeed_config=null")
    start(config=str(mine), train_batch_size=64)
    start("deepspeed_config=null", config=str(mine))
    mine.write_text("preset: quickstart\ndeepspeed_config: ds_configs/zero1.json\n")
    start(config=str(mine))  # found from anywhere, with the same batch
    mine.write_text("preset: quickstart\ndeepspeed_config: ds_configs/zero_one.json\n")
    assert_names(refused(start, config=str(mine)), "ds_configs/zero_one.json")


def test_a_preset_gives_way_to_what_a_person_states(start: Start, tmp_path: Path) -> None:
    """Only train.steps is set: the preset's warm-up is shortened, reported, and kept for the run folder."""
    run = start("train.steps=20")
    assert run.schedule.warmup_steps == run.config.schedule.warmup_steps == 2
    source = run.sources["schedule.warmup_steps"]
    assert_names(source, "preset quickstart")
    assert source != "preset quickstart", "nor is it the preset's alone"
    assert_names(
        notice_of(run, "schedule.warmup_steps"), "schedule.warmup_steps=40", "preset quickstart", "train.steps=20", 2
    )
    kept = tmp_path / "config.yaml"
    kept.write_text(config_to_yaml(run.config))
    assert start(config=str(kept)).schedule == run.schedule


def test_check_run_runs_every_rule(write_json: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(
        "megalm.planning.run_checks.RULES", tuple(lambda case, rule=rule: ran.append(rule) or () for rule in RULES)
    )
    check_run(load_run_config(None, []), read_deepspeed_json(write_json()), 2, CPU)
    assert ran == list(RULES)
    assert len(set(RULES)) == len(RULES)


def test_a_batch_that_does_not_divide_is_refused_before_it_is_planned(write_json: Callable[..., Path]) -> None:
    message = refused(check_run, load_run_config(None, []), read_deepspeed_json(write_json()), 3, CPU)
    assert_names(message, "train_batch_size=16", 3, 15, 18)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_needs_its_package(start: Start, name: str) -> None:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        assert_names(refused(start, f"tracking.{name}=true"), f"tracking.{name}=true", f"[{name}]")
    else:
        start(f"tracking.{name}=true")
    assert_names(refused(require_extra, f"no-{name}"), f"no-{name}")
