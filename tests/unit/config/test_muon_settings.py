"""From a JSON's Muon to the optimizer of a run: DeepSpeed's keys, those of torch.optim.Muon, rates, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from config_cases import Write, notice_of, read_refused, refused, section_of

from megalm.cli.plan_text import plan_text
from megalm.config.deepspeed.json_reader import read_deepspeed_json
from megalm.config.deepspeed.translate import translate
from megalm.cost_model.memory import checkpoint_bytes
from megalm.planning.resolve import MuonFacts, OptimizerFacts, ResolvedRun, optimizer_facts
from megalm.planning.run_plan import make_plan
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def muon(**params: Any) -> dict[str, Any]:
    return {"type": "Muon", "params": params}


def test_as_deepspeed_spells_it(start: Start) -> None:
    """With the defaults that DeepSpeed gives Muon and the Adam beside it."""
    run = start(optimizer=muon(muon_lr=0.02, adam_lr=3e-4, momentum=0.9, weight_decay=0.01, ns_method="gram"))
    settings = MuonFacts(0.9, True, COEFFICIENTS, 5, "original")
    rates = (("muon", 0.02), ("adam", 3e-4))
    assert run.optimizer == OptimizerFacts("muon", (0.9, 0.95), 1e-10, 0.01, settings, rates)
    assert_names(notice_of(run, "optimizer.params.eps"), "1e-10")
    assert_names(notice_of(run, "ns_method"), 'optimizer.params.ns_method="gram"')
    assert "optimizer" not in run.deepspeed


def test_as_torch_spells_it(start: Start) -> None:
    params = {"momentum": 0.8, "nesterov": False, "ns_coefficients": [2, -1.5, 0.5], "ns_steps": 7}
    run = start(optimizer=muon(**params, adjust_lr_fn="match_rms_adamw", eps=1e-8, betas=[0.9, 0.98], weight_decay=0.1))
    settings = MuonFacts(0.8, False, (2.0, -1.5, 0.5), 7, "match_rms_adamw")
    assert run.optimizer == OptimizerFacts("muon", (0.9, 0.98), 1e-8, 0.1, settings)
    section = section_of(plan_text(make_plan(run, vocab_size=1024), 8), "DeepSpeed")
    assert_names(section, "muon", 0.8, 7, "match_rms_adamw", "adamw", 0.98)


def test_the_saved_section_is_the_same_optimizer(start: Start) -> None:
    for section in (muon(muon_lr=0.02, ns_steps=6), muon(lr=1e-3), {"type": "Adam"}):
        facts = start(optimizer=section).optimizer
        again, _ = optimizer_facts(start(optimizer=facts.as_json()).deepspeed_source)
        assert again == facts


@pytest.mark.parametrize(
    ("params", "peak", "scales"),
    [
        ({}, 3e-3, {"adam": 1.0, "muon": 1.0}),  # the preset's
        ({"lr": 1e-3}, 1e-3, {"adam": 1.0, "muon": 1.0}),
        ({"lr": 1e-3, "muon_lr": 2e-2}, 1e-3, {"adam": 1.0, "muon": 20.0}),
        ({"lr": 2e-2, "adam_lr": 1e-3}, 2e-2, {"adam": 0.05, "muon": 1.0}),
        ({"muon_lr": 6e-3}, 3e-3, {"adam": 1.0, "muon": 2.0}),
        ({"muon_lr": 2e-2, "adam_lr": 1e-3}, 2e-2, {"adam": 0.05, "muon": 1.0}),
    ],
)
def test_one_schedule_scales_both_rates(start: Start, params: Any, peak: float, scales: Any) -> None:
    """By parameters: the matrices of the blocks have Muon's rate, a rule's factor comes on top of it."""
    rule = "train.parameter_groups=[{match: '*.mlp.*', learning_rate_scale: 0.5}]"
    run = start(rule, "model.num_hidden_layers=2", "model.tie_word_embeddings=false", ranks=1, optimizer=muon(**params))
    assert run.schedule.peak_learning_rate == peak
    assert run.optimizer.rate_scales(peak) == pytest.approx(
        {(algorithm, hidden): scale for algorithm, scale in scales.items() for hidden in (False, True)}
    )
    plan = make_plan(run, vocab_size=1024)
    found = [(it.algorithm, it.match, it.tensors, it.learning_rate_scale) for it in plan.optimizer_groups]
    assert found == [
        ("adam", None, 2, pytest.approx(scales["adam"])),  # the tables
        ("muon", None, 8, pytest.approx(scales["muon"])),
        ("adam", None, 5, pytest.approx(scales["adam"])),  # norms
        ("muon", "*.mlp.*", 6, pytest.approx(scales["muon"] / 2)),
    ]


def test_a_momentum_buffer_is_half_of_adam_s_moments(start: Start) -> None:
    overrides = "model.num_hidden_layers=2", "model.tie_word_embeddings=false"
    plans = [make_plan(start(*overrides, ranks=1, **it), vocab_size=1024) for it in ({}, {"optimizer": muon()})]
    matrices = sum(group.parameters for group in plans[1].optimizer_groups if group.algorithm == "muon")
    assert plans[0].memory.moments - plans[1].memory.moments == pytest.approx(4 * matrices, abs=64)
    assert checkpoint_bytes(plans[0].shape) - checkpoint_bytes(plans[0].shape, muon=True) == 4 * matrices


def test_keys_without_effect_are_said(write_json: Write) -> None:
    both = read_deepspeed_json(write_json(optimizer=muon(lr=1, muon_lr=0.02, adam_lr=1e-3)))
    (notice,) = (it for it in both.notices if "optimizer.params.lr" in it)
    assert_names(notice, "optimizer.params.lr=1", "muon_lr", "adam_lr")
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    found = translate({"optimizer": muon(muon_lr=0.02), "scheduler": scheduler})
    assert found.settings.optimizer is not None
    assert found.settings.optimizer.params.muon_lr is None
    assert any("optimizer.params.muon_lr=0.02" in note for note in found.notices)


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ({"type": "AdamW", "params": {"momentum": 0.9}}, ["optimizer.params.momentum=0.9", '"Muon"']),
        ({"type": "Adam", "params": {"muon_lr": 0.02}}, ["optimizer.params.muon_lr=0.02", '"Muon"']),
        (muon(adam_w_mode=False), ["optimizer.params.adam_w_mode=false"]),
        (muon(ns_steps=0), ["optimizer.params.ns_steps=0"]),
        (muon(momentum=1.0), ["optimizer.params.momentum=1.0"]),
        (muon(adjust_lr_fn="none"), ['optimizer.params.adjust_lr_fn="none"', '"original"', '"match_rms_adamw"']),
        (muon(ns_coefficients=[1, 2]), ["optimizer.params.ns_coefficients=[1, 2]", 3]),
        (muon(nesterow=True), ["optimizer.params.nesterow=true", "nesterov"]),
    ],
)
def test_wrong_values_are_refused(write_json: Write, section: Any, names: list[object]) -> None:
    path = write_json(optimizer=section)
    assert_names(read_refused(path), path, *names)


def test_what_muon_cannot_be_combined_with(start: Start) -> None:
    both = {"muon_lr": 0.02, "adam_lr": 1e-3}
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for overrides, changes, names in (
        (("train.optimizer_state=8bit",), {}, ["train.optimizer_state=8bit", '"Muon"']),
        ((), {"zero_optimization": offload}, ["offload_optimizer", '"Muon"']),
        (
            ("schedule.peak_learning_rate=0.01",),
            {"optimizer": muon(**both)},
            ["optimizer.params.muon_lr=0.02", "schedule.peak_learning_rate=0.01"],
        ),
    ):
        message = refused(start, *overrides, **{"optimizer": muon(), **changes})
        assert_names(message, *names)
    start("schedule.peak_learning_rate=0.01", optimizer=muon(muon_lr=0.02))
    start(optimizer=muon(), zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}})
