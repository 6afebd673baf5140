"""What a rank holds under each grid, and the grid as a person reads it, up to 4,096 ranks."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from config_cases import GPU, notice_of

from megalm.cli.plan_text import plan_text, ranks_text
from megalm.config.loading import load_run_config
from megalm.cost_model.memory import estimate_stages, shares
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_plan import make_plan
from megalm.topology import Topology
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
BIG = (
    "model.hidden_size=4096",
    "model.num_hidden_layers=48",
    "model.num_attention_heads=32",
    "model.num_key_value_heads=8",
    "data.sequence_length=2048",
    "data.document_mask=false",
    "train.checkpoint_activations_every=1",
)


def shape_of(*overrides: str) -> ModelConfig:
    sizes = ("model.hidden_size=48", "model.num_hidden_layers=6", "model.num_attention_heads=4")
    return build_model_config(load_run_config(None, [*sizes, *overrides]).config.model, 101, 32)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize(
    ("ranks", "owners"), [(1, None), (2, None), (3, None), (6, None), (2, (0, 1, 0, 1, 0, 1)), (3, (0, 1, 2, 2, 1, 0))]
)
def test_stages_together_hold_the_model_once(style: str, tied: str, ranks: int, owners: tuple[int, ...] | None) -> None:
    shape = shape_of(f"model.style={style}", f"model.tie_word_embeddings={tied}")
    held = [share.parameters() for share in shares(shape, Topology(ranks, pipeline=ranks), stage_ranks=owners)]
    table = "embedding.tokens.weight"
    if tied == "true" and table in held[-1] and ranks > 1:
        assert held[-1].pop(table) == held[0][table]  # the last stage's copy
    assert sum(len(each) for each in held) == len(shape.parameters())
    assert {name: size for each in held for name, size in each.items()} == shape.parameters()


def test_tensor_ranks_divide_what_is_sharded_and_nothing_else() -> None:
    shape = shape_of("model.style=gpt2", "model.tie_word_embeddings=false", "model.num_key_value_heads=2")
    (one,) = shares(shape, Topology(4, tensor=4))
    local = one.parameters()
    assert local["embedding.tokens.weight"] == (26, 48)  # 101 rows: the longest part
    assert local["embedding.positions.weight"] == (32, 48)
    assert local["layers.0.attention.query.weight"] == (12, 48)
    assert local["layers.0.attention.key.weight"] == (12, 48)  # one of two heads, on two ranks each
    assert local["layers.0.attention.key.bias"] == (12,)
    assert local["layers.0.attention.output.weight"] == (48, 12)
    assert local["layers.0.attention.output.bias"] == (48,)
    assert local["layers.0.mlp.up.bias"] == (48,)
    assert local["layers.0.mlp.down.weight"] == (48, 48)
    assert local["final_norm.weight"] == (48,)
    assert local["head.weight"] == (26, 48)


def grid(run: ResolvedRun, ranks_per_node: int = 8) -> str:
    return plan_text(make_plan(run, vocab_size=32_000), ranks_per_node)


def row_of(text: str, *first: str) -> list[str]:
    """The cells of the one row of a table that begins with these."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    (row,) = (row for row in rows if row[: len(first)] == list(first))
    return row


