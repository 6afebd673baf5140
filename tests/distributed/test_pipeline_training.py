"""A pipeline trains what one rank trains, with everything that passes through its stages on the way.

Losses and norms agree to 1e-5 relative and weights to 1e-5 of their norm, over 3 steps: a pipeline adds up the same
numbers in another order only where two stages share a weight and in the gradient norm. Dropout is on in some cases:
its masks are functions of step, micro-batch and layer, so they are the same on any layout with the same micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.cost_model.pipeline_balance import StageCosts
from megalm.engine.build import build_engine
from megalm.parity.state_comparison import TOLERANCES, Outcome, difference
from tests.distributed.parity import EPSILON, train_rows
from tests.distributed.training import Case, make_dataset, resolved, shape_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

BASE = ("model.num_hidden_layers=3", "model.intermediate_size=88", "train.loss_chunk_tokens=40")
GPT2 = (*BASE, "model.style=gpt2", "model.qk_norm=false", "model.tie_word_embeddings=true")
LLAMA = (*BASE, "model.num_key_value_heads=2", "model.tie_word_embeddings=false")
DROPOUT = ("model.dropout=0.1", "model.attention_dropout=0.1")
FLOAT8 = ("precision.float8=true", "model.intermediate_size=96", "data.sequence_length=32")
LONG = ("train.mlp_chunk_tokens=20", "train.offload_activations=true")
FOUR_LAYERS = ("model.num_hidden_layers=4",)
FIVE_LAYERS = ("model.num_hidden_layers=5",)  # in four stages, of which the third has two
EXPERTS = ("model.num_experts=4", "model.moe_intermediate_size=24", "model.num_shared_experts=1")


def frozen(*patterns: str) -> str:
    return f"train.parameter_groups=[{', '.join(f'{{match: {it!r}, frozen: true}}' for it in patterns)}]"


def _case(overrides: tuple[str, ...], micro_batch: int = 2, precision: str = "fp32", **settings: Any) -> Case:
    adam = {"params": {"betas": [0.9, 0.95], "eps": EPSILON, "weight_decay": 0.1}}  # as in the parity matrix, and why
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": micro_batch}
    common = {**sizes, "gradient_clipping": 0.5, "optimizer": adam}
    return Case("zero1.json", precision, overrides, common | settings)


PACKED = ("data.packing=best_fit",)  # a mixture, under a document mask, with padding
# Under a document mask targets are missing at random places: no two micro-batches have equally many.
CASES = {
    "gpt2 masked": _case((*GPT2, *PACKED)),
    "gpt2 dropout recomputed": _case((*GPT2, *DROPOUT, "train.checkpoint_activations_every=2", *LONG)),
    "llama masked recomputed": _case((*LLAMA, "data.document_mask=true", "train.recompute=norms")),
    "llama fewer micro-batches than stages": _case(LLAMA, micro_batch=8),
    "llama undecayed embeddings": _case((*LLAMA, "train.embedding_weight_decay=false"), gradient_clipping=0),
    "gpt2 zero0": _case(GPT2, zero_optimization={"stage": 0}),
    "gpt2 frozen first stage": _case(
        (*GPT2, "train.ema_decay=0.6", "data.document_mask=true", frozen("embedding.*", "layers.[01].*"))
    ),
    "gpt2 frozen first stage zero0": _case(
        (*GPT2, frozen("embedding.*", "layers.[01].*")), gradient_clipping=0, zero_optimization={"stage": 0}
    ),
    "gpt2 frozen first stage bf16": _case((*GPT2, frozen("embedding.*", "layers.[01].*")), precision="bf16"),
    "llama frozen last stage": _case(
        (*LLAMA, frozen("layers.[12].*", "final_norm.*", "head.*"), "train.checkpoint_activations_every=1")
    ),
    "llama group of one block": _case((*LLAMA, "train.parameter_groups=[{match: layers.2.*, weight_decay: 0.3}]")),
    "llama growing": _case(
        (
            *(*LLAMA, "data.document_mask=true"),
            "schedule.batch=[{from_step: 2, sequences: 12}, {from_step: 3, sequences: 4}]",
            "data.sequence_length=12",
            "data.stages=[{from_step: 2, sequence_length: 6}, {from_step: 3, sequence_length: 24}]",
        )
    ),
    "gpt2 fp16 summed in fp32": _case(GPT2, precision="fp16", data_types={"grad_accum_dtype": "fp32"}),
    "llama tied": _case((*LLAMA, "model.tie_word_embeddings=true"), precision="bf16"),
    "zb_v gpt2 zero0": _case(
        (*GPT2, *FIVE_LAYERS, *PACKED, *DROPOUT, "train.checkpoint_activations_every=2"),
        zero_optimization={"stage": 0},
    ),
    "zb_v gpt2 bf16": _case((*GPT2, *FOUR_LAYERS, "data.document_mask=true"), precision="bf16"),
    # A rounding in fp32 may become one in float8, so nothing is added up in another order: no clipping by a norm.
    "zb_v llama float8": _case((*LLAMA, *FOUR_LAYERS, *FLOAT8), gradient_clipping=0),
    "interleaved gpt2": _case((*GPT2, *FIVE_LAYERS, *PACKED, *DROPOUT, "train.checkpoint_activations_every=2", *LONG)),
    "interleaved llama frozen growing": _case(
        (
            *(*LLAMA, *FIVE_LAYERS, "data.document_mask=true", "train.ema_decay=0.6", "train.recompute=norms"),
            frozen("embedding.*", "layers.[02].*"),
            "schedule.batch=[{from_step: 2, sequences: 12}, {from_step: 3, sequences: 6}]",
        )
    ),
}
FOUR_RANKS = {
    "pp4 zb_v": _case((*GPT2, "model.num_hidden_layers=9", *DROPOUT, "train.recompute=attention")),
    "pp2 dp2 gpt2": _case((*GPT2, *DROPOUT, "data.document_mask=true")),
    "pp2 dp2 zb_v": _case((*LLAMA, *FIVE_LAYERS, *EXPERTS, "train.recompute=norms")),
    "pp2 dp2 bf16": _case(GPT2, precision="bf16"),
    "pp2 tp2 gpt2": _case((*GPT2, *PACKED)),
    "pp2 tp2 zb_v sequence": _case(
        (*LLAMA, *FIVE_LAYERS, "model.tie_word_embeddings=true", "train.recompute=mlp", frozen("*.key.*", "*.up.*"))
    ),
    "pp4 frozen": _case((*GPT2, *FOUR_LAYERS, frozen("embedding.*", "layers.[013].*", "final_norm.*"))),
    "pp2 tp2 frozen sequence": _case((*LLAMA, frozen("embedding.*", "layers.[01].*", "*.attention.key.*", "*.up.*"))),
    "pp2 tp2 zb_v zero0": _case((*GPT2, *FOUR_LAYERS), zero_optimization={"stage": 0}),
}
TENSOR = ("parallel.tensor=2",)
TWO_STAGES = ("parallel.pipeline=2", "parallel.virtual_stages=2")
ZB_V = "parallel.pipeline_schedule=zb_v"
LAYOUTS = {
    **dict.fromkeys(("interleaved gpt2", "interleaved llama frozen growing"), TWO_STAGES),
    **{name: (*TWO_STAGES, ZB_V) for name in (*CASES, *FOUR_RANKS) if "zb_v" in name},
    "pp2 dp2 zb_v": (*TWO_STAGES, ZB_V, "parallel.expert=2"),
    "pp4 zb_v": ("parallel.pipeline=4", "parallel.virtual_stages=2", ZB_V),
    "pp4 frozen": ("parallel.pipeline=4",),
    "pp2 tp2 frozen sequence": ("parallel.pipeline=2", *TENSOR, "parallel.sequence=true"),
    "pp2 tp2 gpt2": ("parallel.pipeline=2", *TENSOR),
    "pp2 tp2 zb_v sequence": (*TWO_STAGES, ZB_V, *TENSOR, "parallel.sequence=true"),
    "pp2 tp2 zb_v zero0": (*TWO_STAGES, ZB_V, *TENSOR),
}


def _on(case: Case, layout: tuple[str, ...]) -> Case:
    return Case(case.json, case.precision, (*case.overrides, *layout), case.settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_dataset(folder / "data", marked=True)
    return folder


def _results(place: Path, name: str, ranks: int, cases: dict[str, Case]) -> list[dict[str, Outcome]]:
    (place / name).mkdir()
    return run_ranks(ranks, train_rows, cases, place / "data", place / name)


@pytest.fixture(scope="module")
def one_rank(place: Path) -> dict[str, Outcome]:
    return _results(place, "one", 1, CASES | FOUR_RANKS)[0]


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> list[dict[str, Outcome]]:
    cases = {name: _on(case, LAYOUTS.get(name, ("parallel.pipeline=2",))) for name, case in CASES.items()}
    return _results(place, "two", 2, cases)


@pytest.fixture(scope="module")
def four_ranks(place: Path) -> list[dict[str, Outcome]]:
    cases = {name: _on(case, LAYOUTS.get(name, ("parallel.pipeline=2",))) for name, case in FOUR_RANKS.items()}
    return _results(place, "four", 4, cases)


def _assert_equal(ranks: list[dict[str, Outcome]], one_rank: dict[str, Outcome], name: str, case: Case) -> None:
    found = difference([rank[name] for rank in ranks], one_rank[name])
    assert not found.beyond(TOLERANCES[case.precision]), found


@pytest.mark.parametrize("name", list(CASES))
def test_two_stages_equal_one_rank(two_ranks: Any, one_rank: Any, name: str) -> None:
    _assert_equal(two_ranks, one_rank, name, CASES[name])


@pytest.mark.parametrize("name", list(FOUR_RANKS))
def test_four_ranks_equal_one_rank(four_ranks: Any, one_rank: Any, name: str) -> None:
    _assert_equal(four_ranks, one_rank, name, FOUR_RANKS[name])


def _blocks(comm: Any, device: torch.device, folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    (own := folder / f"rank-{comm.rank}").mkdir()
    for balance in ("parameters", "time"):
        run = resolved(
            _case((*LLAMA, *LARGE_HEAD, "parallel.pipeline=2", f"parallel.balance={balance}")), comm.size, own
        )

        def keep(blocks: tuple[int, ...], _: StageCosts, balance: str = balance) -> None:
            found[balance] = blocks

        build_engine(run, shape_of(run), device, comm, on_stages=keep)
    return found


# The head multiplies with each of its weights, the embedding only looks some up: as many parameters, far more time.
LARGE_HEAD = ("model.num_hidden_layers=6", "model.vocab_size=20011")


def test_stages_are_balanced_by_what_is_asked_for(tmp_path: Path) -> None:
    first, second = run_ranks(2, _blocks, tmp_path)
    assert first == second
    assert first["parameters"] == (3, 3)
    assert first["time"][0] > first["time"][1] >= 1
