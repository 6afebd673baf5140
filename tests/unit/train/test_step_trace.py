"""Where a step's time goes, read from traces in the format of torch's profiler."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megalm.train.step_trace import StepTrace

MAIN, AUTOGRAD = 7, 8


class Trace:
    """A trace in milliseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 7}]

    def add(self, category: str, name: str, start: float, end: float, thread: int = MAIN, **of: Any) -> None:
        times = {"ts": 1e6 + 1e3 * start, "dur": 1e3 * (end - start)}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, **times, "args": of})

    def mark(self, name: str, start: float, end: float, thread: int = MAIN) -> None:
        self.add("user_annotation", name, start, end, thread)

    def kernel(self, name: str, launched: float, start: float, end: float, thread: int = MAIN) -> None:
        number = len(self.events)
        self.add("cuda_runtime", "cudaLaunchKernel", launched, launched + 0.01, thread, correlation=number)
        self.add("kernel", name, start, end, 20, correlation=number, stream=20)

    def read(self) -> StepTrace:
        return StepTrace(json.dumps({"traceEvents": self.events}).encode())


def _milliseconds(trace: StepTrace) -> dict[str, tuple[float, float, float]]:
    return {
        part: (round(1e3 * it.seconds, 6), round(1e3 * it.host_seconds, 6), round(1e3 * it.hidden_seconds, 6))
        for part, it in trace.parts().items()
    }


def test_a_moment_of_a_cpu_belongs_to_the_innermost_mark() -> None:
    trace = Trace()
    trace.mark("megalm forward", 0, 5)  # of a step that is not profiled
    for begin in (10, 40):  # two steps, with a pause between them
        trace.mark(f"ProfilerStep#{begin}", begin, begin + 20)
        trace.mark("megalm data", begin, begin + 1)
        trace.mark("megalm forward", begin + 1, begin + 7)
        trace.mark("megalm communication tensor all_reduce", begin + 3, begin + 5)
        trace.mark("megalm backward", begin + 7, begin + 15)
        trace.mark("megalm communication data wait", begin + 14, begin + 15)
        trace.mark(
            "megalm communication data all_reduce", begin + 8, begin + 9, AUTOGRAD
        )  # while the main thread works
        trace.mark("megalm update", begin + 15, begin + 17)
        trace.mark("megalm wait", begin + 17, begin + 18)
        trace.mark("megalm logging", begin + 18, begin + 19)
    found = trace.read()
    assert (found.steps, found.seconds) == (2, pytest.approx(0.020))
    assert {part: seconds for part, (seconds, *_) in _milliseconds(found).items()} == {
        "data": 1,
        "forward": 4,
        "backward": 7,
        "optimizer": 2,
        "communication: data": 1,
        "communication: tensor": 2,
        "logging": 1,
        "other": 2,
    }
    order = list(found.parts())
    assert order.index("data") < order.index("forward") < order.index("backward") < order.index("optimizer")


def test_the_time_of_a_gpu() -> None:
    trace = Trace()
    trace.mark("ProfilerStep#5", 0, 20)
    trace.mark("megalm forward", 0, 2)
    trace.kernel("ampere_bf16_gemm", 1, 1, 6)
    trace.mark("megalm backward", 2, 6)  # the main thread waits for the thread that does the work
    trace.kernel("flash_bwd_kernel", 3, 6, 12, AUTOGRAD)
    trace.mark("megalm communication data all_reduce", 4, 4.5, AUTOGRAD)
    trace.kernel("ncclDevKernel_AllReduce_Sum", 4.2, 8, 14, AUTOGRAD)  # 4 ms beside the backward pass, 2 ms alone
    trace.mark("megalm update", 6, 18)
    trace.kernel("multi_tensor_apply_kernel", 7, 15, 17)
    trace.kernel("ncclDevKernel_Broadcast", 7.5, 17, 18)  # of a group that nobody has named
    trace.add("cuda_runtime", "cudaEventSynchronize", 8, 17, correlation=0)
    trace.kernel("of_no_step", 25, 25, 30)
    trace.add("kernel", "of_a_graph", 18.5, 19.5, 20, correlation=999)  # without its launch
    found = trace.read()
    # seconds of the device, of the host, and hidden ones
    assert _milliseconds(found) == {
        "forward": (5, 2, 0),
        "backward": (6, 4, 0),
        "optimizer": (2, 3, 0),
        "communication: data": (2, 0, 4),
        "communication: other": (1, 0, 0),
        "host waits for the device": (0, 9, 0),
        "device waits for the host": (3, 0, 0),
        "other": (1, 2, 0),
    }
    kinds = {kind: round(1e3 * seconds, 6) for kind, seconds in found.kinds().items()}
    assert kinds == {
        "communication": 7,
        "attention": 6,
        "matrix products": 5,
        "device waits for the host": 3,
        "optimizer": 2,
        "other sums and element-wise work": 1,
    }


def test_kernels_side_by_side_count_once() -> None:
    trace = Trace()
    trace.mark("ProfilerStep#1", 0, 10)
    trace.mark("megalm forward", 0, 10)
    trace.mark("megalm communication tensor all_gather", 0, 1)
    for launched, start, end in ((0.1, 0, 3), (0.2, 2, 6)):
        trace.kernel("ncclDevKernel_AllGather", launched, start, end)
    for launched, start, end in ((2, 1, 4), (3, 3, 5), (4, 7, 8)):
        trace.kernel("gemm", launched, start, end)
    assert _milliseconds(trace.read()) == {
        "forward": (5, 9, 0),
        "communication: tensor": (2, 1, 5),
        "device waits for the host": (3, 0, 0),
    }


def test_operators_by_kind_of_work() -> None:
    trace = Trace()
    trace.mark("ProfilerStep#1", 0, 10)
    trace.add("cpu_op", "aten::linear", 1, 6)
    trace.add("cpu_op", "aten::copy_", 2, 3)
    trace.add("cpu_op", "gloo:all_reduce", 4, 9)  # ends in another thread
    kinds = {kind: round(1e3 * seconds, 6) for kind, seconds in trace.read().kinds().items()}
    assert kinds == {"Python, outside operators": 5, "matrix products": 2, "copies and zeros": 1, "communication": 2}
