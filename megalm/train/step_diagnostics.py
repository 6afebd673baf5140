"""Measures training steps where a run asks for it: a profile of some steps, and the traffic of the first ones.

Nothing here changes a number of training. Profiles go to the run folder, traffic to metrics.jsonl.
"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from megalm.communicator import Communicator
from megalm.engine.interface import PROFILED_COMMUNICATION, PROFILED_PHASE, Traffic, TrafficMeter
from megalm.planning.diagnostics import TRAFFIC_STEPS, Diagnostics
from megalm.train.step_trace import PROFILED_STEP, PartTime, StepTrace
from megalm.utils.atomic_files import write_bytes_atomically, write_json
from megalm.utils.formatting import format_bytes, table

_OPERATORS = 40  # listed
_WIDE = 200  # columns of a table in a file
Event = Callable[..., None]
Info = Callable[[str], None]


def phase_of_step(name: str) -> AbstractContextManager[object]:
    """Mark a phase outside the engine for a profile."""
    return record_function(f"{PROFILED_PHASE}{name}")


def step_profiler(shapes: bool = False) -> profile:
    """Return torch's profiler of this process and its device, for `marked_step` and `StepTrace.of`."""
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=shapes)


@contextmanager
def marked_step(step: int) -> Iterator[None]:
    """Mark a step for a profile, from its begin until the device has done its work."""
    with record_function(f"{PROFILED_STEP}{step}"):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass
class StepDiagnostics:
    """The measurements of this attempt.

    Args:
        folder: for profiles.
        traffic: counts on this rank.
        flops_of: step -> operations of all ranks, by the model's formula.
    """

    wanted: Diagnostics
    folder: Path
    comm: Communicator
    traffic: TrafficMeter
    flops_of: Callable[[int], float]
    last_step: int
    _window: list[int] = field(default_factory=list, init=False)  # steps whose traffic is counted
    _counted: list[Traffic] = field(default_factory=list, init=False)
    _reported: bool = field(default=False, init=False)
    _profile: _Profile | None = field(default=None, init=False)
    _is_profiled: bool = field(default=False, init=False)  # and written

    @contextmanager
    def observed(self, step: int) -> Iterator[None]:
        """Measure the step inside, if it is one to be measured; all ranks begin a profile at once."""
        counts = self.wanted.count_traffic and not self._reported
        profiled = None if self._is_profiled else self._profile_of(step)
        if not counts and profiled is None:
            yield
            return
        self.traffic.start()
        if profiled is None:
            yield
        else:
            with marked_step(step):
                yield
            profiled.steps.append(step)
        traffic = self.traffic.stop()
        if profiled is not None:
            profiled.traffic += traffic
        if counts and step not in self._window:  # a rollback repeats steps
            self._window.append(step)
            self._counted += traffic

    def _profile_of(self, step: int) -> _Profile | None:
        """Return the profile that a step belongs to, and begin it with its first step; None for other steps."""
        wanted = self.wanted.profile_steps
        if wanted is None:
            return None
        if self._profile is not None and not self._profile.is_followed_by(step):  # the run was rolled back
            self._profile.stop()
        elif step in wanted and self._profile is None:
            self._profile = _Profile(self.comm)
        return self._profile if self._profile is not None and self._profile.is_recording else None

    def report(self, step: int, event: Event, info: Info) -> None:
        """Write what is complete after `step`; collective.

        Args:
            event: writes an event to metrics.jsonl.
            info: prints a line.
        """
        if self._profile is not None and not self._is_profiled:
            wanted = self.wanted.profile_steps
            if not self._profile.is_recording or wanted is None or step in (wanted[-1], self.last_step):
                self._is_profiled = True
                self._write_profile(self._profile, event, info)
        is_complete = len(self._window) == TRAFFIC_STEPS or step == self.last_step
        if self.wanted.count_traffic and not self._reported and self._window and is_complete:
            self._reported = True
            self._report_traffic(event, info)

    def _report_traffic(self, event: Event, info: Info) -> None:
        first, last, steps = self._window[0], self._window[-1], len(self._window)
        total = _summed(part for parts in self.comm.gather(self._counted) for part in parts)
        event(
            "traffic",
            first_step=first,
            last_step=last,
            ranks=self.comm.size,
            traffic=[part.as_json() for part in total],
        )
        if not total:
            info(f"no traffic in steps {first} to {last}: no group has more than one rank")
            return
        rows = [[part.axis, part.collective, part.calls / steps, format_bytes(part.bytes / steps)] for part in total]
        info(f"traffic between {self.comm.size} ranks, a step of all ranks together (steps {first} to {last}):")
        for line in table(["axis", "collective", "calls", "bytes"], rows, _WIDE).splitlines():
            info(line)

    def _write_profile(self, found: _Profile, event: Event, info: Info) -> None:
        found.stop()
        steps = found.steps
        name = f"step-{steps[0]:08d}" if len(steps) == 1 else f"steps-{steps[0]:08d}-{steps[-1]:08d}"
        stem = self.folder / name
        parts, problem = _attempted(lambda: found.write_trace(Path(f"{stem}.rank-{self.comm.rank}.trace.json.gz")))
        ranks: list[tuple[dict[str, PartTime] | None, str]] = self.comm.gather((parts, problem))
        if not self.comm.is_main:
            return
        times = part_times([parts for parts, _ in ranks if parts is not None])
        computed = sum(map(self.flops_of, steps)) / len(steps) / self.comm.size
        content = found.content(computed, self.wanted.profile_operators, times)
        text = _as_text(content)
        _, own_problem = _attempted(lambda: _write_content(stem, content, text))
        if problem := next((why for why in (own_problem, *(why for _, why in ranks)) if why), ""):
            info(f"WARNING: a profile is not written to {self.folder}: {problem}")  # training is more important
        if own_problem:
            return
        flops = {name: content[name] for name in ("flops_measured", "flops_computed")}
        place = {"path": f"{self.folder.name}/{name}.txt", "profiled_step": steps[0], "last_step": steps[-1]}
        event("profile", **place, **flops)
        for line in text.split("\n\n")[1].splitlines():
            info(line)
        info(f"profile: {stem}.txt; ui.perfetto.dev and chrome://tracing open {stem}.rank-*.trace.json.gz")


