"""Speed of a model on one device: megalm, eager and compiled, beside other loops, and where its step's time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu_check.parts import Task
    from benchmarks.step_loops import Bench, Setting

_LARGEST_WIDTH = 2560
_KINDS_SHOWN = 0.005  # of the step
# In this order, so that the first ones are there where time runs out.
_VARIANTS = (
    ("megalm", True),
    ("megalm", False),
    ("bare PyTorch", True),
    ("nanoGPT's way", True),
    ("bare PyTorch", False),
    ("transformers", True),
    ("transformers", False),
)


@dataclass(frozen=True)
class Measured:
    """One loop: seconds of a step, the device's peak memory in bytes, seconds of a profiled step by kind of work."""

    name: str
    seconds: float
    first_seconds: float
    peak_bytes: int
    kinds: dict[str, float]


def speed(task: Task, size: str) -> None:
    from benchmarks.gpu_check.parts import one_rank

    with one_rank() as (comm, device):
        from benchmarks.step_loops import SHAPES, Setting
        from megalm.engine.device import peak_flops
        from megalm.model.model_config import flops_per_token

        variants: Sequence[tuple[str, bool]] = _VARIANTS if task.on_gpu or size == "124m" else _VARIANTS[:1]
        bench = SHAPES["tiny"] if size != "largest" else SHAPES["1.3b" if task.on_gpu else "tiny"]
        bench = SHAPES[size] if task.on_gpu and size != "largest" else bench
        setting = Setting(bench, device, comm, task.folder)
        if size == "largest":
            variants = _VARIANTS[:2]
            setting = replace(setting, bench=_largest(setting, 64 if task.on_gpu else 8))
        setting.write_tokens()
        run, shape = setting.resolve(True), setting.shape
        peak, source = peak_flops(device, run.precision != "fp32")
        flops = flops_per_token(shape, setting.bench.sequence)
        bench = setting.bench
        tokens = bench.batch * bench.sequence
        task.report.fact("parameters", f"{shape.parameter_count():,}")
        task.report.fact("model", f"{bench.layers} layers x {bench.hidden}, vocabulary of {bench.vocabulary:,}")
        batch = f"{bench.batch} x {bench.sequence} tokens in micro-batches of {run.batch.micro_batch}"
        task.report.fact("batch", f"{batch}, {run.precision}, ZeRO {run.zero_stage}")
        task.report.fact("MFU of", f"{peak / 1e12:.2f} TFLOP/s ({source})")
        found: list[Measured] = []
        for measured in _measurements(task, setting, variants):
            found.append(measured)
            rows = [
                [
                    each.name,
                    f"{each.seconds:.4f}",
                    f"{tokens / each.seconds:,.0f}",
                    f"{flops * tokens / each.seconds / peak:.1%}",
                    f"{each.peak_bytes / 2**30:.2f}" if each.peak_bytes else "-",
                    f"{each.first_seconds:.1f}",
                ]
                for each in found
            ]
            columns = ["loop", "s/step", "tokens/s", "MFU", "peak GiB", "built, and first step, s"]
            task.report.table("Speed", columns, rows)
            _table_of_kinds(task, found)


def _measurements(task: Task, setting: Setting, variants: Sequence[tuple[str, bool]]) -> Iterator[Measured]:
    from benchmarks.step_loops import missing_package

    longest = 0.0
    for name, compiled in variants:
        title = f"{name}, {'compiled' if compiled else 'eager'}"
        package = missing_package(name)
        if package is not None:
            task.report.check(title, None, f"not measured: {package} is not installed")
            continue
        if task.left() < 1.2 * longest + 3:
            task.report.check(title, None, f"not measured: {task.left():.0f} s are left")
            continue
        start = time.monotonic()
        try:
            yield _measure(task, setting, name, compiled)
        except Exception as error:  # out of memory, or a kernel that does not compile: the others are measured
            task.report.check(title, False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        longest = max(longest, time.monotonic() - start)


def _measure(task: Task, setting: Setting, name: str, compiled: bool) -> Measured:
    import torch

    from benchmarks.step_loops import LOOPS, free_memory
    from megalm.train.step_diagnostics import marked_step, step_profiler
    from megalm.train.step_trace import StepTrace

    free_memory()
    start = time.perf_counter()
    step = LOOPS[name](setting, compiled)
    step(1)
    first_seconds = time.perf_counter() - start
    for number in (2, 3):
        step(number)
    seconds: list[float] = []
    number, began = 3, time.perf_counter()
    while len(seconds) < 5 or (time.perf_counter() - began < 3 and task.on_gpu):
        number += 1
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if task.on_gpu else 0
    with step_profiler() as profiler, marked_step(number + 1):
        step(number + 1)
    trace = StepTrace.of(profiler)
    title = f"{name}, {'compiled' if compiled else 'eager'}"
    return Measured(title, statistics.median(seconds), first_seconds, peak, {"step": trace.seconds, **trace.kinds()})


def _table_of_kinds(task: Task, found: list[Measured]) -> None:
    """Milliseconds of a profiled step by kind of work; each loop is a column."""
    kinds = list(dict.fromkeys(kind for each in found for kind in each.kinds))
    shown = [
        kind for kind in kinds if any(each.kinds.get(kind, 0) > _KINDS_SHOWN * each.kinds["step"] for each in found)
    ]
    rows = [
        [
            "the whole step, profiled" if kind == "step" else kind,
            *(
                f"{1e3 * each.kinds.get(kind, 0):.2f} ({each.kinds.get(kind, 0) / each.kinds['step']:.0%})"
                for each in found
            ),
        ]
        for kind in shown
    ]
    task.report.table("Where a step's time goes, ms", ["kind of work", *(each.name for each in found)], rows)


def _largest(setting: Setting, most_layers: int) -> Bench:
    """As many layers as the plan says that fit this device, every block recomputed."""
    from megalm.cost_model.memory import estimate_memory
    from megalm.planning.memory_fit import MemoryFit

    on_gpu = setting.device.type == "cuda"
    wide = (
        replace(setting.bench, hidden=_LARGEST_WIDTH, heads=_LARGEST_WIDTH // 128, batch=4) if on_gpu else setting.bench
    )
    fitting = replace(wide, layers=1, recompute=1)
    for layers in range(2, most_layers + 1):
        candidate = replace(fitting, layers=layers)
        trial = replace(setting, bench=candidate)
        run = trial.resolve(True)
        if MemoryFit.of(estimate_memory(run.memory_case(trial.shape)), run.device).level != "fits":
            break
        fitting = candidate
    return fitting
