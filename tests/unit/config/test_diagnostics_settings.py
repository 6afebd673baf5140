"""Sections of a JSON that megalm serves by its own means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from config_cases import notice_of, refused

from megalm.planning.diagnostics import Diagnostics
from megalm.planning.resolve import ResolvedRun
from tests.messages import assert_names

Start = Callable[..., ResolvedRun]


def test_sections_that_are_off_ask_for_nothing(start: Start) -> None:
    off = start(flops_profiler={"enabled": False, "profile_step": 7}, comms_logger={"enabled": False, "prof_all": True})
    assert off.diagnostics == start().diagnostics == Diagnostics()
    assert off.notices == start().notices


def test_each_section_is_served(start: Start) -> None:
    profiler = {"enabled": True, "profile_step": 30, "module_depth": -1, "top_modules": 3, "output_file": "/tmp/x"}
    run = start(flops_profiler=profiler, comms_logger={"enabled": True, "prof_ops": ["all_reduce"]})
    assert run.diagnostics == Diagnostics(profile_steps=range(30, 31), count_traffic=True)
    assert_names(
        notice_of(run, "flops_profiler."), "flops_profiler.output_file", "flops_profiler.top_modules", "profile/"
    )
    assert_names(notice_of(run, "comms_logger."), "comms_logger.prof_ops")
    assert not {"flops_profiler", "comms_logger"} & run.deepspeed.keys()
    timed = start(wall_clock_breakdown=True, dump_state=True)
    assert timed.diagnostics == Diagnostics(phase_times=True)
    assert "wall_clock_breakdown" not in timed.deepspeed
    assert_names(notice_of(timed, "wall_clock_breakdown"), "forward_seconds", "metrics.jsonl")
    assert_names(notice_of(timed, "dump_state"), "deepspeed.resolved.json")


@pytest.mark.parametrize(
    ("throughput", "given"),
    [
        ({}, {"enabled": False}),
        ({"synchronized": False}, {"enabled": False, "synchronized": False}),
        ({"enabled": False}, {"enabled": False}),
        ({"enabled": True}, {"enabled": True}),
    ],
)
def test_the_throughput_timer_is_off_unless_the_json_turns_it_on(
    start: Start, throughput: dict[str, bool], given: dict[str, bool]
) -> None:
    """On a GPU it waits for the device twice a micro-batch, and DeepSpeed has it on by default."""
    run = start(timers={"throughput": throughput})
    assert run.deepspeed["timers"] == {"throughput": given}
    assert start().deepspeed["timers"] == {"throughput": {"enabled": False}}
    notices = [notice for notice in run.notices if "timers.throughput.enabled" in notice]
    assert len(notices) == given["enabled"]
    for notice in notices:
        assert_names(notice, "timers.throughput.enabled=true", "tokens_per_second")


@pytest.mark.parametrize(("stated", "step"), [({}, 1), ({"profile_step": 0}, 1), ({"profile_step": 50}, 50)])
def test_the_profiled_step(start: Start, stated: dict[str, int], step: int) -> None:
    run = start(flops_profiler={"enabled": True, **stated})
    assert run.diagnostics.profile_steps == range(step, step + 1)
    own = start("profile.steps=9", "train.count_traffic=true", flops_profiler={"enabled": True, **stated})
    assert own.diagnostics == Diagnostics(range(9, 10), count_traffic=True)


def test_a_range_of_steps(start: Start) -> None:
    run = start("profile.steps=10:13")
    assert run.diagnostics.profile_steps == range(10, 14)
    assert_names(notice_of(run, "profile/"), 10, 13)
    assert_names(notice_of(start("train.steps=20", "profile.steps=50:60"), "profile"), 50, "train.steps=20")
    for wrong in ("13:10", "0", "0:3", "3:", "-1", "a", "1:2:3"):
        assert_names(refused(start, f"profile.steps={wrong}"), "profile.steps", "10:13")
    assert_names(refused(start, "profile.steps=10:110"), "profile.steps", 100)
    assert start("profile.steps=10:109").diagnostics.profile_steps == range(10, 110)
    assert_names(refused(start, "train.profile_step=9"), "train.profile_step", "profile.steps")


def test_their_keys_are_checked(start: Start) -> None:
    assert_names(refused(start, flops_profiler={"enabled": True, "profile_stp": 3}), "flops_profiler.profile_stp")
    assert_names(refused(start, comms_logger={"enabled": "perhaps"}), 'comms_logger.enabled="perhaps"')
