"""A JSON's scheduler: the same rate at every step as DeepSpeed's own class, or one clear refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import notice_of, refused
from deepspeed.runtime import lr_schedules

from megalm.config.deepspeed.json_reader import read_deepspeed_json
from megalm.config.deepspeed.scheduler import translate_scheduler
from megalm.config.deepspeed.translate import translate
from megalm.config.loading import config_to_yaml, load_run_config
from megalm.planning.lr_schedule import ScheduleSegment, learning_rate
from megalm.planning.resolve import ResolvedRun, schedule_facts
from megalm.planning.run_plan import make_plan, points
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]

P = "scheduler.params"
LR = 3e-4  # of the optimizer
STEPS = 60
SHAPES: list[dict[str, Any]] = [{}, {"warmup_type": "linear"}, {"warmup_type": "log"}, {"warmup_type": "cubic"}]
RATES: list[dict[str, Any]] = [
    {},
    {"warmup_min_lr": 0, "warmup_max_lr": 1e-3},
    {"warmup_min_lr": 1e-5, "warmup_max_lr": 2e-4},
    {"warmup_min_lr": 3e-5, "warmup_max_lr": 3e-5},
]
RATIOS: list[dict[str, Any]] = [{}, {"warmup_min_ratio": 0.03, "cos_min_ratio": 0.1}, {"cos_min_ratio": 0}]
WARMUPS = [1, 2, 3, 10, 59, 200]
TOTALS = [1, 2, 10, 40, STEPS, STEPS + 2, 1000]

WARMUP_LR = [{**rates, **shape, "warmup_num_steps": n} for rates in RATES for shape in SHAPES for n in WARMUPS]
CASES = (
    [("WarmupLR", params) for params in [{}, *WARMUP_LR]]
    + [("WarmupDecayLR", {**params, "total_num_steps": total}) for params in WARMUP_LR for total in TOTALS]
    + [
        ("WarmupCosineLR", {**ratios, **shape, "warmup_num_steps": warmup, "total_num_steps": total})
        for ratios in RATIOS
        for shape in SHAPES
        for warmup in WARMUPS
        for total in TOTALS
    ]
)


def deepspeed_rates(kind: str, params: dict[str, Any], steps: int = STEPS) -> list[float]:
    """The rate in force at each optimizer step: DeepSpeed's engine steps its scheduler after the optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def scheduled(start: Start, kind: str, params: dict[str, Any], *words: str, lr: Any = LR) -> ResolvedRun:
    optimizer = {"type": "AdamW", "params": {} if lr is None else {"lr": lr}}
    words = (f"train.steps={STEPS}", *words)
    return start(*words, optimizer=optimizer, scheduler={"type": kind, "params": params})


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_every_step_has_the_rate_of_deepspeed_s_own_class(tmp_path: Path, name: str) -> None:
    compared = 0
    loaded = load_run_config(None, [f"train.steps={STEPS}"])
    path = tmp_path / "ds.json"
    optimizer = {"type": "AdamW", "params": {"lr": LR}}
    for kind, params in CASES:
        if kind != name:
            continue
        path.write_text(json.dumps({"optimizer": optimizer, "scheduler": {"type": kind, "params": params}}))
        ds = read_deepspeed_json(path)
        schedule, _ = schedule_facts(loaded.with_implied(ds.run_settings, ds.path), ds)
        rates = [learning_rate(schedule, step) for step in range(1, STEPS + 1)]
        assert rates == pytest.approx(deepspeed_rates(kind, params), rel=1e-12, abs=0), params
        compared += 1
    assert compared >= 90


def test_a_warm_up_of_no_steps_is_the_shortest_one(start: Start) -> None:
    """DeepSpeed 0.19.8 refuses 0; earlier versions take two steps, as all do for 1."""
    run = scheduled(start, "WarmupLR", {"warmup_num_steps": 0})
    rates = [learning_rate(run.schedule, step) for step in range(1, STEPS + 1)]
    assert rates == pytest.approx(deepspeed_rates("WarmupLR", {"warmup_num_steps": 1}), rel=1e-12, abs=0)
    assert_names(notice_of(run, f"{P}.warmup_num_steps=0"), 2)


