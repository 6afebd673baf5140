"""model.mup_base_width in a run: the rates of the optimizer's groups, what a plan shows, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from config_cases import refused, section_of

from megalm.cli.plan_text import plan_text
from megalm.config.schema import RunConfig
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_plan import make_plan
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
SIZES = ("model.hidden_size=256", "model.num_hidden_layers=2", "model.tie_word_embeddings=false")
MUON = {"type": "Muon", "params": {"muon_lr": 2e-2, "lr": 1e-3}}


def groups_of(run: ResolvedRun) -> list[tuple[object, ...]]:
    plan = make_plan(run, vocab_size=1024)
    return [(it.algorithm, it.match, it.hidden, it.tensors, it.learning_rate_scale) for it in plan.optimizer_groups]


def test_matrices_of_blocks_learn_at_the_rate_by_the_width(start: Start) -> None:
    """A rule's factor comes on top."""
    rule = "train.parameter_groups=[{match: '*.mlp.*', learning_rate_scale: 0.5}]"
    assert groups_of(start("model.mup_base_width=64", rule, *SIZES, ranks=1)) == [
        ("adam", None, False, 2, 1.0),  # the tables
        ("adam", None, True, 8, 0.25),
        ("adam", None, False, 5, 1.0),  # norms
        ("adam", "*.mlp.*", True, 6, 0.125),
    ]


@pytest.mark.parametrize(("adjust", "scale"), [("original", 20.0), ("match_rms_adamw", 10.0)])
def test_muon_s_matrices_learn_by_their_length(start: Start, adjust: str, scale: float) -> None:
    """An orthogonal matrix needs no other rate; the factor of `match_rms_adamw` grows with the root of the width."""
    optimizer: dict[str, Any] = {**MUON, "params": {**MUON["params"], "adjust_lr_fn": adjust}}
    assert groups_of(start("model.mup_base_width=64", *SIZES, ranks=1, optimizer=optimizer)) == [
        ("adam", None, False, 2, 1.0),
        ("muon", None, True, 14, scale),
        ("adam", None, False, 5, 1.0),
    ]


def test_a_plan_shows_the_rates(start: Start) -> None:
    plan = make_plan(start("model.mup_base_width=64", *SIZES, ranks=1), vocab_size=1024)
    section = section_of(plan_text(plan, 8), "Parameter groups")
    assert_names(section, "matrices of blocks", 0.25, "model.mup_base_width=64", 64)
    without = plan_text(make_plan(start(*SIZES, ranks=1), vocab_size=1024), 8)
    assert "Parameter groups" not in without
    assert RunConfig().model.mup_base_width is None


def test_one_attention_scale(start: Start) -> None:
    start("model.attention_scale=0.1")
    start("model.mup_base_width=64")
    message = refused(start, "model.attention_scale=0.1", "model.mup_base_width=64")
    assert_names(message, "model.attention_scale", 0.1, "model.mup_base_width", 64)
