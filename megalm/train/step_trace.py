"""Where the time of a step goes, read from a trace of torch's profiler in Chrome's format (times in microseconds).

The main thread's time is divided among the marks that the trainer, the engine and the traffic counter set: a moment
belongs to the innermost. On a GPU the device's time is divided too: a kernel belongs to the mark under which it was
launched, and a moment with several kernels to computation before communication.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megalm.engine.interface import PROFILED_COMMUNICATION, PROFILED_PHASE

if TYPE_CHECKING:
    from torch.profiler import profile

PROFILED_STEP = "ProfilerStep#"  # and the step's number: the name that tools for such traces look for

COMMUNICATION = "communication: "  # and the axis
HOST_WAITS, DEVICE_WAITS, OTHER = "host waits for the device", "device waits for the host", "other"
_PARTS = ("data", "forward", "backward", "optimizer", COMMUNICATION, "logging", HOST_WAITS, DEVICE_WAITS, OTHER)
# Phases of the engines, where the part has another name.
_PART_OF_PHASE = {"update": "optimizer"}
_ANNOTATIONS, _LAUNCHES = ("user_annotation",), ("cuda_runtime", "cuda_driver")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITING_CALL = re.compile(r"Synchronize|^cudaMemcpy$|^cuStreamWaitValue")
_COMMUNICATION_KERNEL = re.compile(
    r"nccl|rccl|multimem|symm_?mem|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all", re.IGNORECASE
)

# The first pattern that is found in a kernel's name (on a GPU) or an operator's (on a CPU) decides.
_KINDS = (
    ("attention", r"flash|fmha|flex|attention|scaled_dot_product"),
    ("matrix products", r"gemm|gemv|cutlass|nvjet|xmma|wgmma|cublas|aten::(mm|bmm|addmm|baddbmm|linear)\b|mkl|onednn"),
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather"),
    ("optimizer", r"adam|multi_tensor|foreach|lamb"),
    ("loss", r"softmax|cross_entropy|nll|linearcrossentropy"),
    ("embeddings", r"embedding|index_?select|indexing|gather|scatter"),
    ("norms", r"norm"),
    ("copies and zeros", r"memcpy|memset|copy|zero_|fill|aten::(cat|empty|to)\b|catarray"),
    ("compiled regions", r"triton|compiled|inductor|cpp_fused|graph_\d"),
    ("other sums and element-wise work", r"."),
)
OUTSIDE_OPERATORS = "Python, outside operators"


@dataclass(frozen=True)
class _Span:
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class _Kernel:
    """Work of the device: a part of the step, and whether it moves data between ranks."""

    name: str
    part: str
    start: float
    end: float

    @property
    def communicates(self) -> bool:
        return self.part.startswith(COMMUNICATION)


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part of a step, on average over the steps.

    Attributes:
        seconds: of the device if there is one, else of the main thread; all parts sum up to the step.
        host_seconds: of the main thread.
        hidden_seconds: communication beside computation, which costs the step nothing.
    """

    seconds: float
    host_seconds: float = 0.0
    hidden_seconds: float = 0.0