def test_the_scheduler_s_peak_goes_before_the_optimizer_s_rate(start: Start) -> None:
    run = scheduled(start, "WarmupLR", {"warmup_max_lr": 0.002, "warmup_num_steps": 4})
    assert run.schedule.peak_learning_rate == 0.002
    assert_names(notice_of(run, "the scheduler sets"), f"optimizer.params.lr={LR:g}")
    # Left out, WarmupDecayLR has a peak of its own, and the others the optimizer's rate.
    own = scheduled(start, "WarmupDecayLR", {"warmup_num_steps": 4, "total_num_steps": 50})
    assert own.schedule.peak_learning_rate == 0.001
    assert_names(notice_of(own, f"{P}.warmup_max_lr"), 0.001, "optimizer.params.lr")
    assert scheduled(start, "WarmupLR", {}).schedule.peak_learning_rate == LR
    assert scheduled(start, "WarmupLR", {}, lr=None).schedule.peak_learning_rate == 3e-3  # the preset's


def test_auto_leaves_the_run_configuration_s_schedule(start: Start) -> None:
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    words = ("schedule.warmup_steps=7", "schedule.final_learning_rate=2e-5", "schedule.peak_learning_rate=4e-4")
    run = scheduled(start, "WarmupDecayLR", dict.fromkeys(names, "auto"), *words, lr=None)
    asked = {"warmup_num_steps": 7, "total_num_steps": STEPS, "warmup_max_lr": 4e-4}
    assert run.schedule.final_learning_rate == 2e-5
    assert [learning_rate(run.schedule, step) for step in range(1, 9)] == pytest.approx(
        deepspeed_rates("WarmupDecayLR", asked, 8), rel=1e-12, abs=0
    )
    for name, key in zip(
        names,
        ("schedule.final_learning_rate", "optimizer.params.lr", "schedule.warmup_steps", "train.steps"),
        strict=True,
    ):
        assert_names(notice_of(run, f"{P}.{name} "), key)
    for steps in (0, 1):  # of the run configuration: DeepSpeed's shortest warm-up
        run = scheduled(start, "WarmupLR", {"warmup_num_steps": "auto"}, f"schedule.warmup_steps={steps}")
        assert [learning_rate(run.schedule, step) for step in range(1, 5)] == pytest.approx(
            deepspeed_rates("WarmupLR", {"warmup_num_steps": 1}, 4), rel=1e-12, abs=0
        )
    # A preset's warm-up still fits a short run; nothing but the kind is translated.
    short = start("train.steps=20", scheduler={"type": "WarmupLR", "params": dict.fromkeys(names[:3], "auto")})
    assert (short.schedule.kind, short.schedule.warmup_steps) == ("constant", 2)


def test_a_decay_that_ends_elsewhere_than_the_run_is_reported(start: Start) -> None:
    early = scheduled(start, "WarmupDecayLR", {"warmup_num_steps": 4, "total_num_steps": 40})
    assert_names(notice_of(early, "before train.steps"), "schedule.decay_end_step=40", f"train.steps={STEPS}", 42)
    late = scheduled(start, "WarmupCosineLR", {"warmup_num_steps": 4, "total_num_steps": 4000})
    assert_names(notice_of(late, "ends before"), "schedule.decay_end_step=4000", f"train.steps={STEPS}")
    cut = scheduled(start, "WarmupLR", {"warmup_num_steps": 1000})
    assert_names(notice_of(cut, "ends within"), f"train.steps={STEPS}", 1000)
    assert cut.config.schedule.warmup_steps == 1000, "as in DeepSpeed, nothing is shortened"


def test_both_files_may_state_one_schedule_only_once(start: Start) -> None:
    params = {"warmup_num_steps": 5, "total_num_steps": 50}
    for word, shown in (
        ("schedule.kind=wsd", 'schedule.kind="wsd"'),
        ("schedule.warmup_steps=6", "schedule.warmup_steps=6"),
        ("schedule.final_ratio=0.5", "schedule.final_ratio=0.5"),
    ):
        said = refused(scheduled, start, "WarmupDecayLR", params, word)
        assert_names(said, "ds.json", shown, "command line")
    scheduled(start, "WarmupDecayLR", params, "schedule.kind=linear", "schedule.warmup_steps=5")  # the same


