from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from config_cases import CPU, GPU, notice_of, section_of

from megalm.checkpoint.manifest import read_manifest, write_manifest
from megalm.cli.main import main
from megalm.cli.plan import planned
from megalm.cli.plan_text import plan_text
from megalm.config.deepspeed.json_reader import DS_CONFIGS_FOLDER, read_deepspeed_json
from megalm.config.deepspeed.json_schema import OffloadOptimizerSection, ZeroSection
from megalm.config.loading import describe_preset, load_run_config, preset_paths
from megalm.config.schema import Recompute
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.cost_model.memory import (
    MUON_ROUND,
    MemoryCase,
    MemoryPlan,
    checkpoint_bytes,
    estimate_memory,
    estimate_stages,
    parameter_groups,
    shares,
)
from megalm.cost_model.moments import block_bytes, kept_bytes, loss_moments
from megalm.model.model_config import ModelConfig, build_model_config, flops_per_token, recomputed_flops_per_token
from megalm.planning.lr_schedule import ScheduleSegment, learning_rate
from megalm.planning.memory_fit import loss_chunk_tokens
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_plan import Plan, Rate, make_plan, parameters_by_part, points
from megalm.runs.run_settings import ConfigFiles
from megalm.topology import Topology
from megalm.utils.formatting import format_bytes
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
NAMES = {"float32": "fp32", "bfloat16": "bf16"}  # torch's -> the JSON's


def shape_of(*overrides: str, vocab: int = 77, length: int = 32) -> ModelConfig:
    return build_model_config(load_run_config(None, list(overrides)).config.model, vocab, length)


def case(shape: ModelConfig | None = None, **changes: Any) -> MemoryCase:
    base = MemoryCase(
        shape=shape or shape_of("model.hidden_size=30", "model.num_attention_heads=3"),
        sequence_length=32,
        micro_batch=2,
        accumulation=1,
        precision="bf16",
        gradient_precision="fp32",
        communication_precision="fp32",
        zero=ZeroSection(stage=2),
        topology=Topology(2),
    )
    return replace(base, **changes)


def groups_of(case: MemoryCase) -> list[list[int]]:
    (share,) = shares(case.shape, Topology(1))
    return [group.counts for group in parameter_groups(case, share).values()]


@pytest.mark.parametrize(
    "overrides", [(), ("model.style=gpt2",), ("model.style=gpt2", "model.tie_word_embeddings=false")]
)
def test_parts_sum_to_the_models_parameters(overrides: tuple[str, ...]) -> None:
    shape = shape_of(*overrides)
    assert sum(parameters_by_part(shape).values()) == shape.parameter_count()


def test_gpt2_small_has_the_parameters_of_gpt2_small() -> None:
    sizes = ("model.hidden_size=768", "model.num_hidden_layers=12", "model.num_attention_heads=12")
    shape = shape_of("model.style=gpt2", *sizes, vocab=50_257, length=1024)
    assert sum(parameters_by_part(shape).values()) == 124_439_808  # openai-community/gpt2
    # 6 x (12 layers of 12 x 768^2, and the tied head) + 6 x 12 layers x 1024 tokens x 768
    assert flops_per_token(shape, 1024) == 6 * (12 * 12 * 768**2 + 50_257 * 768) + 6 * 12 * 1024 * 768
    assert checkpoint_bytes(shape) == 12 * 124_439_808


def test_tying_the_head_changes_parameters_but_no_flops() -> None:
    tied, apart = (shape_of(f"model.tie_word_embeddings={word}") for word in ("true", "false"))
    assert apart.parameter_count() - tied.parameter_count() == 77 * 256
    assert flops_per_token(tied, 32) == flops_per_token(apart, 32)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_zero_divides_what_it_says(ranks: int) -> None:
    """16 bytes a parameter in bf16 with fp32 gradients: 2 weights, 4 gradients, 4 master, 8 moments."""
    topology = Topology(ranks)
    groups = [sum(group) for group in groups_of(case())]
    padded = sum(math.ceil(group / (2 * ranks)) * 2 * ranks for group in groups)
    own = padded // ranks
    by_stage = {stage: estimate_memory(case(topology=topology, zero=ZeroSection(stage=stage))) for stage in (1, 2, 3)}
    for stage in (1, 2):
        assert by_stage[stage].weights == 2 * padded
        assert by_stage[stage].master == 4 * own
        assert by_stage[stage].moments == 8 * own
    assert by_stage[2].gradients == 4 * own
    # DeepSpeed's BF16 optimizer holds whole fp32 gradients on every rank, and autograd's own.
    assert by_stage[1].gradients == 4 * padded + 2 * sum(groups)
    each = sum(math.ceil(count / ranks) for group in groups_of(case()) for count in group)
    stage_3 = by_stage[3]
    assert (stage_3.weights, stage_3.gradients, stage_3.master, stage_3.moments) == (
        2 * each,
        4 * each,
        4 * each,
        8 * each,
    )


def test_whole_gradients_are_planned_for() -> None:
    """A bucket of reduced ones takes the place of those that it was filled with."""
    plain = case(zero=ZeroSection(stage=2, reduce_bucket_size=1000))
    whole = replace(plain, whole_gradients=True)
    count = plain.shape.parameter_count()
    assert estimate_memory(whole).gradients == 4 * count + estimate_memory(plain).gradients - 4 * 1000
    assert estimate_memory(whole).buckets == 2 * estimate_memory(plain).buckets, "in fp32, not in bf16"
    large = replace(whole, zero=ZeroSection(stage=2, reduce_bucket_size=count))
    assert estimate_memory(large).gradients == 4 * count


def test_stage_0_in_fp32_is_plain_adam() -> None:
    count = shape_of("model.hidden_size=30", "model.num_attention_heads=3").parameter_count()
    plain = estimate_memory(
        case(precision="fp32", zero=ZeroSection(stage=0), topology=Topology(1), communication_precision="fp32")
    )
    assert (plain.weights, plain.gradients, plain.master, plain.moments) == (4 * count, 4 * count, 0, 8 * count)
    assert plain.buckets == 0


