"""Where the time of one training step goes, by torch's profiler: seconds by kind of work."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

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
WAITING = "device waits for the CPU"
PROFILED_OVERHEAD = "Python, outside operators"


def step_profile(step: Callable[[], None], device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of one step under the profiler, and seconds by kind of work, which sum up to them; the longest first.

    On a GPU the kinds are of kernels, and the rest of the step is `WAITING`; on a CPU they are of operators, each
    without those that it calls, and the rest is `PROFILED_OVERHEAD`.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    kinds: dict[str, float] = defaultdict(float)
    spans = []
    for event in recorded.events():
        if on_gpu:
            if event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False):
                continue
            kinds[kind_of(event.name)] += event.self_device_time_total / 1e6
            spans.append((event.time_range.start, event.time_range.end))
        else:
            kinds[kind_of(event.name)] += event.self_cpu_time_total / 1e6
    idle = seconds - _covered(spans) if on_gpu else seconds - sum(kinds.values())
    kinds[WAITING if on_gpu else PROFILED_OVERHEAD] = max(0.0, idle)
    return seconds, dict(sorted(kinds.items(), key=lambda item: -item[1]))


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in _KINDS if re.search(pattern, name.lower()))


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans, in microseconds, was under way."""
    covered, end = 0.0, float("-inf")
    for begin, finish in sorted(spans):
        covered += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return covered / 1e6
