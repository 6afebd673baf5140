"""Which grids of ranks are refused, in what words, and the nearest ones that pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from config_cases import GPU, refused

from megalm.config.loading import load_run_config
from megalm.planning.checks.parallel import parallel_notices
from megalm.planning.resolve import ResolvedRun

Start = Callable[..., ResolvedRun]
HEADS_12 = ("model.hidden_size=96", "model.num_attention_heads=12", "model.intermediate_size=192")


def zero(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **others}}


FP32: dict[str, Any] = {"bf16": None}
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("ranks", "overrides", "changes", "message"),
    [
        (2, ["parallel.tensor=3"], {}, "parallel.tensor=3 x parallel.pipeline=1 does not divide 2 ranks"),
        (8, ["parallel.tensor=2", "parallel.pipeline=3"], zero(1), "start a multiple of 6 ranks"),
        (2, ["parallel.tensor=2"], {}, None),
        (
            8,
            ["parallel.tensor=8"],
            {},
            "parallel.tensor=8 does not divide model.num_attention_heads=4; the nearest that does, on 8 ranks, is 4",
        ),
        # 3 divides the heads but no 16 ranks: it is not named.
        (16, [*HEADS_12, "parallel.tensor=8"], {}, "=12; the nearest that does, on 16 ranks, is 4"),
        (48, [*HEADS_12, "parallel.tensor=8"], {"train_batch_size": 48}, "on 48 ranks, is 6 or 12"),
        (48, [*HEADS_12, "parallel.tensor=6"], {"train_batch_size": 48}, None),
        (
            4,
            [*HEADS_12[:2], "model.intermediate_size=190", "parallel.tensor=4"],
            {},
            "(model.intermediate_size)=190; the nearest that does, on 4 ranks, is 2",
        ),
        # The default size of the MLP counts as well: 8/3 x 96 rounded up to 64.
        (6, [*HEADS_12[:2], "parallel.tensor=6"], {"train_batch_size": 6}, "(model.intermediate_size)=256"),
        (
            6,
            [*HEADS_12, "model.num_key_value_heads=4", "parallel.tensor=6"],
            {"train_batch_size": 6},
            "parallel.tensor=6 and model.num_key_value_heads=4: one must divide the other, so that each rank needs "
            "whole key/value heads; the nearest that does, on 6 ranks, is 2",
        ),
        (4, ["model.num_key_value_heads=2", "parallel.tensor=4"], {}, None),
        (4, ["model.num_key_value_heads=1", "parallel.tensor=4"], {}, None),
        (2, ["parallel.sequence=true"], {}, "parallel.tensor=1 has none; state parallel.tensor=2 or more"),
        (
            4,
            ["parallel.sequence=true", "parallel.tensor=4", "data.sequence_length=30"],
            {},
            "data.sequence_length=30 does not divide into parallel.tensor=4 slices; use 28 or 32",
        ),
        (4, ["parallel.sequence=true", "parallel.tensor=4", "data.sequence_length=3"], {}, "slices; use 4"),
        (4, ["parallel.sequence=true", "parallel.tensor=4"], {}, None),
        (
            8,
            ["parallel.pipeline=8"],
            zero(1),
            "parallel.pipeline=8 is more than model.num_hidden_layers=4: each stage holds a block at least; the "
            "nearest, on 8 ranks, is 4",
        ),
        (6, ["parallel.pipeline=6"], zero(1) | {"train_batch_size": 6}, "the nearest, on 6 ranks, is 3"),
        (4, ["parallel.pipeline=4"], zero(1), None),
        (2, ["parallel.pipeline=2"], zero(2), "parallel.pipeline=2 with zero_optimization.stage=2"),
        (2, ["parallel.pipeline=2"], zero(3), "keeps whole gradients over its micro-batches; use stage 1"),
        (2, ["parallel.pipeline=2"], zero(1), None),
        (2, ["parallel.pipeline=2"], zero(0) | FP32, "clips by a wrong gradient norm in DeepSpeed 0.19.8; use stage 1"),
        (2, ["parallel.pipeline=2"], zero(0) | FP32 | {"gradient_clipping": 0}, None),
        (2, ["parallel.pipeline=2"], zero(1, **CPU_OFFLOAD), "parallel.pipeline=2 with offload_optimizer"),
        (2, ["parallel.tensor=2"], zero(0), "stage=0 with bf16 trains wrongly"),
    ],
)
def test_rules_of_the_grid(
    start: Start, ranks: int, overrides: list[str], changes: dict[str, Any], message: str | None
) -> None:
    if message is None:
        run = start(*overrides, ranks=ranks, **changes)
        assert run.topology.world_size == ranks
    else:
        assert message in refused(start, *overrides, ranks=ranks, **changes)


@pytest.mark.parametrize(
    ("degree", "per_node", "words"),
    [
        (8, 8, None),
        (2, 8, None),
        (1, 6, None),
        (16, 8, "is more than the 8 ranks of a node"),
        (16, 8, "parallel.tensor=8 with parallel.pipeline=2 takes as many ranks"),
        (4, 6, "does not divide the 6 ranks of a node"),
        (4, 6, "parallel.tensor=2 with parallel.pipeline=2"),
    ],
)
def test_a_tensor_group_should_not_leave_its_node(degree: int, per_node: int, words: str | None) -> None:
    notices = parallel_notices(load_run_config(None, [f"parallel.tensor={degree}"]).config, per_node)
    assert len(notices) == (words is not None)
    assert words is None or words in notices[0]


def test_the_notice_reaches_the_run(start: Start) -> None:
    wide = ("model.num_attention_heads=16", "parallel.tensor=16")
    apart = start(*wide, ranks=16, device=GPU, ranks_per_node=8)
    assert any("is more than the 8 ranks of a node" in notice for notice in apart.notices)
    together = start(*wide, ranks=16, device=GPU, ranks_per_node=16)
    assert not any("of a node" in notice for notice in together.notices)


def test_a_pipeline_does_not_tie_weights_whose_gradients_it_would_not_add_up(start: Start) -> None:
    fp16: dict[str, Any] = {"bf16": None, "fp16": {"enabled": True}, **zero(1)}
    apart = fp16 | {"data_types": {"grad_accum_dtype": "fp32"}}
    tied, untied = "model.tie_word_embeddings=true", "model.tie_word_embeddings=false"
    message = refused(start, "parallel.pipeline=2", tied, device=GPU, **apart)
    assert "trains tied embeddings wrongly in DeepSpeed 0.19.8; remove grad_accum_dtype" in message
    start("parallel.pipeline=2", tied, device=GPU, **fp16)
    start("parallel.pipeline=2", untied, device=GPU, **apart)
    start(tied, device=GPU, **apart)