def test_the_saved_configuration_starts_the_same_run(start: Start, tmp_path: Path) -> None:
    """A preset with a final rate and a decay of its own, under each scheduler."""
    mine = tmp_path / "mine.yaml"
    for kind, params in (
        ("WarmupLR", {"warmup_num_steps": 1000, "warmup_max_lr": LR}),
        ("WarmupDecayLR", {"warmup_num_steps": 5, "warmup_max_lr": 2e-4, "total_num_steps": 40}),
        ("WarmupCosineLR", {"total_num_steps": 50, "warmup_num_steps": "auto"}),
    ):
        section = {"type": kind, "params": params}
        optimizer = {"type": "AdamW", "params": {"lr": LR}} if kind == "WarmupDecayLR" else None
        run = start("train.steps=60", scheduler=section, optimizer=optimizer)
        mine.write_text(config_to_yaml(run.config))
        again = start(config=str(mine), scheduler=section, optimizer=optimizer)
        assert again.schedule == run.schedule
        alone = start(config=str(mine), scheduler=None, optimizer=None)
        assert alone.schedule == run.schedule, "the YAML alone says it all"
        assert "scheduler" not in run.deepspeed


def test_every_turn_of_it_is_drawn_and_named(start: Start) -> None:
    params = {"warmup_num_steps": 7, "total_num_steps": 90_000, "warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3}
    run = start("train.steps=100001", scheduler={"type": "WarmupDecayLR", "params": params})
    plan = make_plan(run, vocab_size=100)
    assert {1, 9, 90_002, 100_001} <= set(points(plan.schedules)[0])
    assert dict(plan.learning_rates)[9] == pytest.approx(1e-3)
    text = str(ScheduleSegment(1, 0, run.schedule))
    assert_names(text, "linear", 0.001, "1e-05", "90,002", 7, "DeepSpeed's")


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (
            {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "decay_step_size": 5}},
            ["OneCycle", "cycle_min_lr=0.0001", "cycle_max_lr=0.001", "decay_step_size=5", "schedule.warmup_steps"],
        ),
        ({"type": "LRRangeTest"}, ["LRRangeTest"]),
        ({"type": "WarmupLr"}, ["WarmupLr", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]),
        ({"type": 3}, ["scheduler.type=3", "WarmupLR"]),
        ({"type": "WarmupLR", "params": [1]}, ["scheduler.params", "WarmupLR"]),
        ({"type": "WarmupLR", "kind": 1}, ["scheduler.kind"]),
        (
            {"type": "WarmupLR", "params": {"warmup_num_step": 5, "warmup_max_lr": "1e-3", "total_num_steps": 9}},
            [
                f"{P}.warmup_num_step=5",
                "'warmup_num_steps'",
                f'{P}.warmup_max_lr="1e-3"',
                f"{P}.total_num_steps=9",
            ],
        ),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0}}, [f"{P}.warmup_max_lr=0", 0]),
        ({"type": "WarmupLR", "params": {"warmup_min_lr": [0, 0]}}, [f"{P}.warmup_min_lr=[0, 0]"]),
        (
            {"type": "WarmupLR", "params": {"warmup_min_lr": 1, "warmup_max_lr": 0.5}},
            [f"{P}.warmup_min_lr=1", 0.5],
        ),
        ({"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0.5}}, [f"{P}.warmup_min_lr=0.5", 0.001]),
        (
            {"type": "WarmupLR", "params": {"last_batch_iteration": 7}},
            [f"{P}.last_batch_iteration=7", "-1"],
        ),
        (
            {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 2, "warmup_num_steps": 1.5}},
            [f"{P}.cos_min_ratio=2", f"{P}.warmup_num_steps=1.5"],
        ),
    ],
)
def test_what_has_no_equal_is_refused_in_one_line(start: Start, section: dict[str, Any], names: list[object]) -> None:
    found = translate_scheduler(section)
    assert not found.settings
    assert_names("; ".join(found.problems), *names)
    assert_names(refused(start, scheduler=section), *names)


def test_comments_are_no_parameters() -> None:
    section = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    commented = {"type": "WarmupLR", "//": "ours", "params": {"warmup_num_steps": 5, "_comment": "short"}}
    assert translate({"scheduler": commented}).run_settings == translate_scheduler(section).settings


def test_numbers_that_no_float_holds_are_refused() -> None:
    for value in (10**400, float("nan"), float("inf"), True, "5"):
        found = translate_scheduler({"type": "WarmupLR", "params": {"warmup_num_steps": value, "warmup_max_lr": value}})
        assert len(found.problems) == 2
        assert not found.settings


def test_a_section_without_a_type_asks_nothing(start: Start) -> None:
    plain = start().schedule
    for section in ({}, {"params": {"warmup_num_steps": 5}}, {"type": None}, {"type": "auto"}, {"_comment": "later"}):
        assert start(scheduler=section).schedule == plain
    assert not translate_scheduler({}).notes
