from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from config_cases import CPU, GPU, Write, notice_of, refused

from megalm.config.deepspeed.json_reader import DeviceFacts, named_json, read_deepspeed_json, shipped_deepspeed_jsons
from megalm.config.loading import ConfigLayers, config_to_yaml, load_run_config, preset_paths
from megalm.model.model_config import build_model_config
from megalm.planning.resolve import UNKNOWN_VOCAB_SIZE, BatchPlan, OptimizerFacts, ResolvedRun, resolve
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]


@pytest.mark.parametrize("path", shipped_deepspeed_jsons(), ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_shipped_json_resolves_to_the_same_batch(path: object, ranks: int) -> None:
    run = resolve(load_run_config(None, []), read_deepspeed_json(str(path)), ranks, GPU)
    triple = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (run.deepspeed[name] for name in triple)
    assert total == 16 == micro * steps * ranks
    json.dumps(run.deepspeed)


@pytest.mark.parametrize("name", preset_paths())
def test_every_preset_resolves(name: str) -> None:
    loaded = load_run_config(name, [])
    path = named_json(loaded.config.deepspeed_config or "ds_configs/zero2.json")
    resolve(loaded, read_deepspeed_json(path), loaded.config.documented.devices or 1, GPU, data_needed=False)


def test_what_deepspeed_is_handed_is_explicit(start: Start) -> None:
    assert start().deepspeed == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


ACCUMULATED = {"train_micro_batch_size_per_gpu": 2}


@pytest.mark.parametrize(
    ("overrides", "ranks", "changes", "once", "names"),
    [
        ((), 2, ACCUMULATED, True, ["train.reduce_gradients", "auto"]),
        ((), 2, {}, False, []),  # a single micro-batch
        ((), 1, ACCUMULATED, False, []),  # nothing is sent
        ((), 2, ACCUMULATED | {"zero_optimization": {"stage": 1}}, False, []),
        ((), 2, ACCUMULATED | {"zero_optimization": {"stage": 3}}, False, []),
        (
            (),
            2,
            ACCUMULATED | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            False,
            ["train.reduce_gradients", 4, "offload_optimizer"],
        ),
        (("train.reduce_gradients=step",), 2, {}, True, []),
        (("train.reduce_gradients=micro_batch",), 2, ACCUMULATED, False, []),
    ],
)
def test_zero_2_reduces_gradients_once_a_step(
    start: Start, overrides: tuple[str, ...], ranks: int, changes: dict[str, Any], once: bool, names: list[object]
) -> None:
    run = start(*overrides, ranks=ranks, **changes)
    assert run.whole_gradients == once
    notices = [notice for notice in run.notices if "train.reduce_gradients" in notice]
    assert len(notices) == bool(names)
    assert_names("".join(notices), *names)


def test_whole_gradients_have_to_fit(start: Start) -> None:
    """They take 4 bytes a parameter more, less what two ranks would keep of them."""
    sizes = ("model.hidden_size=1024", "model.num_attention_heads=8", "model.num_hidden_layers=16")

    def run(gib: float) -> ResolvedRun:
        device = DeviceFacts(kind="cuda", bf16=True, memory_bytes=int(gib * 2**30))
        return start(*sizes, device=device, **ACCUMULATED)

    assert run(16).whole_gradients
    tight = run(6.5)
    assert not tight.whole_gradients
    assert_names(notice_of(tight, "train.reduce_gradients"), 4, "6.5 GiB")


@pytest.mark.parametrize(
    ("gib", "compiled", "chosen"),
    [
        (80, False, "none"),
        (80, True, "none"),
        (15, False, "norms"),
        (15, True, "attention"),
        (10, False, "mlp"),
        (6, True, "full"),
    ],
)
def test_auto_recomputes_as_little_as_fits(start: Start, gib: float, compiled: bool, chosen: str) -> None:
    sizes = ("model.hidden_size=1024", "model.num_attention_heads=8", "model.num_hidden_layers=16")
    keys = (*sizes, "data.sequence_length=2048", "train.recompute=auto", f"compile={str(compiled).lower()}")
    device = DeviceFacts(kind="cuda", bf16=True, memory_bytes=int(gib * 2**30), compiles=True)
    run = start(*keys, device=device, train_micro_batch_size_per_gpu=8, train_batch_size=16)
    assert run.recompute == chosen
    assert_names(notice_of(run, "train.recompute"), chosen, *([f"{gib:.1f} GiB"] if chosen != "none" else []))


WIDE = ("model.hidden_size=4096", "model.num_attention_heads=32", "model.intermediate_size=11008")
MATRICES, NORMS = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 4096


@pytest.mark.parametrize(
    ("overrides", "zero", "ranks", "derived"),
    [
        (WIDE, {"stage": 3}, 2, {"param_persistence_threshold": 0, "prefetch_bucket_size": MATRICES + NORMS}),
        (
            (*WIDE, "parallel.tensor=2"),
            {"stage": 3, "stage3_prefetch_bucket_size": "auto"},
            4,
            {"param_persistence_threshold": 0, "prefetch_bucket_size": MATRICES // 2 + NORMS},
        ),
        # Parameters that stay on every rank are not gathered with their block.
        (WIDE, {"stage": 3, "stage3_param_persistence_threshold": 10_000}, 2, {"prefetch_bucket_size": MATRICES}),
        (WIDE, {"stage": 3, "stage3_prefetch_bucket_size": 10}, 2, {"param_persistence_threshold": 0}),
        (WIDE, {"stage": 2}, 2, {}),
        ((), {"stage": 3}, 2, {"param_persistence_threshold": 0}),  # several small blocks fit DeepSpeed's default
        (
            ("model.hidden_size=12288", "model.num_attention_heads=96", "model.intermediate_size=49152"),
            {"stage": 3, "stage3_param_persistence_threshold": 10**6},
            2,
            {"prefetch_bucket_size": 16 * 12288**2, "max_live_parameters": 32 * 12288**2},
        ),
    ],
)
def test_zero_3_gathers_the_next_block_whole(
    start: Start, overrides: tuple[str, ...], zero: dict[str, Any], ranks: int, derived: dict[str, int]
) -> None:
    run = start(*overrides, "model.num_hidden_layers=2", ranks=ranks, zero_optimization=zero)
    set_here = {f"stage3_{name}": size for name, size in derived.items()}
    kept = {key: value for key, value in zero.items() if value != "auto"}
    assert run.deepspeed["zero_optimization"] == kept | set_here
    notices = [notice for notice in run.notices if "leaves open" in notice]
    assert len(notices) == bool(derived)
    assert_names("".join(notices), *(f"{name}={size}" for name, size in set_here.items()))


def test_deepspeed_reads_it_as_it_was_meant(start: Start) -> None:
    parsed = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig(start(ranks=1).deepspeed)
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (16, 16)
    assert parsed.gradient_clipping == 1.0
    assert not parsed.timers_config.enabled
    assert parsed.bfloat16_config.enabled
    assert not parsed.float16_config.enabled
    assert parsed.grad_accum_dtype == "fp32"
    assert str(parsed.communication_data_type) == "torch.float32"
    assert (parsed.optimizer_name, parsed.scheduler_name) == (None, None)


def test_explicit_values_are_kept(start: Start) -> None:
    run = start(
        gradient_clipping=0,
        steps_per_print=7,
        memory_breakdown=True,
        communication_data_type="bf16",
        bf16={"enabled": True, "check_grad_overflow": False},
        zero_optimization={"stage": 3, "max_live_parameters": 5, "offload_param": {"device": "cpu"}},
    )
    assert run.deepspeed["gradient_clipping"] == 0
    assert run.deepspeed["steps_per_print"] == 7
    assert run.deepspeed["memory_breakdown"] is True
    assert run.deepspeed["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert run.deepspeed["zero_optimization"] == {
        "stage": 3,
        "stage3_max_live_parameters": 5,
        "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu"},
    }
    assert run.zero_stage == 3
    assert_names(notice_of(run, "communication_data_type"), "bf16", "fp32")


def test_missing_clipping_is_deepspeeds_and_reported(start: Start) -> None:
    run = start(gradient_clipping=None)
    assert run.deepspeed["gradient_clipping"] == 1.0
    assert_names(notice_of(run, "gradient_clipping"), run.deepspeed_source.path, "1.0")
    assert not any("gradient_clipping" in notice for notice in start().notices)


@pytest.mark.parametrize(
    ("bf16", "fp16", "device_bf16", "precision"),
    [
        ("auto", None, True, "bf16"),
        ("auto", None, False, "fp32"),
        (True, None, True, "bf16"),
        (False, None, True, "fp32"),
        (None, None, True, "fp32"),
        (None, "auto", True, "fp32"),
        ("auto", "auto", True, "bf16"),
        (None, True, True, "fp16"),
        ("auto", True, True, "fp16"),
    ],
)
def test_precision(start: Start, bf16: object, fp16: object, device_bf16: bool, precision: str) -> None:
    device = DeviceFacts(kind="cuda", bf16=device_bf16, memory_bytes=1 << 36)
    sections = {
        name: {"enabled": value} if value is not None else None for name, value in (("bf16", bf16), ("fp16", fp16))
    }
    run = start(device=device, **sections)
    assert run.precision == precision
    assert run.deepspeed["bf16"]["enabled"] == (precision == "bf16")
    assert run.deepspeed["fp16"]["enabled"] == (precision == "fp16")
    assert ("data_types" in run.deepspeed) == (precision == "bf16")
    others = ("train_micro_batch_size_per_gpu",)
    decided = any('"auto"' in notice and not notice.startswith(others) for notice in run.notices)
    assert decided == ("auto" in (bf16, fp16) and precision != "fp16")


@pytest.mark.parametrize(
    ("wanted", "kind", "compiles", "compiled"),
    [
        (None, "cpu", True, False),
        (None, "cuda", True, True),
        (None, "cuda", False, False),
        ("auto", "cuda", True, True),
        ("true", "cpu", True, True),
        ("true", "cuda", False, True),
        ("false", "cuda", True, False),
    ],
)
def test_compile_is_on_by_default_where_a_gpu_can(
    start: Start, wanted: str | None, kind: Literal["cpu", "cuda"], compiles: bool, compiled: bool
) -> None:
    device = DeviceFacts(kind, True, 1 << 36, compiles=compiles)
    run = start(*([] if wanted is None else [f"compile={wanted}"]), device=device)
    assert run.compiled == compiled
    assert any(notice.startswith('compile ("auto"): false') for notice in run.notices) == (
        wanted is None and kind == "cuda" and not compiles
    )


def test_auto_takes_what_fits_the_memory(start: Start) -> None:
    sizes = [
        start(ranks=1, device=DeviceFacts("cpu", True, gigabytes * 10**9)).batch.micro_batch
        for gigabytes in (0.25, 0.4, 0.5, 64)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 16
    run = start(ranks=1, train_micro_batch_size_per_gpu=2, device=DeviceFacts("cpu", True, 1))
    assert run.batch == BatchPlan(16, 2, 8, 1)


def test_an_unknown_vocabulary_is_reported(start: Start) -> None:
    tokenizer = f"data.tokenizer={__file__}"
    guess = f"{UNKNOWN_VOCAB_SIZE:,}"
    assert_names(notice_of(start(tokenizer), guess), guess)
    for known in ((), (tokenizer, "model.vocab_size=300"), ("data.tokenizer=bytes",)):
        assert not any(guess in notice for notice in start(*known).notices)


def test_the_jsons_learning_rate_wins_over_a_presets(start: Start) -> None:
    run = start(optimizer={"type": "AdamW", "params": {"lr": 3e-4}})
    assert run.schedule.peak_learning_rate == 3e-4
    assert run.schedule.final_learning_rate == pytest.approx(3e-5)
    names = ("0.0003", run.deepspeed_source.path, "schedule.peak_learning_rate=0.003", "preset quickstart")
    assert_names(notice_of(run, "optimizer.params.lr"), *names)
    assert start().schedule.peak_learning_rate == 3e-3


def test_the_optimizer(start: Start) -> None:
    assert start().optimizer == OptimizerFacts("adamw", (0.9, 0.95), 1e-8, 0.1)
    default = start(optimizer=None)
    assert default.optimizer == OptimizerFacts("adamw", (0.9, 0.95), 1e-8, 0.1)
    assert_names(notice_of(default, "AdamW"), default.deepspeed_source.path, "0.9", "0.95", "1e-8", "0.1")
    adam = start(optimizer={"type": "Adam"})
    assert adam.optimizer == OptimizerFacts("adamw", (0.9, 0.999), 1e-8, 0.0)
    for name, value in (("betas", "(0.9, 0.999)"), ("eps", "1e-08"), ("weight_decay", "0.0")):
        assert_names(notice_of(adam, f"optimizer.params.{name}"), value)
    assert start(optimizer={"type": "Adam", "params": {"adam_w_mode": False}}).optimizer.kind == "adam"


def test_the_schedule(start: Start) -> None:
    cosine = start("schedule.final_learning_rate=0", "train.steps=100").schedule
    assert (cosine.final_learning_rate, cosine.warmup_steps, cosine.decay_steps, cosine.steps) == (0.0, 40, 20, 100)
    assert start("schedule.kind=constant").schedule.final_learning_rate == 3e-3
    assert start("schedule.kind=wsd", "schedule.decay_steps=7").schedule.decay_steps == 7


def test_an_interval_beyond_the_end_is_reported(start: Start) -> None:
    run = start("train.steps=150")
    assert_names(notice_of(run, "checkpoint.interval_steps=200"), "train.steps=150")
    assert not any("evaluate.interval" in notice for notice in run.notices)


def test_tokens_of_a_step(start: Start) -> None:
    assert start("data.sequence_length=128", device=CPU).stages.at(1).tokens == 16 * 128


def test_the_steps_follow_from_tokens(start: Start) -> None:
    run = start("train.tokens=1e6", "data.sequence_length=128")
    assert run.config.train.steps == math.ceil(1e6 / (16 * 128)) == run.schedule.steps
    assert_names(run.sources["train.steps"], "train.tokens", "command line")
    assert_names(notice_of(run, "train.tokens"), "1,000,000", run.config.train.steps)
    again = config_to_yaml(run.config)
    assert f"steps: {run.config.train.steps}" in again
    assert "tokens: null" in again, "the saved configuration has one length"


def test_the_steps_follow_from_tokens_per_parameter(start: Start) -> None:
    run = start("train.tokens_per_parameter=20", "model.hidden_size=64")
    shape = build_model_config(run.config.model, 8192, 256)
    assert run.config.train.steps == math.ceil(20 * shape.parameter_count() / (16 * 256))
    assert_names(notice_of(run, "tokens_per_parameter"), f"{shape.parameter_count():,}")


def test_a_later_layer_changes_the_kind_of_length(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: quickstart\ntrain: {tokens: 1000000}\n")
    assert start(config=str(file)).config.train.steps == math.ceil(1e6 / 4096)
    assert start("train.steps=7", config=str(file)).config.train.steps == 7
    assert start("train.tokens=4096000", "schedule.warmup_steps=900").config.train.steps == 1000


@pytest.mark.parametrize(
    "words",
    [
        ("train.steps=10", "train.tokens=100"),
        ("train.tokens=100", "train.tokens_per_parameter=20"),
        ("train.tokens=4096000", "schedule.warmup_steps=1000"),
        ("train.tokens=4096000", "schedule.kind=wsd", "schedule.decay_steps=1000"),
    ],
)
def test_lengths_that_contradict_are_refused(start: Start, words: tuple[str, ...]) -> None:
    assert_names(refused(start, *words), words[-1].partition("=")[0])


def test_the_steps_of_tokens_break_all_their_rules_at_once(start: Start) -> None:
    words = ("train.tokens=4096000", "schedule.kind=wsd", "schedule.warmup_steps=1200", "schedule.decay_steps=900")
    said = refused(start, *words)
    assert_names(said, "schedule.warmup_steps=1200", "schedule.decay_steps=900", "train.steps=1000")
    assert len(said.splitlines()) == 3


def test_the_bubble_of_an_automatic_micro_batch_is_said(start: Start) -> None:
    pipeline = {"zero_optimization": {"stage": 1}, "ranks": 4}
    words = ("parallel.pipeline=4", "model.num_hidden_layers=4")
    small = start(*words, **pipeline)
    assert_names(notice_of(small, "parallel.pipeline"), 16, "16%")
    large = start(*words, "parallel.tensor=1", train_batch_size=4, **pipeline)
    assert_names(notice_of(large, "parallel.pipeline"), "43%", "20%", 12)
    assert start(*words, train_batch_size=12, **pipeline).batch.accumulation == 12


def test_values_of_the_quickstart_under_another_model_are_named(start: Start) -> None:
    notice = notice_of(start("model.hidden_size=512", "schedule.peak_learning_rate=1e-4"), "preset quickstart")
    assert_names(notice, "schedule.warmup_steps=40", "train.steps=400", "model.tie_word_embeddings=true")
    assert "peak_learning_rate" not in notice
    assert "hidden_size" not in notice
    assert "batch." not in notice, "the JSON has a batch"
    assert not any("preset quickstart" in notice for notice in start("train.steps=500").notices)


def test_a_run_by_tokens_resumes_with_its_steps(start: Start, write_json: Write, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(start("train.tokens=1e6").config_yaml)
    ds = read_deepspeed_json(write_json())
    for words, steps in (
        ([], 245),
        (["train.tokens=1e6"], 245),
        (["train.tokens=2e6"], 489),
        (["train.steps=300"], 300),
    ):
        run = resolve(ConfigLayers(None, words).resumed_run(saved), ds, 2, CPU)
        assert run.config.train.steps == run.schedule.steps == steps
        assert (run.config.train.tokens, run.sources["train.tokens"] == "command line") == (None, False)
