"""Measures single training steps where a run asks for it: a profile of one step, and the traffic of the first ones.

Nothing here changes a number of training. The profile of rank 0 goes to the run folder, traffic to metrics.jsonl.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from megalm.communicator import Communicator
from megalm.engine.interface import PROFILED_PHASE, Traffic, TrafficMeter
from megalm.planning.diagnostics import TRAFFIC_STEPS, Diagnostics
from megalm.utils.atomic_files import write_bytes_atomically, write_json
from megalm.utils.formatting import format_bytes, table

log = logging.getLogger(__name__)

_OPERATORS = 40  # listed
Event = Callable[..., None]
Info = Callable[[str], None]


@dataclass
class StepDiagnostics:
    """The measurements of this attempt.

    Args:
        folder: for profiles; used on rank 0.
        traffic: counts on this rank.
        flops_per_step: of all ranks, by the model's formula.
    """

    wanted: Diagnostics
    folder: Path
    comm: Communicator
    traffic: TrafficMeter
    flops_per_step: float
    last_step: int
    _window: list[int] = field(default_factory=list, init=False)  # steps whose traffic is counted
    _counted: list[Traffic] = field(default_factory=list, init=False)
    _reported: bool = field(default=False, init=False)
    _profile: _Profile | None = field(default=None, init=False)

    @contextmanager
    def observed(self, step: int) -> Iterator[None]:
        """Measure the step inside, if it is one to be measured."""
        counts = self.wanted.count_traffic and not self._reported
        profiles = step == self.wanted.profile_step and self._profile is None
        if not counts and not profiles:
            yield
            return
        self.traffic.start()
        if profiles and self.comm.is_main:
            self._profile = _Profile(step, self.comm.size)
            with self._profile.recording():
                yield
        else:
            yield
        traffic = self.traffic.stop()
        if self._profile is not None and self._profile.step == step:
            self._profile.traffic = traffic
        if counts and step not in self._window:  # a rollback repeats steps
            self._window.append(step)
            self._counted += traffic

    def report(self, step: int, event: Event, info: Info) -> None:
        """Write what is complete after `step`; collective.

        Args:
            event: writes an event to metrics.jsonl.
            info: prints a line.
        """
        if self._profile is not None and not self._profile.is_written and self._profile.step == step:
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
        found.is_written = True
        path = self.folder / f"step-{found.step:08d}"
        try:
            content = found.write(path, self.flops_per_step / self.comm.size, self.wanted.profile_operators)
        except OSError as error:  # training is more important
            info(f"WARNING: the profile of step {found.step} cannot be written to {self.folder}: {error}")
            return
        flops = {name: content[name] for name in ("flops_measured", "flops_computed")}
        event("profile", path=f"{self.folder.name}/{path.name}.txt", profiled_step=found.step, **flops)
        info(f"profile of step {found.step}: {path}.txt; open {path}.trace.json.gz in chrome://tracing or Perfetto")


_WIDE = 200  # columns of a table in a file


class _Recorded(Protocol):
    """What is used of an event, or of the average of all events of one name, of torch's profiler; times in µs."""

    key: str
    count: int
    cpu_time_total: float
    self_cpu_time_total: float
    device_time_total: float
    self_device_time_total: float


class _Profile:
    """One step of this rank under torch's profiler."""

    def __init__(self, step: int, ranks: int) -> None:
        self.step, self.ranks = step, ranks
        self.traffic: list[Traffic] = []
        self.is_written = False
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._seconds = math.nan

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self._profiler:
            start = time.perf_counter()
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds = time.perf_counter() - start

    def write(self, path: Path, flops_computed: float, operators: bool) -> dict[str, Any]:
        """Write PATH.json, PATH.txt and PATH.trace.json.gz; return the content of the first."""
        path.parent.mkdir(exist_ok=True)
        averages: list[_Recorded] = list(self._profiler.key_averages())
        phases = {
            it.key.removeprefix(PROFILED_PHASE): _times(it) for it in averages if it.key.startswith(PROFILED_PHASE)
        }
        listed = sorted(
            (it for it in averages if not it.key.startswith(PROFILED_PHASE)),
            key=lambda it: (it.self_device_time_total, it.self_cpu_time_total),
            reverse=True,
        )
        content = {
            "step": self.step,
            "rank": 0,
            "ranks": self.ranks,
            "seconds": self._seconds,
            "flops_measured": measured_flops((it.name, it.input_shapes) for it in self._profiler.events()),
            "flops_computed": flops_computed,
            "phases": phases,
            "traffic": [part.as_json() for part in _summed(self.traffic)],
            "operators": {it.key: _times(it, own=True) for it in listed} if operators else {},
        }
        self._profiler.export_chrome_trace(f"{path}.trace.json.gz")
        write_json(path.with_suffix(".json"), content)
        write_bytes_atomically(path.with_suffix(".txt"), _as_text(content).encode())
        return content


def _times(recorded: _Recorded, own: bool = False) -> dict[str, float]:
    """Seconds on the CPU and on the device; own: without the operators that it calls."""
    cpu = recorded.self_cpu_time_total if own else recorded.cpu_time_total
    device = recorded.self_device_time_total if own else recorded.device_time_total
    return {"calls": recorded.count, "cpu_seconds": cpu / 1e6, "device_seconds": device / 1e6}


def _as_text(content: Mapping[str, Any]) -> str:
    seconds, measured, computed = (content[name] for name in ("seconds", "flops_measured", "flops_computed"))
    parts = [
        f"step {content['step']}, rank 0 of {content['ranks']}: {seconds:.4f} s with the profiler on",
        f"FLOPs of this rank: {measured:.4e} measured in matrix products and attention, {computed:.4e} by the model's "
        f"formula; {measured / seconds / 1e12:.3f} TFLOP/s",
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
