"""Which grids of ranks are refused, what the refusals name, and the nearest ones that pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from config_cases import GPU, notice_of, refused

from megalm.config.loading import load_run_config
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.planning.parallel_checks import grid_notices
from megalm.planning.resolve import ResolvedRun
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
HEADS_12 = ("model.hidden_size=96", "model.num_attention_heads=12", "model.intermediate_size=192")


def zero(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **others}}


FP32: dict[str, Any] = {"bf16": None}
OVERLAP = "parallel.overlap_tensor_communication=true"
RING = "parallel.context_method=ring"
EXPERTS_6 = ("model.num_experts=6", "model.moe_intermediate_size=64")
SCHEDULE = "parallel.pipeline_schedule={}"
ZB_V = ["parallel.pipeline=2", "parallel.virtual_stages=2", SCHEDULE.format("zb_v")]
FLOAT8 = "precision.float8=true"
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
EMBEDDING_GROUP = "train.parameter_groups=[{match: embedding.*, learning_rate_scale: 0.1}]"  # the preset ties the head
UNTIED_GROUP = (EMBEDDING_GROUP, "model.tie_word_embeddings=false")


@pytest.mark.parametrize(
    ("ranks", "overrides", "changes", "names"),
    [
        (2, ["parallel.tensor=3"], {}, ["parallel.tensor=3", "parallel.pipeline=1", 2, 3]),
        (8, ["parallel.tensor=2", "parallel.pipeline=3"], zero(1), ["parallel.tensor=2", "parallel.pipeline=3", 8, 6]),
        (2, ["parallel.tensor=2"], {}, None),
        (8, ["parallel.tensor=8"], {}, ["parallel.tensor=8", "model.num_attention_heads=4", 8, 4]),
        (16, [*HEADS_12, "parallel.tensor=8"], {}, ["parallel.tensor=8", "model.num_attention_heads=12", 16, 4]),
        (48, [*HEADS_12, "parallel.tensor=8"], {"train_batch_size": 48}, ["parallel.tensor=8", 48, 6, 12]),
        (48, [*HEADS_12, "parallel.tensor=6"], {"train_batch_size": 48}, None),
        (
            4,
            [*HEADS_12[:2], "model.intermediate_size=190", "parallel.tensor=4"],
            {},
            ["parallel.tensor=4", "model.intermediate_size", 190, 4, 2],
        ),
        # The default size of the MLP counts as well: 8/3 x 96 rounded up to 64.
        (6, [*HEADS_12[:2], "parallel.tensor=6"], {"train_batch_size": 6}, ["model.intermediate_size", 256]),
        (
            6,
            [*HEADS_12, "model.num_key_value_heads=4", "parallel.tensor=6"],
            {"train_batch_size": 6},
            ["parallel.tensor=6", "model.num_key_value_heads=4", 6, 2],
        ),
        (4, ["model.num_key_value_heads=2", "parallel.tensor=4"], {}, None),
        (4, ["model.num_key_value_heads=1", "parallel.tensor=4"], {}, None),
        (2, ["parallel.sequence=true"], {}, ["parallel.sequence=true", "parallel.tensor=1", "parallel.tensor=2"]),
        (
            4,
            ["parallel.sequence=true", "parallel.tensor=4", "data.sequence_length=30"],
            {},
            ["parallel.sequence=true", "data.sequence_length=30", "parallel.tensor=4", 28, 32],
        ),
        (
            4,
            ["parallel.sequence=true", "parallel.tensor=4", "data.sequence_length=3"],
            {},
            ["parallel.sequence=true", "data.sequence_length=3", 4],
        ),
        (4, ["parallel.sequence=true", "parallel.tensor=4"], {}, None),
        (8, ["parallel.tensor=2", "parallel.context=3"], {}, ["parallel.tensor=2", "parallel.context=3", 8, 6, 12]),
        (8, ["parallel.context=8"], {}, ["parallel.context=8", "model.num_attention_heads=4", 8, "parallel.context=4"]),
        (
            8,
            ["parallel.context=4", "parallel.tensor=2"],
            {},
            ["parallel.tensor=2", "parallel.context=4", "model.num_attention_heads=4", 8, "parallel.context=2"],
        ),
        (
            6,
            [*HEADS_12, "model.num_key_value_heads=4", "parallel.context=6"],
            {"train_batch_size": 6},
            ["parallel.context=6", "model.num_key_value_heads=4", 6, "parallel.context=2"],
        ),
        (4, ["model.num_key_value_heads=1", "parallel.context=4"], {}, None),
        (8, ["parallel.context=8", RING], {}, None),
        (2, [RING], {}, [RING, "parallel.context=1", "parallel.context=2"]),
        (
            2,
            ["parallel.context=2", RING, "model.attention_dropout=0.1"],
            {},
            [RING, "model.attention_dropout=0.1", "all_to_all"],
        ),
        (2, ["parallel.context=2", "model.attention_dropout=0.1"], {}, None),
        (4, ["parallel.expert=2"], {}, ["parallel.expert=2", "model.num_experts"]),
        (4, [*EXPERTS_6, "parallel.expert=2", "parallel.pipeline=2", "parallel.virtual_stages=2"], zero(1), None),
        (8, [*EXPERTS_6, "parallel.expert=4"], {}, ["parallel.expert=4", "model.num_experts=6", 8, "parallel.expert"]),
        (8, [*EXPERTS_6, "parallel.expert=3"], {}, ["parallel.expert=3", 8, 2, 4]),
        (8, [*EXPERTS_6, "parallel.tensor=2", "parallel.expert=8"], {}, ["parallel.expert=8", 4]),
        (8, [*EXPERTS_6, "parallel.tensor=2", "parallel.context=2", "parallel.expert=2"], {}, None),
        (2, [*EXPERTS_6, "parallel.expert=2"], zero(0) | FP32, None),
        (2, [*EXPERTS_6, "parallel.expert=2", "parallel.pipeline=1"], zero(3), None),
        (
            2,
            [*EXPERTS_6, "parallel.expert=2"],
            zero(2, reduce_scatter=False),
            ["parallel.expert=2", "zero_optimization.reduce_scatter=false"],
        ),
        (
            2,
            [*EXPERTS_6, "parallel.expert=2"],
            zero(2, contiguous_gradients=False),
            ["parallel.expert=2", "zero_optimization.contiguous_gradients=false"],
        ),
        (
            4,
            [*EXPERTS_6, "parallel.expert=2"],
            zero(3, zero_hpz_partition_size=2),
            ["parallel.expert=2", "zero_optimization.zero_hpz_partition_size"],
        ),
        (
            2,
            ["parallel.context=2", RING, "data.sequence_length=30"],
            {},
            ["parallel.context=2", "context_method=ring", "data.sequence_length=30", 4, 28, 32],
        ),
        (4, ["model.num_key_value_heads=2", "parallel.context=2", "parallel.tensor=2"], {}, None),
        (
            4,
            ["parallel.context=4", "data.sequence_length=30"],
            {},
            ["parallel.context=4", "data.sequence_length=30", 4, 28, 32],
        ),
        (
            4,
            ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=30"],
            {},
            ["parallel.context=2", "parallel.tensor=2", "data.sequence_length=30", 4, 28, 32],
        ),
        (
            2,
            ["parallel.context=2", FLOAT8, "data.sequence_length=48"],
            {},
            [FLOAT8, "data.sequence_length=48", 24, 16],
        ),
        (2, [OVERLAP], {}, [OVERLAP, "parallel.tensor=1", "parallel.tensor=2"]),
        (4, [OVERLAP, "parallel.tensor=4"], {}, None),
        (8, ["parallel.pipeline=8"], zero(1), ["parallel.pipeline=8", "model.num_hidden_layers=4", 8, 4]),
        (
            6,
            ["parallel.pipeline=6"],
            zero(1) | {"train_batch_size": 6},
            ["parallel.pipeline=6", "model.num_hidden_layers=4", 6, 3],
        ),
        (4, ["parallel.pipeline=4"], zero(1), None),
        (2, ["parallel.pipeline=2"], zero(2), ["parallel.pipeline=2", "zero_optimization.stage=2", 1]),
        (2, ["parallel.pipeline=2"], zero(3), ["parallel.pipeline=2", "zero_optimization.stage=3", 1]),
        (2, ["parallel.pipeline=2"], zero(1), None),
        (2, ["parallel.pipeline=2"], zero(0) | FP32, None),
        (4, [*UNTIED_GROUP, "parallel.pipeline=4"], zero(1), None),  # stages with other groups
        (4, [*UNTIED_GROUP, "parallel.tensor=4"], zero(3), None),
        (2, ["parallel.pipeline=2"], zero(1, **CPU_OFFLOAD), ["parallel.pipeline=2", "offload_optimizer"]),
        (2, ["parallel.virtual_stages=2"], {}, ["parallel.virtual_stages=2", "parallel.pipeline=1"]),
        (1, [SCHEDULE.format("1f1b")], {}, [SCHEDULE.format("1f1b"), "parallel.pipeline=1"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_stages=2"], zero(1), None),
        (2, ZB_V, zero(1), None),
        (2, [*ZB_V, "compile=true"], zero(1), [SCHEDULE.format("zb_v"), "compile=false"]),
        (2, [*ZB_V, "train.mlp_chunk_tokens=64"], zero(1), [SCHEDULE.format("zb_v"), "train.mlp_chunk_tokens=64"]),
        (
            4,
            ["parallel.pipeline=4", "parallel.virtual_stages=2"],
            zero(1),
            [
                "parallel.pipeline=4",
                "parallel.virtual_stages=2",
                "model.num_hidden_layers=4",
                "parallel.virtual_stages=1",
            ],
        ),
        *(
            (
                2,
                ["parallel.pipeline=2", f"parallel.virtual_stages={virtual}", SCHEDULE.format(name)],
                zero(1) | {"train_batch_size": 16},
                [
                    SCHEDULE.format(name),
                    f"parallel.virtual_stages={virtual}",
                    f"parallel.virtual_stages={legal}",
                    other,
                ],
            )
            for name, virtual, legal, other in (
                ("1f1b", 2, 1, "interleaved_1f1b"),
                ("interleaved_1f1b", 1, 2, "=1f1b"),
                ("zb_v", 4, 2, "interleaved_1f1b"),
            )
        ),
    ],
)
def test_rules_of_the_grid(
    start: Start, ranks: int, overrides: list[str], changes: dict[str, Any], names: list[object] | None
) -> None:
    if names is None:
        run = start(*overrides, ranks=ranks, **changes)
        assert run.topology.world_size == ranks
    else:
        assert_names(refused(start, *overrides, ranks=ranks, **changes), *names)


@pytest.mark.parametrize(
    ("wanted", "section", "names"),
    [
        ("step", {"stage": 3}, ["train.reduce_gradients=step", "zero_optimization.stage=3", 2]),
        ("step", {"stage": 2, **CPU_OFFLOAD}, ["train.reduce_gradients=step", "offload_optimizer"]),
        ("step", {"stage": 2}, None),
        ("step", {"stage": 1}, None),
        ("micro_batch", {"stage": 1}, ["train.reduce_gradients=micro_batch", "zero_optimization.stage=1", 2]),
        ("micro_batch", {"stage": 2}, None),
        ("micro_batch", {"stage": 3}, None),
    ],
)
def test_how_often_gradients_can_be_reduced(
    start: Start, wanted: str, section: dict[str, Any], names: list[object] | None
) -> None:
    word = f"train.reduce_gradients={wanted}"
    if names is None:
        start(word, zero_optimization=section)
    else:
        assert_names(refused(start, word, zero_optimization=section), *names)


def test_the_nearest_degree_divides_the_ranks_too(start: Start) -> None:
    """12 heads divide by 3, 6 and 12 too, 16 ranks do not."""
    message = refused(start, *HEADS_12, "parallel.tensor=8", ranks=16)
    assert set(re.findall(r"(?<!=)\b\d+", message)) == {"16", "4"}


@pytest.mark.parametrize(
    ("degree", "per_node", "names"),
    [
        (8, 8, None),
        (2, 8, None),
        (1, 6, None),
        (16, 8, ["parallel.tensor=16", 8, "parallel.tensor=8", "parallel.pipeline=2"]),
        (4, 6, ["parallel.tensor=4", 6, "parallel.tensor=2", "parallel.pipeline=2"]),
    ],
)
def test_a_tensor_group_should_not_leave_its_node(degree: int, per_node: int, names: list[object] | None) -> None:
    notices = [*grid_notices(load_run_config(None, [f"parallel.tensor={degree}"]).config.parallel, 0, per_node)]
    assert len(notices) == (names is not None)
    if names is not None:
        assert_names(notices[0], *names)


def test_a_context_group_should_not_leave_its_node() -> None:
    parallel = load_run_config(None, ["parallel.tensor=2", "parallel.context=8"]).config.parallel
    assert not [*grid_notices(parallel, 0, 16)]
    (notice,) = grid_notices(parallel, 0, 8)
    assert_names(notice, "parallel.context=8", "parallel.tensor=2", 16, 8)


def test_a_batch_divides_over_data_ranks_alone(start: Start) -> None:
    run = start("parallel.context=2", "parallel.tensor=2", ranks=8, train_batch_size=8)
    assert (run.topology.data, run.batch.data_parallel, run.deepspeed["train_batch_size"]) == (2, 2, 8)


def test_the_notice_reaches_the_run(start: Start) -> None:
    wide = ("model.num_attention_heads=16", "parallel.tensor=16")
    apart = start(*wide, ranks=16, device=GPU, ranks_per_node=8)
    assert set(grid_notices(apart.config.parallel, 0, 8)) <= set(apart.notices)
    together = start(*wide, ranks=16, device=GPU, ranks_per_node=16)
    assert not any("parallel.tensor" in notice for notice in together.notices)


@pytest.mark.parametrize(
    ("gpu", "changes", "names"),
    [
        ("H100", {}, None),
        ("L40S", {}, None),
        ("RTX 4090", {}, None),
        ("A100", {}, [FLOAT8, 8.9, "A100"]),
        ("RTX 3090", {}, [FLOAT8, 8.9, "RTX 3090"]),
        ("H100", FP32, [FLOAT8, "bf16.enabled=true", "fp32"]),
    ],
)
def test_float8_needs_a_card_with_its_kernel(
    start: Start, gpu: str, changes: dict[str, Any], names: list[object] | None
) -> None:
    if names is None:
        assert not [notice for notice in start(FLOAT8, device=gpu_by_name(gpu)).notices if "float8" in notice]
    else:
        assert_names(refused(start, FLOAT8, device=gpu_by_name(gpu), **changes), *names)


@pytest.mark.parametrize(
    ("override", "name", "size"),
    [
        ("model.hidden_size=264", "model.hidden_size", 264),
        ("model.intermediate_size=712", "model.intermediate_size", 712),
        ("data.sequence_length=100", "data.sequence_length", 100),
        ("model.head_dim=4", "model.num_attention_heads", 8),
        ("model.intermediate_size=720", "model.intermediate_size", 360),
    ],
)
def test_float8_needs_multiples_of_16(start: Start, override: str, name: str, size: int) -> None:
    """On two ranks of a tensor group, each of which holds half of the heads and of the inner size."""
    parallel = ["parallel.tensor=2"] if size in (8, 360) else []
    assert_names(refused(start, FLOAT8, override, *parallel, ranks=2), FLOAT8, name, size, 16)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (
            ("train.recompute=mlp", "train.checkpoint_activations_every=2"),
            ["train.recompute=mlp", "train.checkpoint_activations_every=2"],
        ),
        (("train.recompute=norms", "compile=true"), ["train.recompute=norms", "compile=false"]),
        (("train.recompute=mlp", "compile=true"), ["train.recompute=mlp", "ZeRO 3", "train.recompute=full"]),
        (
            ("train.recompute=attention", "compile=true", "parallel.tensor=2"),
            ["train.recompute=attention", "train.recompute=full"],
        ),
    ],
)
def test_one_choice_of_recomputation(start: Start, keys: tuple[str, ...], names: list[object]) -> None:
    stage = {"zero_optimization": {"stage": 3 if "ZeRO 3" in names else 2}}
    assert_names(refused(start, *keys, **stage), *names)
    assert start(keys[0]).recompute == keys[0].partition("=")[2]


TILES = "train.mlp_chunk_tokens=512"


@pytest.mark.parametrize(
    ("keys", "stage", "names"),
    [
        (("train.recompute=mlp",), 2, ["train.recompute=mlp", TILES]),
        (("compile=true",), 3, [TILES, "ZeRO 3", "compile=false"]),
        (("compile=true", "parallel.tensor=2"), 2, [TILES, "compile=false"]),
    ],
)
def test_tiles_with_what_they_do_not_go(start: Start, keys: tuple[str, ...], stage: int, names: list[object]) -> None:
    assert_names(refused(start, TILES, *keys, zero_optimization={"stage": stage}), *names)
    start(TILES, "train.recompute=full", zero_optimization={"stage": 3})
    start(TILES, "train.recompute=attention", "compile=true", zero_optimization={"stage": 2})
    assert start(TILES, "train.recompute=auto", zero_optimization={"stage": 3}).recompute == "none"


def test_inputs_are_offloaded_where_blocks_are_recomputed_whole(start: Start) -> None:
    offload = "train.offload_activations=true"
    for kind in ("none", "attention", "auto"):
        assert_names(refused(start, offload, f"train.recompute={kind}"), offload, f"train.recompute={kind}")
    start(offload, "train.checkpoint_activations_every=2")
    run = start(offload, "train.recompute=full")
    assert_names(notice_of(run, "train.offload_activations"), "CPU")
    on_gpu = start(offload, "train.recompute=full", device=GPU)
    assert not [notice for notice in on_gpu.notices if "offload_activations" in notice]


def test_a_cpu_emulates_float8(start: Start) -> None:
    assert_names(notice_of(start(FLOAT8), "float8"), FLOAT8)


@pytest.mark.parametrize(
    ("wanted", "gpu", "tensor", "length", "micro_batch", "chunks"),
    [
        ("auto", None, 2, 4096, 2, 1),
        ("true", None, 2, 256, 1, 2),
        ("auto", "A100", 1, 4096, 2, 1),
        ("auto", "A100", 2, 4096, 2, 4),
        ("auto", "A100", 2, 4096, 8, 4),
        ("auto", "A100", 2, 4096, 1, 2),
        ("auto", "A100", 2, 2048, 1, 1),
        ("true", "A100", 2, 2048, 1, 2),
        ("false", "A100", 2, 4096, 2, 1),
    ],
)
def test_a_tensor_group_overlaps_on_a_gpu_with_enough_tokens(
    start: Start, wanted: str, gpu: str | None, tensor: int, length: int, micro_batch: int, chunks: int
) -> None:
    keys = f"parallel.overlap_tensor_communication={wanted}", f"parallel.tensor={tensor}"
    device = {} if gpu is None else {"device": gpu_by_name(gpu)}
    sizes = {"train_micro_batch_size_per_gpu": micro_batch, "train_batch_size": 64}
    run = start(*keys, f"data.sequence_length={length}", ranks=2, **sizes, **device)
    assert run.tensor_chunks == chunks


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
def test_low_precision_states_stay_on_the_device(start: Start, kind: str) -> None:
    word = f"train.optimizer_state={kind}"
    assert start(word, zero_optimization={"stage": 2}).config.train.optimizer_state == kind
    for device in ("cpu", "nvme"):
        offload = {"device": device, **({"nvme_path": "/tmp"} if device == "nvme" else {})}
        message = refused(start, word, zero_optimization={"stage": 3, "offload_optimizer": offload})
        assert_names(message, word, "offload_optimizer", "fp32")


HPZ = "zero_optimization.zero_hpz_partition_size=2"


@pytest.mark.parametrize(
    ("ranks", "keys", "changes", "names"),
    [
        (4, (), {"stage": 2}, ["zero_optimization.stage", 3]),
        (4, ("parallel.tensor=2",), {"stage": 3}, ["parallel.tensor=2"]),
        (3, (), {"stage": 3}, [3]),
        (4, (), {"stage": 3, "offload_param": {"device": "cpu"}}, ["offload_param"]),
        (6, ("parallel.tensor=2",), {"stage": 2}, ["parallel.tensor=2", "zero_optimization.stage", 3]),
    ],
)
def test_a_second_copy_is_shared_by_ranks_that_hold_the_same(
    start: Start, ranks: int, keys: tuple[str, ...], changes: dict[str, Any], names: list[object]
) -> None:
    batch = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 1}
    key = {"zero_hpz_partition_size": 2}
    assert_names(refused(start, *keys, ranks=ranks, zero_optimization={**changes, **key}, **batch), HPZ, *names)
    run = start(ranks=4, zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu"}, **key}, **batch)
    assert run.deepspeed["zero_optimization"]["zero_hpz_partition_size"] == 2
    start(*keys, ranks=ranks, zero_optimization={**changes, "zero_hpz_partition_size": 1}, **batch)


def test_a_second_copy_lies_within_a_node(start: Start) -> None:
    zero_3 = {"stage": 3, "zero_hpz_partition_size": 2}
    apart = start(ranks=6, ranks_per_node=3, train_batch_size=12, zero_optimization=zero_3)
    assert_names(notice_of(apart, "zero_hpz"), HPZ, 3)
    together = start(ranks=8, ranks_per_node=4, zero_optimization=zero_3)
    assert not [notice for notice in together.notices if "hpz" in notice]