class StepTrace:
    """The steps of one rank's trace, each under a mark that begins with `PROFILED_STEP`.

    Attributes:
        content: the JSON file.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        by_category: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for event in orjson.loads(content)["traceEvents"]:
            if event.get("ph") == "X" and "dur" in event:
                by_category[str(event.get("cat"))].append(event)
        self._threads: defaultdict[object, list[_Span]] = defaultdict(list)  # thread -> marks
        self._steps: list[_Span] = []
        main: object = None
        for event in _of(by_category, _ANNOTATIONS):
            span = _span(event)
            if span.name.startswith(PROFILED_STEP):
                main = event.get("tid")
                self._steps.append(span)
            if span.name.startswith((PROFILED_STEP, PROFILED_PHASE)):
                self._threads[event.get("tid")].append(span)
        self._main = main
        for event in _of(by_category, _LAUNCHES):
            if event.get("tid") == main and _WAITING_CALL.search(str(event["name"])):
                self._threads[main].append(_span(event))
        self._operators: defaultdict[object, list[_Span]] = defaultdict(list)
        for event in by_category["cpu_op"]:
            self._operators[event.get("tid")].append(_span(event))
        self._kernels = self._placed(by_category)

    @classmethod
    def of(cls, profiler: profile) -> StepTrace:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return cls(path.read_bytes())

    @property
    def steps(self) -> int:
        return len(self._steps)

    @property
    def seconds(self) -> float:
        """Of a step, on average."""
        return sum(step.end - step.start for step in self._steps) / max(1, self.steps) / 1e6

    def parts(self) -> dict[str, PartTime]:
        """Return part -> time, in the order of a step; without parts that take none."""
        host: defaultdict[str, float] = defaultdict(float)
        for span, own in own_times(self._threads[self._main]):
            if self._is_in_a_step(span.start):
                host[_part(span.name)] += own / 1e6
        device, hidden = self._device_times()
        has_device = bool(self._kernels)
        if has_device:
            device[DEVICE_WAITS] += max(0.0, self.seconds * self.steps - sum(device.values()))
        found = {
            part: PartTime(
                (device if has_device else host)[part] / self.steps, host[part] / self.steps, hidden[part] / self.steps
            )
            for part in {**host, **device, **hidden}
        }
        return {part: found[part] for part in sorted(found, key=_place) if any(vars(found[part]).values())}

    def kinds(self) -> dict[str, float]:
        """Return kind of work -> seconds of a step, the longest first; they sum up to the step.

        Of kernels on a GPU, else of operators, each without those that it calls. The rest is waiting or Python's.
        """
        found: defaultdict[str, float] = defaultdict(float)
        if self._kernels:
            for kernel in self._kernels:
                found[kind_of(kernel.name)] += (kernel.end - kernel.start) / 1e6
            rest, busy = DEVICE_WAITS, _covered((kernel.start, kernel.end) for kernel in self._kernels) / 1e6
        else:
            for spans in self._operators.values():
                for span, own in own_times(spans):
                    if self._is_in_a_step(span.start):
                        found[kind_of(span.name)] += own / 1e6
            rest, busy = OUTSIDE_OPERATORS, sum(found.values())
        found[rest] = max(0.0, self.seconds * self.steps - busy)
        return {kind: found[kind] / self.steps for kind in sorted(found, key=lambda kind: -found[kind])}

    def _device_times(self) -> tuple[defaultdict[str, float], defaultdict[str, float]]:
        """Return the seconds of the device by part, each moment once, and those of hidden communication."""
        device: defaultdict[str, float] = defaultdict(float)
        hidden: defaultdict[str, float] = defaultdict(float)
        computing = [kernel for kernel in self._kernels if not kernel.communicates]
        taken: list[tuple[float, float]] = []
        for kernel, free in _claimed(computing, taken):
            device[kernel.part] += free / 1e6
        for kernel, free in _claimed([kernel for kernel in self._kernels if kernel.communicates], taken):
            device[kernel.part] += free / 1e6
            hidden[kernel.part] += (kernel.end - kernel.start - free) / 1e6
        return device, hidden

    def _placed(self, by_category: Mapping[str, list[Mapping[str, Any]]]) -> list[_Kernel]:
        """Return the device's work that a step has launched, with its part."""
        launches = {
            correlation: event
            for event in _of(by_category, _LAUNCHES)
            if (correlation := event.get("args", {}).get("correlation")) is not None
        }
        work = []
        for event in _of(by_category, _DEVICE_WORK):
            # Of some graphs the launch of a kernel is not recorded.
            launch = launches.get(event.get("args", {}).get("correlation"), {"ts": event["ts"], "tid": self._main})
            if self._is_in_a_step(float(launch["ts"])):
                work.append((event, launch.get("tid"), float(launch["ts"])))
        marks = {
            thread: _innermost(spans, [moment for _, tid, moment in work if thread in (tid, self._main)])
            for thread, spans in self._threads.items()
        }
        kernels = []
        for event, thread, moment in work:
            # The backward pass of a GPU has a thread of its own, while the main thread stands in its phase.
            own = marks.get(thread, {}).get(moment)
            part = _part(own or marks[self._main].get(moment) or "")
            span = _span(event)
            if not part.startswith(COMMUNICATION) and _COMMUNICATION_KERNEL.search(span.name):
                part = f"{COMMUNICATION}{OTHER}"
            elif part.startswith(COMMUNICATION) and not _COMMUNICATION_KERNEL.search(span.name):
                part = OTHER  # what a collective computes or copies around its kernel
            kernels.append(_Kernel(span.name, part, span.start, span.end))
        return sorted(kernels, key=lambda kernel: kernel.start)

    def _is_in_a_step(self, moment: float) -> bool:
        return any(step.start <= moment < step.end for step in self._steps)


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in _KINDS if re.search(pattern, name.lower()))