def test_writing_checkpoints_behind_training_takes_memory_of_the_host() -> None:
    plain, behind = (estimate_memory(case(zero=ZeroSection(stage=3), checkpoint_copy=copy)) for copy in (False, True))
    assert behind.host == {"checkpoint copy": plain.master + plain.moments}
    assert behind.total == plain.total
    on_cpu = estimate_memory(case(zero=ZeroSection(stage=3), checkpoint_copy=True, on_cpu=True))
    assert on_cpu.total == sum(on_cpu.parts().values()) + behind.host["checkpoint copy"]


def test_offload_moves_memory_and_a_cpu_counts_it_once() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    here = estimate_memory(case(zero=ZeroSection(stage=3)))
    away = estimate_memory(case(zero=ZeroSection.model_validate({"stage": 3, **offload})))
    assert (away.weights, away.gradients, away.master, away.moments) == (0, 0, 0, 0)
    for part in ("weights", "master", "moments"):
        assert away.host[part] == getattr(here, part)
    assert away.total < here.total
    on_cpu = estimate_memory(case(zero=ZeroSection.model_validate({"stage": 3, **offload}), on_cpu=True))
    assert on_cpu.total == sum(on_cpu.parts().values()) + sum(on_cpu.host.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("kind", "each"), [("bf16", 4.0), ("8bit", 2 + 8 / 256)])
def test_low_precision_moments_take_fewer_bytes(stage: int, kind: str, each: float) -> None:
    """Beside the bytes of whole blocks, those of the blocks that parameters and ranks cut."""
    shape = shape_of("model.hidden_size=256", "model.num_attention_heads=4")
    zero = ZeroSection(stage=stage)
    full = estimate_memory(case(shape, zero=zero))
    low = estimate_memory(case(shape, zero=zero, optimizer_state=kind))
    assert low.moments / full.moments == pytest.approx(each / 8, rel=0.01)
    assert low.total - low.moments == full.total - full.moments
    for ranks in (3, 7):  # every cut adds a block at most
        uneven = [
            estimate_memory(case(zero=zero, optimizer_state=it, topology=Topology(ranks))) for it in ("fp32", kind)
        ]
        elements, blocks = uneven[0].moments / 8, uneven[1].moments / (each * 256)
        parameters = sum(map(len, groups_of(case())))
        assert elements / 256 <= blocks <= elements / 256 + 2 * parameters


def test_groups_follow_the_decay_of_embeddings() -> None:
    both = groups_of(case()), groups_of(case(embedding_weight_decay=False))
    assert sum(map(sum, both[0])) == sum(map(sum, both[1]))
    assert sum(both[1][1]) - sum(both[0][1]) == 77 * 30


def test_parameter_groups_are_groups_of_the_optimizer(start: Start) -> None:
    """The first pattern that matches counts; without a weight decay of its own a group is divided as the others are."""
    rules = (
        "train.parameter_groups=[{match: 'layers.0.mlp.*', learning_rate_scale: 0.5, weight_decay: 0}, "
        "{match: '*.mlp*', learning_rate_scale: 2}]"
    )
    run = start("model.num_hidden_layers=2", "model.tie_word_embeddings=false", rules, ranks=1)
    plan = make_plan(run, vocab_size=1024)
    settings = [(it.match, it.tensors, it.learning_rate_scale, it.weight_decay) for it in plan.optimizer_groups]
    assert settings == [
        (None, 10, 1.0, 0.1),  # two tables, four matrices of each attention
        (None, 3, 1.0, 0.0),  # norms before attention, the final one
        ("layers.0.mlp.*", 3, 0.5, 0.0),
        ("*.mlp*", 3, 2.0, 0.1),
        ("*.mlp*", 2, 2.0, 0.0),  # the norms before both MLPs
    ]
    assert sum(it.parameters for it in plan.optimizer_groups) == plan.parameter_count
    assert [sum(group) for group in groups_of(plan.case)] == [it.parameters for it in plan.optimizer_groups]
    section = section_of(plan_text(plan, 8), "Parameter groups")
    assert_names(section, "layers.0.mlp.*", "*.mlp*", f"{plan.optimizer_groups[2].parameters:,}", 0.5)


def test_an_update_of_muon_takes_what_activations_leave() -> None:
    """Whole matrices on a rank, but few at a time."""
    zero = ZeroSection(stage=2)
    short = replace(case(), muon=True, zero=zero, micro_batch=1, sequence_length=1, loss_chunk_tokens=1, on_cpu=True)
    wide = replace(short, shape=shape_of("model.hidden_size=2048"), topology=Topology(1))
    matrix = max(math.prod(size) for name, size in wide.shape.parameters().items() if name.startswith("layers."))
    plan = estimate_memory(wide)
    assert plan.buckets + plan.activations + plan.loss == 2 * (4 * max(matrix, MUON_ROUND) + 3 * matrix)
    assert estimate_memory(replace(wide, muon=False)).buckets < plan.buckets
    assert estimate_memory(replace(wide, micro_batch=8, sequence_length=4096)).buckets < plan.buckets


def test_the_plan_shows_what_is_frozen(start: Start) -> None:
    rules = "train.parameter_groups=[{match: embedding.*, frozen: true}, {match: 'layers.0.*', frozen: true}]"
    run = start("model.num_hidden_layers=2", "model.tie_word_embeddings=true", rules, ranks=1)
    plan = make_plan(run, vocab_size=1024)
    frozen = [it for it in plan.optimizer_groups if it.frozen]
    assert [it.match for it in frozen] == ["embedding.*", "layers.0.*"]
    assert plan.trained_parameters == plan.parameter_count - sum(it.parameters for it in frozen) > 0
    assert sum(map(sum, groups_of(plan.case))) == plan.trained_parameters
    text = plan_text(plan, 8)
    assert_names(section_of(text, "Parameter groups"), "embedding.*", "frozen", f"{frozen[0].parameters:,}")
    assert_names(section_of(text, "Parameters"), f"{plan.trained_parameters:,}")
    assert any("embedding.tokens.weight" in notice for notice in run.notices)  # which is the head, and trains nowhere
    size = 4 * plan.parameter_count + 8 * plan.trained_parameters
    assert checkpoint_bytes(plan.shape, plan.case.parameter_groups) == size