def line_of(text: str, label: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    return line


def test_64_ranks_are_shown(start: Start) -> None:
    overrides = (*BIG, "parallel.tensor=4", "parallel.pipeline=4")
    stage_1 = {"zero_optimization": {"stage": 1}, "train_batch_size": 128, "train_micro_batch_size_per_gpu": 1}
    text = grid(start(*overrides, ranks=64, device=GPU, **stage_1))
    assert_names(line_of(text, "64 ="), "pipeline 4", "data 4", "tensor 4")
    tensor = row_of(text, "tensor", "4", "16", "0-3", "60-63")
    data = row_of(text, "data", "4", "16", "0, 4 .. 12", "51, 55 .. 63")
    pipeline = row_of(text, "pipeline", "4", "16", "0, 16 .. 48", "15, 31 .. 63")
    assert tensor[5] != data[5] == pipeline[5], "tensor groups alone stay in a node"
    assert_names(line_of(text, "stage 3:"), "48-63", "6-7", 12, "head")
    assert "1 x 32 x 4" in text
    table = text[text.index("stages a rank") : text.index("(32 micro-batch")].splitlines()[2:]
    rows = [re.split("  +", line) for line in table]
    schedules = {tuple(row[:2]): row[2:] for row in rows}
    assert list(schedules) == [
        ("1f1b (this run)", "1"),
        ("interleaved_1f1b", "2"),
        ("zb_v (not compiled)", "2"),
        ("interleaved_1f1b", "4"),
    ]
    bubbles, waits, _, messages, fits = zip(*schedules.values(), strict=True)
    assert bubbles == ("8.6%", "4.5%", "1.5%", "2.3%")
    assert all(float(more.rstrip("%")) >= float(share.rstrip("%")) for share, more in zip(bubbles, waits, strict=True))
    assert messages == ("3", "7", "6", "15")
    assert set(fits) == {"fits"}
    percents = [float(share.rstrip("%")) for share in waits]
    del schedules["zb_v (not compiled)", "2"], percents[2]  # blocks on this GPU are compiled
    name, count = next(key for key, share in zip(schedules, percents, strict=True) if share <= min(percents) + 1)
    keys = f"parallel.pipeline_schedule={name}", f"parallel.virtual_stages={count}"
    assert_names(line_of(text, "recommended:"), *keys)
    memory = row_of(text[text.index("\nMemory") :], "part")
    assert memory[1:4] == ["stage 0", "stage 1", "stage 3, the fullest"], "1 and 2 hold the same; 3 the logits"


def test_4096_ranks_are_shown_shortly_and_at_once(start: Start) -> None:
    overrides = (*BIG, "parallel.tensor=8", "parallel.pipeline=16")
    stage_1 = {"zero_optimization": {"stage": 1}, "train_batch_size": 2048, "train_micro_batch_size_per_gpu": 1}
    begin = time.process_time()
    text = grid(start(*overrides, ranks=4096, device=GPU, **stage_1))
    assert time.process_time() - begin < 5
    section = text[text.index("\nRanks\n") : text.index("\nSchedules ")].strip()
    assert len(section.splitlines()) < 25
    assert max(map(len, section.splitlines())) < 160
    assert_names(line_of(section, "4096 ="), "pipeline 16", "data 32", "tensor 8")
    assert_names(line_of(section, "..."), 8)  # stages between the first and the last four
    assert_names(line_of(section, "stage 15:"), "3840-4095", "480-511")


def test_a_rank_keeps_what_its_schedule_leaves_in_flight(start: Start) -> None:
    """Of 2 ranks the first, with 4 equal blocks: 1, 2 and 8 micro-batches."""
    case = make_plan(start("parallel.pipeline=2", ranks=2, zero_optimization={"stage": 1}), vocab_size=512).case

    def activations(micro_batches: int) -> int:
        changed = replace(case, schedule_name=name, virtual_stages=count, accumulation=micro_batches)
        return next(estimate_stages(changed)).activations

    name, count = "1f1b", 1
    two = activations(2) - activations(1)  # two blocks, and what is sent
    assert two > 0
    assert activations(8) == activations(2)
    name, count = "interleaved_1f1b", 2
    one = activations(8) - activations(2)  # a stage more than the 4 of two micro-batches
    assert activations(2) - activations(1) == 2 * one > two
    name = "zb_v"  # 4 too; of two micro-batches one keeps only what gradients of weights need by then
    assert activations(1) < activations(2) < activations(8) == activations(32)


def test_a_grid_with_context_is_shown(start: Start) -> None:
    run = start("parallel.tensor=2", "parallel.context=2", ranks=8, device=GPU)
    text = grid(run, 4)
    assert_names(line_of(text, "8 ="), "data 2", "context 2", "tensor 2")
    context = row_of(text, "context", "2", "4", "0, 2", "5, 7")
    assert context[5] == row_of(text, "tensor", "2")[5] != row_of(text, "data", "2", "4", "0, 4")[5]
    without = grid(start("parallel.tensor=2", ranks=8, device=GPU), 4)
    assert not [line for line in without.splitlines() if line.startswith("context ")]


def test_a_group_that_leaves_its_node(start: Start) -> None:
    run = start("parallel.tensor=4", ranks=4, device=GPU, ranks_per_node=2)
    text = grid(run, 2)
    assert row_of(text, "tensor")[:4] == row_of(grid(run, 4), "tensor")[:4]
    assert row_of(text, "tensor") != row_of(grid(run, 4), "tensor")
    assert_names(notice_of(run, "parallel.tensor=4"), 2)
    assert notice_of(run, "parallel.tensor=4") in text


def test_a_plan_says_in_how_many_chunks_a_tensor_group_communicates(start: Start) -> None:
    keys = "parallel.tensor=4", "parallel.overlap_tensor_communication=true"
    (line,) = (line for line in grid(start(*keys, ranks=4), 4).splitlines() if "chunks" in line)
    assert_names(line, 2)
    assert "chunks" not in grid(start(keys[0], ranks=4), 4)


def test_memory_falls_with_every_degree(start: Start) -> None:
    """Sixteen bytes a parameter over the ranks that divide them, and activations over those that divide the work."""
    stage_1 = {"zero_optimization": {"stage": 1}, "train_batch_size": 32, "train_micro_batch_size_per_gpu": 1}

    def memory(*overrides: str) -> dict[str, int]:
        plan = make_plan(start(*BIG, *overrides, ranks=8, device=GPU, **stage_1), vocab_size=32_000)
        parts = plan.memory.parts()
        return {**parts, "work": parts["activations"] + parts["loss"]}  # of one moment, which another grid changes

    data, tensor, sequence = (
        memory(),
        memory("parallel.tensor=8"),
        memory("parallel.tensor=8", "parallel.sequence=true"),
    )
    pipeline, context = memory("parallel.pipeline=8"), memory("parallel.context=8")
    assert data["master"] / tensor["master"] == pytest.approx(1, rel=0.01)  # divided by 8 ranks either way
    assert data["weights"] / tensor["weights"] == pytest.approx(8, rel=0.01)
    assert data["weights"] / pipeline["weights"] == pytest.approx(8, rel=0.25)  # stages are not all equal
    assert tensor["work"] < data["work"]
    assert sequence["activations"] < 0.25 * tensor["activations"]
    assert context["master"] == data["master"]  # ZeRO divides over context groups too
    assert context["weights"] == data["weights"]
    assert context["activations"] < data["activations"] / 7  # of 8; attention's output is kept twice
    plan = make_plan(start(*BIG, ranks=8, device=GPU, **stage_1), vocab_size=32_000)
    assert math.isclose(data["master"], 4 * plan.parameter_count / 8, rel_tol=1e-4)


def test_ranks_are_shortened() -> None:
    assert [ranks_text(ranks) for ranks in ((3,), (0, 8), (4, 5, 6), (0, 8, 16, 24))] == [
        "3",
        "0, 8",
        "4-6",
        "0, 8 .. 24",
    ]