def own_times(spans: Iterable[_Span]) -> Iterator[tuple[_Span, float]]:
    """Yield each span of one thread with its time outside the spans within it."""
    open_spans: list[tuple[_Span, float, list[float]]] = []  # with its end, and the time of the spans within

    def closed(until: float) -> Iterator[tuple[_Span, float]]:
        while open_spans and open_spans[-1][1] <= until:
            span, end, within = open_spans.pop()
            yield span, max(0.0, end - span.start - sum(within))

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        yield from closed(span.start)
        end = span.end
        if open_spans:  # what ends in another thread may outlast the span around it
            end = min(end, open_spans[-1][1])
            open_spans[-1][2].append(end - span.start)
        open_spans.append((span, end, []))
    yield from closed(float("inf"))


def _innermost(spans: Iterable[_Span], moments: Iterable[float]) -> dict[float, str]:
    """Return moment -> name of the innermost span around it."""
    found: dict[float, str] = {}
    waiting = sorted(spans, key=lambda span: (span.start, -span.end))[::-1]
    open_spans: list[_Span] = []
    for moment in sorted(set(moments)):
        while waiting and waiting[-1].start <= moment:
            open_spans.append(waiting.pop())
        open_spans = [span for span in open_spans if span.end > moment]
        if open_spans:
            found[moment] = open_spans[-1].name
    return found


def _claimed(kernels: Sequence[_Kernel], taken: list[tuple[float, float]]) -> Iterator[tuple[_Kernel, float]]:
    """Yield each kernel, in order of starts, with its time outside `taken` and outside the kernels before it.

    Afterwards `taken` has theirs too, as ranges that do not touch, in order.
    """
    before, own, index = list(taken), list[tuple[float, float]](), 0
    for kernel in kernels:
        start = max(kernel.start, own[-1][1] if own else kernel.start)
        if start >= kernel.end:
            yield kernel, 0.0
            continue
        while index < len(before) and before[index][1] <= start:
            index += 1
        free, later = kernel.end - start, index
        while later < len(before) and before[later][0] < kernel.end:
            free -= min(kernel.end, before[later][1]) - max(start, before[later][0])
            later += 1
        own.append((start, kernel.end))
        yield kernel, free
    taken[:] = _merged([*before, *own])


def _merged(ranges: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _covered(ranges: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in _merged(ranges))


def _part(name: str) -> str:
    """Return the part of a step that a mark, or a call that waits, belongs to."""
    if name.startswith(PROFILED_COMMUNICATION):
        return f"{COMMUNICATION}{name.removeprefix(PROFILED_COMMUNICATION).split()[0]}"
    if name.startswith(PROFILED_PHASE):
        phase = name.removeprefix(PROFILED_PHASE)
        part = _PART_OF_PHASE.get(phase, phase)
        return part if part in _PARTS else OTHER
    return OTHER if name.startswith(PROFILED_STEP) or not name else HOST_WAITS


def _place(part: str) -> tuple[int, str]:
    return next((place, part) for place, name in enumerate(_PARTS) if part.startswith(name))


def _of(by_category: Mapping[str, list[Mapping[str, Any]]], names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for name in names:
        yield from by_category.get(name, ())


def _span(event: Mapping[str, Any]) -> _Span:
    start = float(event["ts"])
    return _Span(str(event["name"]), start, start + float(event["dur"]))