def _attempted(work: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result, or the reason why a file cannot be written."""
    try:
        return work(), ""
    except OSError as error:
        return None, str(error)


def part_times(ranks: Sequence[Mapping[str, PartTime]]) -> list[dict[str, Any]]:
    """Return a row for each part of a step: seconds on average over the ranks, and of each rank."""
    names = dict.fromkeys(name for parts in ranks for name in parts)
    none, rows = PartTime(0.0), []
    whole = sum(time.seconds for parts in ranks for time in parts.values())
    for name in names:
        times = [parts.get(name, none) for parts in ranks]
        row: dict[str, Any] = {"part": name}
        row |= {key: sum(getattr(time, key) for time in times) / len(times) for key in vars(none)}
        row["share"] = sum(time.seconds for time in times) / whole if whole else 0.0
        rows.append({**row, "rank_seconds": [time.seconds for time in times]})
    return rows


class _Profile:
    """Consecutive steps of this rank under torch's profiler, which records from here on."""

    def __init__(self, comm: Communicator) -> None:
        self.steps: list[int] = []
        self.traffic: list[Traffic] = []
        self.is_recording = True
        self._ranks = comm.size
        self._profiler = step_profiler(shapes=comm.is_main)
        self._profiler.start()
        comm.barrier()  # a rank that starts to record sooner would wait for the others in its first step
        self._trace: StepTrace | None = None

    def is_followed_by(self, step: int) -> bool:
        return not self.steps or step == self.steps[-1] + 1

    def stop(self) -> None:
        if self.is_recording:
            self.is_recording = False
            self._profiler.stop()

    def write_trace(self, path: Path) -> dict[str, PartTime]:
        """Write the trace of this rank; return the time of each part of a step."""
        trace = self._trace = StepTrace.of(self._profiler)
        path.parent.mkdir(exist_ok=True)
        write_bytes_atomically(path, gzip.compress(trace.content, compresslevel=5))
        return trace.parts()

    def content(self, flops_computed: float, operators: bool, times: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the JSON holds, all numbers for one step: on rank 0, the times on all ranks."""
        trace, count = self._trace or StepTrace.of(self._profiler), len(self.steps)
        averages = [(str(it.key), it) for it in self._profiler.key_averages()]
        ours = [(key.removeprefix(PROFILED_PHASE), it) for key, it in averages if key.startswith(PROFILED_PHASE)]
        others = [pair for pair in averages if not pair[0].startswith((PROFILED_PHASE, PROFILED_STEP.rstrip("#")))]
        others.sort(key=lambda pair: (pair[1].self_device_time_total, pair[1].self_cpu_time_total), reverse=True)
        communication = PROFILED_COMMUNICATION.removeprefix(PROFILED_PHASE)
        return {
            "step": self.steps[0],
            "last_step": self.steps[-1],
            "rank": 0,
            "ranks": self._ranks,
            "seconds": trace.seconds,
            "flops_measured": measured_flops((it.name, it.input_shapes) for it in self._profiler.events()) / count,
            "flops_computed": flops_computed,
            "times": times,
            "kinds": trace.kinds(),
            "phases": {name: _times(it, count) for name, it in ours if not name.startswith(communication)},
            "traffic": [
                part.as_json() | {"calls": part.calls / count, "bytes": part.bytes / count}
                for part in _summed(self.traffic)
            ],
            "operators": {name: _times(it, count, own=True) for name, it in others} if operators else {},
        }


def _write_content(stem: Path, content: Mapping[str, Any], text: str) -> None:
    stem.parent.mkdir(exist_ok=True)
    write_json(Path(f"{stem}.json"), content)
    write_bytes_atomically(Path(f"{stem}.txt"), text.encode())


def _times(recorded: FunctionEventAvg, steps: int, own: bool = False) -> dict[str, float]:
    """Seconds on the CPU and on the device; own: without the operators that it calls."""
    cpu = recorded.self_cpu_time_total if own else recorded.cpu_time_total
    device = recorded.self_device_time_total if own else recorded.device_time_total
    return {
        "calls": recorded.count / steps,
        "cpu_seconds": cpu / 1e6 / steps,
        "device_seconds": device / 1e6 / steps,
    }


def _as_text(content: Mapping[str, Any]) -> str:
    seconds, measured, computed = (content[name] for name in ("seconds", "flops_measured", "flops_computed"))
    steps = f"step {content['step']}"
    if content["last_step"] != content["step"]:
        steps = f"steps {content['step']} to {content['last_step']}, numbers for one of them"
    parts = [
        f"{steps}; rank 0 of {content['ranks']}: {seconds:.4f} s with the profiler on\n"
        f"FLOPs of this rank: {measured:.4e} measured in matrix products and attention, {computed:.4e} by the model's "
        f"formula; {measured / seconds / 1e12:.3f} TFLOP/s",
        times_table(content["times"]),
        table(
            ["kind of work", "seconds", "share"],
            [[kind, f"{spent:.6f}", f"{spent / seconds:.1%}"] for kind, spent in content["kinds"].items() if spent],
            _WIDE,
        ),
    ]
    for title, own in (("phases", "whole"), ("operators", "own")):
        rows = [
            [name, it["calls"], f"{it['cpu_seconds']:.6f}", f"{it['device_seconds']:.6f}"]
            for name, it in list(content[title].items())[:_OPERATORS]
        ]
        if rows:
            parts.append(table([title, "calls", f"{own} CPU seconds", f"{own} device seconds"], rows, _WIDE))
    rows = [[it["axis"], it["collective"], it["calls"], it["bytes"]] for it in content["traffic"]]
    if rows:
        parts.append(table(["axis", "collective", "calls", "bytes"], rows, _WIDE))
    return "\n\n".join(parts) + "\n"


def times_table(times: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a step's parts; with a GPU also where the host stands meanwhile."""
    several = any(len(row["rank_seconds"]) > 1 for row in times)
    on_device = any(row["seconds"] != row["host_seconds"] for row in times)
    headings = ["where a step's time goes", "ms", "share"]
    headings += ["host ms", "hidden ms"] if on_device else []
    headings += ["most ms", "on rank"] if several else []
    rows = []
    for row in times:
        cells = [row["part"], f"{1e3 * row['seconds']:9.2f}", f"{row['share']:6.1%}"]
        if on_device:
            cells += [f"{1e3 * row['host_seconds']:9.2f}", f"{1e3 * row['hidden_seconds']:9.2f}"]
        if several:
            most = max(row["rank_seconds"])
            cells += [f"{1e3 * most:9.2f}", str(row["rank_seconds"].index(most))]
        rows.append(cells)
    total = sum(row["seconds"] for row in times)
    rows.append(["the whole step", f"{1e3 * total:9.2f}", "100.0%", *[""] * (len(headings) - 3)])
    return table(headings, rows, _WIDE)


def measured_flops(operators: Iterable[tuple[str, Sequence[Any]]]) -> int:
    """FLOPs of matrix products and attention, from the name and the input shapes of each operator that ran.

    A product of [n, k] and [k, m] has 2nkm. Others, element-wise ones, are left out, as in the model's formula.
    """
    total = 0
    for name, shapes in operators:
        if name in _PRODUCTS:
            left, right = shapes[_PRODUCTS[name]], shapes[_PRODUCTS[name] + 1]
            total += 2 * math.prod(left) * right[-1]
        elif name.startswith("aten::_scaled_dot_product") and "_math" not in name:
            if "_backward" in name:
                total += sdpa_backward_flop_count(*shapes[:4])
            else:
                total += sdpa_flop_count(*shapes[:3])
    return total


_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # place of the left factor


def _summed(parts: Iterable[Traffic]) -> list[Traffic]:
    calls: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for part in parts:
        calls[part.axis, part.collective] += part.calls
        sizes[part.axis, part.collective] += part.bytes
    return [Traffic(*place, calls[place], sizes[place]) for place in sorted(calls)]