def test_an_average_of_the_weights_is_in_the_plan(start: Start) -> None:
    """4 bytes of each parameter that trains, where the master is; none of a frozen one."""
    rules = "train.parameter_groups=[{match: embedding.*, frozen: true}]"
    plans = [make_plan(start(rules, *more, ranks=2), 1024) for more in ((), ("train.ema_decay=0.99",))]
    without, average = (plan.memory for plan in plans)
    assert average.ema == average.master > 0 == without.ema
    assert average.total - without.total == average.ema
    assert plans[1].checkpoint_bytes - plans[0].checkpoint_bytes == 4 * plans[0].trained_parameters
    assert_names(section_of(plan_text(plans[1], 8), "Memory of one rank (estimate)"), "ema", "train.ema_decay")
    assert ["evaluate.ema" in plan_text(plan, 8) for plan in plans] == [False, True]
    offload = ZeroSection(stage=2, offload_optimizer=OffloadOptimizerSection(device="cpu"))
    offloaded = estimate_memory(case(zero=offload, ema=True))
    assert offloaded.host["ema"] == offloaded.host["master"] > 0 == offloaded.ema


FROZEN = {
    "below": ("embedding.*", "layers.0.*"),
    "in a block": ("embedding.*", "layers.0.attention*", "layers.[12].mlp.up.*", "layers.2.attention.value.*"),
    "all but a norm": ("embedding.*", "layers.*", "head.*"),
    "the head": ("head.*", "layers.2.*"),
    "all but a projection": ("embedding.*", "layers.[02].*", "layers.1.*norm*", "layers.1.mlp*", "layers.1.*y.*"),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_flops_are_those_of_a_step_with_frozen_parameters(name: str, style: str) -> None:
    from fnmatch import fnmatchcase

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megalm.model.transformer import LanguageModel

    length, vocab = 64, 256
    sizes = ("model.num_hidden_layers=3", f"model.style={style}", "model.tie_word_embeddings=false")
    shape = shape_of(*sizes, vocab=vocab, length=length)
    model, frozen = LanguageModel(shape, chunk_tokens=128), set()
    for parameter_name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        if any(fnmatchcase(parameter_name, pattern) for pattern in FROZEN[name]):
            frozen.add(parameter_name)
            parameter.requires_grad_(False)
    tokens = torch.randint(0, vocab, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens)[0].backward()
    # Attention multiplies the whole square of scores, of which the formula counts half; the counter misses `addmm_`,
    # the gradient of the head's weight.
    core = length * shape.num_attention_heads * shape.head_dim
    backward = {"below": 2, "in a block": 2, "all but a norm": 0, "the head": 3, "all but a projection": 2}[name]
    missed = 0 if "head.weight" in frozen else 2 * vocab * shape.hidden_size
    counted = counter.get_total_flops() / (2 * length) + missed
    assert counted == flops_per_token(shape, length, frozen) + (2 * 3 + 4 * backward) * core


def test_buckets_are_allocated_whole_on_a_gpu_only() -> None:
    zero = ZeroSection(stage=2, reduce_bucket_size=10**8, overlap_comm=True)
    assert estimate_memory(case(zero=zero)).buckets == 2 * 2 * 10**8
    assert estimate_memory(case(zero=zero, on_cpu=True)).buckets < 10**6


def test_recomputing_saves_activations() -> None:
    none, half, every = (
        estimate_memory(
            case(shape_of("model.num_hidden_layers=8"), accumulation=2, checkpoint_activations_every=n)
        ).activations
        for n in (0, 2, 1)
    )
    assert every < half < none


@pytest.mark.parametrize(
    ("every", "stages", "in_flight", "whole"), [(0, 1, 1, 8), (3, 1, 1, 3), (0, 2, 2, 4), (1, 2, 2, 4)]
)
def test_offloaded_inputs_lie_in_the_cpus_memory(every: int, stages: int, in_flight: int, whole: int) -> None:
    """The first stage's, in buffers of powers of two; one input is in use on the device, and one on its way."""
    sizes: dict[str, Any] = {
        "recompute": "none" if every else "full",
        "checkpoint_activations_every": every,
        "topology": Topology(stages, pipeline=stages),
        "accumulation": 4,
        "zero": ZeroSection(stage=1),
    }
    shape = shape_of("model.num_hidden_layers=8")
    plain, offloaded = (
        next(estimate_stages(case(shape, offload_activations=offload, **sizes))) for offload in (False, True)
    )
    numbers = case(shape).tokens * shape.hidden_size
    buffer = 2 ** math.ceil(math.log2(2 * numbers))
    assert offloaded.host == {"block inputs": whole * in_flight * buffer}
    assert plain.activations - offloaded.activations == (whole * in_flight - 2) * 2 * numbers
    on_cpu = next(estimate_stages(case(shape, offload_activations=True, on_cpu=True, **sizes)))
    assert on_cpu.host == {"block inputs": whole * in_flight * 2 * numbers}


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize(
    "extra",
    [
        *("model.dropout=0", "model.dropout=0.1", "model.qk_norm=true", "model.num_key_value_heads=2"),
        *("model.qk_norm=whole", "model.norm_placement=post", "model.norm_placement=both"),
        "model.gated_mlp=true model.hidden_act=gelu model.position_embedding_type=rope model.partial_rotary_factor=0.5",
        "model.sliding_window=9 model.attention_sinks=true",
        "model.attn_logit_softcapping=5",
        "model.parallel_residual=true",
    ],
)
def test_activations_against_what_autograd_saves(style: str, precision: str, extra: str) -> None:
    """The formula against the sum of all storages that the forward pass of the real model keeps, on a CPU."""
    torch = pytest.importorskip("torch")
    from megalm.model.transformer import LanguageModel

    batch, length, vocab = 2, 64, 256
    shape = shape_of("model.num_hidden_layers=3", f"model.style={style}", *extra.split(), vocab=vocab, length=length)
    model = LanguageModel(shape).to(getattr(torch, precision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    tokens = torch.randint(0, vocab, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    size = 4 if precision == "float32" else 2
    loss_gradients = vocab * shape.hidden_size * 4 + batch * length * shape.hidden_size * size
    measured = sum(storage.nbytes() for storage in saved.values()) - loss_gradients
    (share,) = shares(shape, Topology(1))
    sizes = case(shape, micro_batch=batch, sequence_length=length, precision=NAMES[precision], on_cpu=True)
    estimated = kept_bytes(sizes, share)[0]
    assert 1.0 <= estimated / measured < 1.06


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        *((kind, None) for kind in get_args(Recompute) if kind != "none"),
        ("none", 64),
        ("norms", 64),
        ("attention", 64),
        ("full", 64),
    ],
)
@pytest.mark.parametrize(
    ("style", "precision", "extra"),
    [("llama", "bfloat16", "model.num_key_value_heads=2"), ("gpt2", "float32", "model.dropout=0.1")],
)
def test_recomputation_against_live_memory(
    style: str, precision: str, extra: str, kind: Recompute, chunk: int | None
) -> None:
    """What is no longer alive after the forward pass, and what the backward pass multiplies again, on a CPU."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from megalm.model.recomputation import Recomputation
    from megalm.model.transformer import LanguageModel
    from tests.live_memory import LiveMemory

    batch, length, vocab = 2, 128, 256
    shape = shape_of("model.num_hidden_layers=3", f"model.style={style}", extra, vocab=vocab, length=length)
    (share,) = shares(shape, Topology(1))
    sizes = case(shape, micro_batch=batch, sequence_length=length, precision=NAMES[precision], on_cpu=True)
    flops, kept, planned_to_keep = [], [], []
    for recompute, tokens_of_a_tile in (("none", None), (kind, chunk)):
        chosen_model = Recomputation(recompute, mlp_chunk_tokens=tokens_of_a_tile)
        model = LanguageModel(shape, recomputation=chosen_model).to(getattr(torch, precision))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        tokens = torch.randint(0, vocab, (batch, length))
        with LiveMemory() as memory:
            loss, _ = model(tokens, tokens)
        kept.append(memory.bytes)
        chosen = replace(sizes, recompute=recompute, mlp_chunk_tokens=tokens_of_a_tile)
        planned_to_keep.append(kept_bytes(chosen, share)[0])
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    saved, planned_to_save = kept[0] - kept[1], planned_to_keep[0] - planned_to_keep[1]
    assert 0.98 <= planned_to_save / saved <= 1.02, (planned_to_save, saved)
    # One block of queries multiplies the whole square of scores, of which the formula counts half.
    square = length * shape.num_attention_heads * shape.head_dim * 2 * shape.num_hidden_layers
    expected = recomputed_flops_per_token(shape, length, kind, tiles=chunk is not None)
    if kind in ("attention", "full"):
        expected += square
    if shape.dropout and (chunk is None or kind == "attention"):  # its mask is drawn behind the last product
        ends = {"attention": "attention.output", "mlp": "mlp.down", "full": "mlp.down"}
        end = f"layers.0.{ends.get(kind)}.weight"
        expected += 2 * shape.num_hidden_layers * math.prod(shape.parameters().get(end, (0,)))
    assert flops[1] - flops[0] == batch * length * expected


@pytest.mark.parametrize(
    ("style", "precision", "extra", "kind", "chunk", "offload"),
    [
        ("llama", "bfloat16", "", "none", None, False),
        ("llama", "bfloat16", "", "attention", None, False),
        ("llama", "bfloat16", "", "none", 128, False),
        ("llama", "bfloat16", "", "full", None, False),
        ("llama", "bfloat16", "", "full", 128, False),
        ("llama", "bfloat16", "", "full", 128, True),
        ("llama", "bfloat16", "num_experts=4 num_experts_per_token=2 moe_intermediate_size=128", "none", None, False),
        ("llama", "bfloat16", "num_experts=4 num_experts_per_token=2 moe_intermediate_size=128", "full", None, False),
        ("llama", "bfloat16", "norm_placement=both num_key_value_heads=1", "full", None, False),
        ("gpt2", "float32", "", "mlp", None, False),
        ("gpt2", "float32", "", "full", 128, True),
    ],
)
def test_the_peak_of_a_long_sequence_against_live_memory(
    style: str, precision: str, extra: str, kind: Recompute, chunk: int | None, offload: bool
) -> None:
    """Forward and backward, on a CPU, where offloaded inputs lie in the same memory."""
    torch = pytest.importorskip("torch")
    from megalm.model.activation_offload import OffloadedInputs
    from megalm.model.recomputation import Recomputation
    from megalm.model.transformer import LanguageModel
    from tests.live_memory import PeakMemory

    words = ("num_hidden_layers=3", "hidden_size=32", "num_attention_heads=2", "intermediate_size=256")
    words = (*words, f"style={style}", *extra.split())
    shape = shape_of(*(f"model.{word}" for word in words), vocab=256, length=1024)
    inputs = OffloadedInputs(torch.device("cpu")) if offload else None
    recomputation = Recomputation(kind, mlp_chunk_tokens=chunk, inputs=inputs)
    model = LanguageModel(shape, chunk_tokens=128, recomputation=recomputation).to(getattr(torch, precision))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.register_post_accumulate_grad_hook(lambda it: setattr(it, "grad", None))  # as DeepSpeed takes them
    tokens = torch.randint(0, 256, (1, 1024))
    with PeakMemory() as memory:
        model(tokens, tokens)[0].backward()
    sizes = case(
        shape,
        micro_batch=1,
        sequence_length=1024,
        accumulation=2,
        precision=NAMES[precision],
        on_cpu=True,
        loss_chunk_tokens=128,
        recompute=kind,
        mlp_chunk_tokens=chunk,
        offload_activations=offload,
    )
    plan = estimate_memory(sizes)
    planned_peak = plan.activations + plan.loss + plan.host.get("block inputs", 0)
    assert 0.95 <= planned_peak / memory.peak <= 1.05, (planned_peak, memory.peak)


def test_float8_counts_rounded_copies() -> None:
    """Of the largest product: 64 tokens of 32 and 192 numbers, or 64 tokens of 192 beside the weight, a byte each."""
    shape = shape_of("model.hidden_size=32", "model.intermediate_size=192")
    (share,) = shares(shape, Topology(1))
    plain, rounded = (block_bytes(case(shape, float8=float8), share, "none").working for float8 in (False, True))
    assert rounded - plain == max(64 * (32 + 192), 64 * 192 + 32 * 192)


def test_the_loss_never_counts_whole_logits() -> None:
    shape = shape_of(vocab=50_000)
    few, many = (max(loss_moments(case(shape, sequence_length=tokens, micro_batch=1), 1)) for tokens in (4096, 65_536))
    assert many - few == (65_536 - 4096) * shape.hidden_size * 2


@pytest.mark.parametrize(
    ("gibibytes", "configured", "overrides", "chunk"),
    [
        (80, "null", (), 8192),
        (80, "null", ("model.vocab_size=131072",), 4096),
        (80, "null", ("model.vocab_size=131072", "parallel.tensor=2"), 8192),
        (24, "null", (), 2048),
        (1, "null", (), 1024),
        (None, "null", (), 1024),
        (80, "40", (), 40),
    ],
)
def test_a_chunk_of_logits_fills_the_device(
    gibibytes: int | None, configured: str, overrides: tuple[str, ...], chunk: int
) -> None:
    """Of 50,304 entries at 8 bytes, 8,192 tokens take 3.1 GiB; a sixteenth of the memory is theirs. None: a CPU."""
    config = load_run_config(None, [f"train.loss_chunk_tokens={configured}", *overrides]).config
    device = replace(GPU, memory_bytes=gibibytes << 30) if gibibytes else CPU
    assert loss_chunk_tokens(config, build_model_config(config.model, 50_304, 1024), device) == chunk


def test_a_plan_in_text(start: Start) -> None:
    run = start("train.steps=1000", ranks=4, device=GPU)
    plan = make_plan(run, vocab_size=8192)
    assert plan.parameter_count == 5_310_720
    assert plan.total_tokens == 16 * 256 * 1000
    assert plan.learning_rates[-1] == (1000, pytest.approx(3e-4))
    assert max(rate for _, rate in plan.learning_rates) == 3e-3
    text = plan_text(plan, 8)
    lines = [line.split() for line in text.splitlines()]
    assert ["train.steps", "1000", "command", "line"] in lines
    assert ["data.sequence_length", "256", "preset", "quickstart"] in lines
    assert ["model.qk_norm", "false", "default"] in lines
    assert ["total", "5,310,720"] in lines
    assert_names(section_of(text, "Tokens"), "4,096,000")
    assert "data.train" not in section_of(text, "Data"), "a recipe brings it"
    assert_names(section_of(text, "Ranks"), "pipeline 1", "data 4", "tensor 1")
    assert run.batch.micro_batch == 4
    assert run.notices
    assert section_of(text, "Notices").splitlines() == list(run.notices)
    text = plan_text(plan, 8, [("data", "data/web: 2.00 epochs")], ["seen often"])
    assert section_of(text, "Data") == "data/web: 2.00 epochs"
    assert text.endswith("WARNING: seen often")


def test_a_vocabulary_that_nobody_knows_is_the_same_guess_everywhere() -> None:
    """The memory and the table of parameters, of a JSON that states its micro-batch, too."""
    loaded = load_run_config("quickstart", ["data.recipe=null"])
    for name in ("zero2.json", "recipes/h100.json"):
        plan = planned(ConfigFiles(loaded, read_deepspeed_json(DS_CONFIGS_FOLDER / name)), 1, GPU, 8)
        assert plan.shape.vocab_size == 50_304
        assert plan.memory.weights >= 50_304 * 256 * 2
        assert_names("\n".join(plan.resolved.notices), "50,304")


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; import megalm.planning.run_plan; "
        "import megalm.cli.plan, megalm.planning.resolve, megalm.runs.run_settings;"
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


def test_the_command_plans_for_a_cluster_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", "--gpu-memory", "80", "--ranks", "8", "train.steps=100"])
    assert left.value.code in (0, None)
    assert_names(section_of(capsys.readouterr().out, "Ranks"), "pipeline 1", "data 8", "tensor 1")
    with pytest.raises(SystemExit) as left:
        main(["plan", "--gpu-memory", "80", "train.stepz=100"])
    assert left.value.code == 2
    assert_names(capsys.readouterr().err, "train.stepz", "train.steps")


def test_a_plan_for_a_gpu_by_its_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An fp16 run is planned where there is no GPU, and a chip without bf16 refuses a bf16 run."""
    monkeypatch.delenv("MEGALM_ALLOW_CPU_FP16", raising=False)

    def plan(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            main(["plan", "--ranks", "8", *words])
        shown = capsys.readouterr()
        return left.value.code, shown.out + shown.err

    code, text = plan("--deepspeed_config", "fp16.json", "--gpu", "a100-40gb")
    assert code in (0, None)
    assert_names(section_of(text, "Memory of one rank"), "40.0 GiB")
    code, text = plan("--deepspeed_config", "bf16.json", "--gpu", "V100")
    assert code == 2
    assert_names(text, "bf16.enabled=true")
    code, text = plan("--gpu", "A1000")
    assert code == 2
    assert_names(text, "--gpu A1000", "A100")
    code, text = plan("--deepspeed_config", "fp16.json", "train.stepz=1")
    assert code == 2
    assert_names(text, "train.stepz")


def test_presets_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["presets"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")}
    assert_names(rows["quickstart"], "5,310,720", "4 x 256")
    assert_names(rows["gpt2-124m"], "124,439,808", "12 x 768")
    assert_names(rows["h100-1k"], "12 x 768")
    with pytest.raises(SystemExit):
        main(["presets", "quickstart"])
    assert "recipe: python-stdlib" in capsys.readouterr().out


@pytest.mark.parametrize(("columns", "width"), [(80, 80), (None, 120), (300, 120)])
def test_the_presets_are_wrapped_once(
    columns: int | None, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megalm.cli.config.terminal_width", lambda: columns)
    with pytest.raises(SystemExit):
        main(["presets"])
    heading, ruler, *lines = capsys.readouterr().out.splitlines()
    start = heading.index("description")
    assert len(ruler) == max(map(len, lines)) == width
    assert [line[start:] for line in lines] == [
        line.rstrip()
        for name in preset_paths()
        for line in textwrap.wrap(describe_preset(name), width - start, break_on_hyphens=False)
    ]


def test_the_rate_of_every_step_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*words: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["plan", "--gpu-memory", "80", *words])
        return int(left.value.code or 0)

    picture = tmp_path / "pictures" / "rate.png"
    assert plan("--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert_names(capsys.readouterr().out, picture)
    for wrong, names in (
        (("--plot", str(tmp_path / "rate.txt")), ("rate.txt", ".png", ".svg", ".pdf")),
        (("--plot", str(picture / "rate.png")), (picture / "rate.png",)),
        (("--extend-steps", "5"), ("--extend-steps", "--after")),
        (("--after", str(tmp_path)), (tmp_path,)),
    ):
        assert plan(*wrong) == 2
        assert_names(capsys.readouterr().err, *names)


def test_a_plan_goes_on_from_a_run_s_newest_checkpoint(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    past = ScheduleSegment(1, 0, start("train.steps=300").schedule)
    fixture = Path(__file__).resolve().parents[2] / "fixtures" / "run-0.1.0" / "small" / "checkpoints" / "step-00000009"
    for step in (100, 200):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(fixture, folder)
        schedule = {"segments": [past.as_json()], "stated": []}
        write_manifest(folder, read_manifest(fixture).amended(step=step, schedule=schedule))
    (tmp_path / "checkpoints" / "latest").write_text("step-00000200\n")
    for place in (tmp_path, tmp_path / "checkpoints" / "latest", tmp_path / "checkpoints" / "step-00000200"):
        with pytest.raises(SystemExit):
            main(["plan", "--gpu-memory", "80", "--after", str(place), "--extend-steps", "50"])
        assert_names(section_of(capsys.readouterr().out, "Learning rate"), 201)


def test_every_turn_of_a_schedule_is_drawn(start: Start) -> None:
    words = ("schedule.kind=wsd", "schedule.warmup_steps=7", "schedule.decay_steps=1003", "train.steps=100001")
    plan = make_plan(start(*words), vocab_size=100)
    steps, rates = points(plan.schedules)
    assert len(steps) < 2200
    assert {1, 7, 100_001 - 1003, 100_001} <= set(steps)
    assert rates == [learning_rate(plan.resolved.schedule, step) for step in steps]


def test_a_run_that_goes_on_is_planned_with_its_past(start: Start) -> None:
    """Strategy A of a run of 1,000 steps: a cosine of its own from there, and a constant rate before."""
    first = ScheduleSegment(1, 0, start("schedule.kind=constant", "train.steps=1000").schedule)
    then = ScheduleSegment(1001, 1000, start("schedule.warmup_steps=0", "train.steps=9000").schedule)
    plan = make_plan(start("train.steps=10000"), 100, (first, then))
    rates = dict(plan.learning_rates)
    assert (rates[1000], rates[10_000]) == (3e-3, pytest.approx(3e-4))
    assert rates[1001] < rates[1000]
    steps, drawn = points(plan.schedules)
    assert drawn[steps.index(1000)] == 3e-3
    assert drawn[steps.index(1001)] == rates[1001]
    before, after = section_of(plan_text(plan, 8), "Learning rate").splitlines()[:2]
    assert_names(before, 1, "constant", "0.003")
    assert_names(after, "1,001", "cosine", "0.003", "0.0003", "10,000")


def test_the_verdict_says_whether_a_run_fits_and_what_makes_it_fit(start: Start) -> None:
    words = ("model.hidden_size=2048", "model.num_hidden_layers=48")

    def of(*more: str, memory_gib: int = 40, **changes: Any) -> tuple[Plan, str]:
        plan = make_plan(start(*words, *more, device=replace(GPU, memory_bytes=memory_gib << 30), **changes), 8192)
        return plan, section_of(plan_text(plan, 8), "Verdict")

    plan, text = of(memory_gib=20)
    assert plan.fit.level == "does not fit"
    assert_names(text, format_bytes(plan.memory.total), format_bytes(20 << 30), "offload_optimizer")
    zero = plan.case.zero.model_copy(update={"offload_optimizer": OffloadOptimizerSection(device="cpu")})
    assert estimate_memory(replace(plan.case, zero=zero)).total <= 0.85 * (20 << 30), "what it names does help"
    assert_names(section_of(plan_text(plan, 8), "Notices"), format_bytes(plan.memory.total), "85%")

    plan, text = of(memory_gib=12)
    assert_names(text, "ZeRO stage 3", "offload_optimizer")
    _, text = of(memory_gib=1)
    assert_names(text, "parallel.tensor")
    plan, text = of(memory_gib=80)
    assert plan.fit.level == "fits"
    assert "85%" not in section_of(plan_text(plan, 8), "Notices").replace("into 85%", "")


def test_an_explicit_micro_batch_near_the_limit_is_noticed(start: Start) -> None:
    each = "train.reduce_gradients=micro_batch"  # by itself it would keep whole gradients in a roomy memory only
    roomy = make_plan(start(each, train_micro_batch_size_per_gpu=8, ranks=1, device=GPU), 8192)
    near = replace(GPU, memory_bytes=int(roomy.memory.total / 0.95))
    run = start(each, train_micro_batch_size_per_gpu=8, ranks=1, device=near)
    assert make_plan(run, 8192).fit.level == "tight"
    assert_names(notice_of(run, "estimate"), "95%", "85%", format_bytes(roomy.memory.total))
    assert not any("estimate" in notice for notice in roomy.resolved.notices)


def test_host_memory_is_added_up_and_checked(start: Start) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}

    def of(host: int | None) -> Plan:
        return make_plan(start(ranks=4, device=replace(GPU, host_memory_bytes=host), zero_optimization=zero), 99)

    unknown = of(None)
    needed = sum(unknown.memory.host.values())
    assert (unknown.fit.host_needed, unknown.fit.level) == (needed, "fits")
    assert_names(section_of(plan_text(unknown, 2), "Memory"), format_bytes(needed), format_bytes(2 * needed))
    assert of(2 * needed).fit.level == "fits"
    assert of(needed + 1).fit.level == "tight"
    short = of(needed - 1)
    assert short.fit.level == "does not fit"
    assert short.resolved.batch == unknown.resolved.batch, "a smaller micro-batch would not help"


_SIZES = {
    "7 B": ("hidden_size=4096", "num_hidden_layers=32", "num_attention_heads=32", "intermediate_size=11008"),
    "70 B": (
        "hidden_size=8192",
        "num_hidden_layers=80",
        "num_attention_heads=64",
        "num_key_value_heads=8",
        "intermediate_size=28672",
    ),
}


def _start_case(size: str, topology: Topology, stage: int, **changes: Any) -> MemoryCase:
    overrides = [f"model.{word}" for word in (*_SIZES[size], "tie_word_embeddings=false")]
    shape = shape_of(*overrides, vocab=32_000, length=4096)
    buckets = {"reduce_bucket_size": 200_000_000, "sub_group_size": 1_000_000_000}
    zero = ZeroSection.model_validate({"stage": stage, **buckets})
    sizes: dict[str, Any] = {"micro_batch": 1, "sequence_length": 4096, "checkpoint_activations_every": 1}
    return case(shape, zero=zero, topology=topology, **sizes | changes)


@pytest.mark.parametrize(
    ("size", "topology", "stage", "device_gib", "host_gib"),
    [
        ("7 B", Topology(32), 1, 38.44, 0.73),
        ("7 B", Topology(32), 2, 25.10, 0.73),
        ("7 B", Topology(16), 3, 4.91, 0.78),
        ("70 B", Topology(64), 3, 11.27, 2.01),
        ("70 B", Topology(64, 8), 3, 10.84, 2.01),
        ("70 B", Topology(64, 1, 8), 1, 53.38, 1.46),
    ],
)
def test_the_start_of_large_models(
    size: str, topology: Topology, stage: int, device_gib: float, host_gib: float
) -> None:
    """Against live tensors of engines that started on fake GPUs: on every rank, or on the first stage."""
    plan = next(iter(estimate_stages(_start_case(size, topology, stage))))
    assert (plan.start - plan.runtime) / 2**30 == pytest.approx(device_gib, rel=0.02)
    assert plan.start_host / 2**30 == pytest.approx(host_gib, rel=0.02)


def test_zero_3_keeps_weights_that_it_needs_again() -> None:
    """Against live tensors of the second step on fake GPUs, whose first accumulation shows nothing of it yet."""
    plan = estimate_memory(_start_case("7 B", Topology(16), 3, accumulation=2))
    assert (plan.total - plan.runtime) / 2**30 == pytest.approx(12.01, rel=0.03)


def test_where_the_device_has_no_room_weights_are_flattened_in_the_cpus_memory() -> None:
    def of(memory_gib: int) -> MemoryPlan:
        return estimate_memory(_start_case("7 B", Topology(64), 2, device_bytes=memory_gib << 30))

    roomy, narrow = of(80), of(20)
    weights = 2 * narrow.weights
    assert roomy.peak == roomy.start > roomy.total, "with many ranks the start needs more than a step"
    assert roomy.start > weights
    assert narrow.start < 20 << 30
    assert narrow.host_peak == pytest.approx(weights, rel=0.01)


def test_the_verdict_judges_the_start_where_it_needs_more(start: Start) -> None:
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    words = [f"model.{word}" for word in _SIZES["7 B"]] + ["train.checkpoint_activations_every=1"]
    options: dict[str, Any] = {"ranks": 64, "zero_optimization": zero, "train_batch_size": 64}
    host = 64 << 30
    run = start(*words, **options, device=replace(GPU, memory_bytes=40 << 30, host_memory_bytes=host))
    plan = make_plan(run, 8192)
    assert plan.fit.needed == plan.memory.start > plan.memory.total
    text = plan_text(plan, 8)
    assert_names(section_of(text, "Verdict"), format_bytes(plan.memory.start), format_bytes(host))
    memory = section_of(text, "Memory")
    assert_names(memory, format_bytes(plan.memory.start), format_bytes(plan.memory.start_host))
    assert_names(memory, format_bytes(8 * plan.memory.start_host))
    near = replace(GPU, memory_bytes=int(plan.memory.start / 0.95), host_memory_bytes=host)
    assert make_plan(start(*words, **options, device=near), 8192).fit.level == "tight"


def test_a_gpu_has_memory_that_no_tensor_holds() -> None:
    alone = estimate_memory(case(topology=Topology(1))).runtime
    assert 0 < alone < estimate_memory(case(topology=Topology(2))).runtime
    assert estimate_memory(case(topology=Topology(8, 2, 2))).runtime > estimate_memory(case()).runtime
    assert estimate_memory(case(on_cpu=True)).runtime == 0


def test_the_hours_follow_from_the_peak_of_a_known_gpu(start: Start) -> None:
    known = make_plan(start(device=replace(GPU, name="H100"), ranks=8), 99)
    assert known.hours == pytest.approx(known.total_flops / (8 * 989e12 * 0.4) / 3600)
    assert_names(section_of(plan_text(known, 8), "Verdict"), "8 x H100", "40%")
    assert make_plan(start(device=GPU), 99).hours is None
    unknown = make_plan(start(device=replace(GPU, name="L20")), 99)
    assert unknown.hours is None
    assert_names(section_of(plan_text(unknown, 8), "Verdict"), "L20")


def test_bubbles_and_recomputed_blocks_lower_an_assumed_rate_alone(start: Start) -> None:
    device = gpu_by_name("H100")
    plain, recomputed = (
        make_plan(start(f"train.checkpoint_activations_every={n}", device=device, ranks=8), 99) for n in (0, 1)
    )
    assert plain.hours
    assert recomputed.recomputed_flops_per_token > plain.recomputed_flops_per_token == 0
    more = recomputed.recomputed_flops_per_token / plain.flops_per_token
    assert recomputed.hours == pytest.approx(plain.hours * (1 + more))
    assert_names(section_of(plan_text(recomputed, 8), "Verdict"), "40%", f"{recomputed.mfu:.0%}")
    stated = replace(recomputed, rate=Rate(0.2, "--mfu"))
    assert stated.hours == pytest.approx(2 * plain.hours)
    flops = replace(recomputed, rate=Rate(0.1, "of a run", flops=1e12))
    assert flops.hours == pytest.approx(flops.total_flops / 8e12 / 3600)


def test_offload_takes_time(start: Start) -> None:
    """Without overlap a step lasts as long as its operations and what moves between GPU, CPU and disk."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    seconds = {}
    for name, section in (
        ("none", {"stage": 3}),
        ("optimizer", {"stage": 3, **offload}),
        ("parameters", {"stage": 3, **offload, "offload_param": {"device": "cpu"}}),
    ):
        plan = make_plan(start(device=gpu_by_name("H100"), ranks=8, zero_optimization=section), 99)
        assert plan.hours
        seconds[name] = 3600 * plan.hours / plan.resolved.config.train.steps
        assert seconds[name] == pytest.approx(seconds["none"] + plan.offload_seconds(plan.case.accumulation))
        assert ("offload" in section_of(plan_text(plan, 8), "Verdict")) == (name != "none")
    assert seconds["none"] < seconds["optimizer"] < seconds["parameters"]


def test_the_plan_opens_with_one_verdict_and_the_users_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*words: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["plan", "--gpu", "rtx-5090", "train.steps=100", "train.log_interval_steps=1", *words])
        assert left.value.code in (0, None)
        return capsys.readouterr().out

    text = plan("--mfu", "25%")
    (verdict,) = section_of(text, "Verdict").splitlines()
    assert_names(verdict, "fits", "32.0 GiB", "per parameter", "RTX 5090", "25%")
    own = section_of(text, "Configuration")
    assert_names(own, "train.steps", "train.log_interval_steps", "--all")
    assert "model.qk_norm" not in own
    assert "data.sequence_length" not in own
    assert_names(section_of(plan("--all"), "Configuration"), "train.steps", "model.qk_norm", "data.sequence_length")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--mfu", "40"], ["--mfu 40", "35%"]),
        (["--mfu", "nan"], ["--mfu nan"]),
        (["--mfu", "0.3", "--rate-of", "x"], ["--mfu", "--rate-of"]),
        (["--rate-of", "no-such-run"], ["no-such-run"]),
    ],
)
def test_a_rate_that_is_none_is_refused(words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", "--gpu", "H100", *words])
    assert left.value.code == 2
    assert_names(capsys.readouterr().err, *names)


def test_products_in_float8_take_half_of_the_time(start: Start) -> None:
    plain, rounded = (
        make_plan(start(f"precision.float8={on}", device=gpu_by_name("H100"), ranks=8), 99) for on in ("false", "true")
    )
    assert plain.hours
    assert rounded.hours
    matrices = sum(
        math.prod(size) for name, size in plain.shape.parameters().items() if "layers." in name and len(size) == 2
    )
    assert rounded.float8_share == pytest.approx(6 * matrices / plain.flops_per_token)
    assert rounded.hours / plain.hours == pytest.approx(1 - rounded.float8_share * (1 - 989 / 1979))


@pytest.mark.parametrize(
    ("options", "memory", "name"),
    [
        (["--gpu-memory", "80"], 80 * 2**30, None),
        (["--gpu-memory", "80GiB"], 80 * 2**30, None),
        (["--gpu-memory", "80GB"], 80 * 10**9, None),
        (["--gpu", "H100"], 80 * 2**30, "H100"),
        (["--gpu", "A100-40GB"], 40 * 2**30, "A100-40GB"),
        (["--gpu", "H100", "--gpu-memory", "40GB"], 40 * 10**9, "H100"),
        (["--gpu", "rtx4090"], 24 * 2**30, "RTX 4090"),
    ],
)
def test_sizes_and_models_of_gpus(
    options: list[str], memory: int, name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *options])
    text = capsys.readouterr().out
    assert_names(section_of(text, "Memory"), format_bytes(memory))
    assert (f"x {name}," in section_of(text, "Verdict")) == (name is not None)


@pytest.mark.parametrize(
    "options", [["--gpu", "H999"], ["--gpu-memory", "much"], ["--host-memory", "0"], ["--host-memory", "64"]]
)
def test_senseless_gpus_and_sizes_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *options])
    assert_names(capsys.readouterr().err, *options)
