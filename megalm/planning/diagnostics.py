"""The measurements that a run asks for: a profile of some steps, the traffic between ranks, the time of each phase."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megalm.config.deepspeed.json_reader import DeepSpeedConfig
from megalm.config.schema import RunConfig
from megalm.errors import ConfigError

# Of a DeepSpeed JSON.
MEASURING_SECTIONS = frozenset(
    ("flops_profiler", "comms_logger", "wall_clock_breakdown", "timers", "dump_state", "memory_breakdown")
)
MOST_PROFILED_STEPS = 100  # the profiler holds them in memory
TRAFFIC_STEPS = 10  # traffic is the same in every step, so a few suffice


@dataclass(frozen=True)
class Diagnostics:
    """The measurements of a run; by default none.

    Attributes:
        profile_steps: these steps run under torch's profiler.
        profile_operators: the profile lists operators, not only phases, FLOPs and traffic.
        count_traffic: bytes and calls of collectives over the first `TRAFFIC_STEPS` steps of an attempt.
        phase_times: seconds of forward, backward and update in each row of metrics.jsonl.
    """

    profile_steps: range | None = None
    profile_operators: bool = True
    count_traffic: bool = False
    phase_times: bool = False


def wanted_diagnostics(config: RunConfig, ds: DeepSpeedConfig) -> tuple[Diagnostics, list[str]]:
    """The measurements that both files ask for, and a notice for each key with another effect than in DeepSpeed."""
    settings, profiler = ds.settings, ds.settings.flops_profiler
    train, steps, notices = config.train, profiled_steps(config.profile.steps), []
    if steps is None and profiler.enabled:
        steps = profiled_steps(max(1, profiler.profile_step))
    if steps is not None and steps.start > train.steps:
        notices.append(f"no profile is written: step {steps.start} is behind train.steps={train.steps}")
    elif steps is not None:
        notices.append(f"{name_steps(steps)} profiled, to profile/ of the run folder")
    if profiler.enabled:
        notices += _without_effect(
            ds,
            "flops_profiler",
            ("output_file", "module_depth", "top_modules", "recompute_fwd_factor"),
            "the profile lists operators in profile/ of the run folder",
        )
    counts = train.count_traffic or settings.comms_logger.enabled
    if counts:
        notices.append(
            f"traffic between ranks is counted in the first {TRAFFIC_STEPS} steps: event traffic of metrics.jsonl"
        )
    if settings.comms_logger.enabled:
        options = ("verbose", "debug", "prof_all", "prof_ops")
        notices += _without_effect(ds, "comms_logger", options, "every collective is counted, none is printed")
    if settings.wall_clock_breakdown:
        notices.append(
            "wall_clock_breakdown: forward_seconds, backward_seconds and update_seconds are in metrics.jsonl; on a GPU "
            "timing waits for the device, which slows training"
        )
    if "timers.throughput.enabled" in ds.explicit_keys and settings.timers.throughput.enabled:
        notices.append(
            "timers.throughput.enabled=true: on a GPU DeepSpeed waits for the device twice a micro-batch, and prints "
            "nothing; tokens_per_second is in metrics.jsonl at every step"
        )
    if settings.dump_state:
        notices.append(
            "dump_state: config.yaml, deepspeed.resolved.json and environment.json have the state of the start"
        )
    if settings.memory_breakdown:
        notices.append("memory_breakdown: DeepSpeed's lines show with --verbose; memory_bytes is in metrics.jsonl")
    detailed = profiler.detailed or not profiler.enabled
    return Diagnostics(steps, detailed, counts, settings.wall_clock_breakdown), notices


def profiled_steps(steps: int | str | None) -> range | None:
    """Return the steps of `profile.steps`: `10` or `10:13`, of which both ends are profiled.

    Raises:
        ConfigError: it is something else.
    """
    if steps is None:
        return None
    match = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}))?", str(steps))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"profile.steps={steps!r} names no steps; write FIRST:LAST, from 1, such as 10:13")
    if last - first >= MOST_PROFILED_STEPS:
        raise ConfigError(f"profile.steps={steps!r} names more than {MOST_PROFILED_STEPS} steps; profile fewer")
    return range(first, last + 1)


def name_steps(steps: range) -> str:
    """Begin a sentence about profiled steps."""
    return f"step {steps.start} is" if len(steps) == 1 else f"steps {steps.start} to {steps.stop - 1} are"


def _without_effect(ds: DeepSpeedConfig, section: str, names: tuple[str, ...], instead: str) -> list[str]:
    keys = [f"{section}.{name}" for name in names]
    given = [key for key in keys if any(f"{explicit}.".startswith(f"{key}.") for explicit in ds.explicit_keys)]
    return [f"{ds.path}: no effect of {', '.join(given)}: {instead}"] if given else []
