"""Times the training step: megalm's engine, a bare PyTorch loop of the same model, and the machine's own peak.

    python -m benchmarks train_step [--shape quickstart|34m|124m|354m|1.3b] [--steps 12] [--no-compile] [--json ds.json]
                                    [--loops megalm "bare PyTorch" "nanoGPT's way" transformers]

All parts are timed in turn within one run, so that they meet the same machine; the medians of single steps are printed.
The engine's step is the whole of `train_step`: reading the batch, forward, backward, reduction, clipping, update.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_runs import ZERO1
from benchmarks.step_loops import LOOPS, SHAPES, Setting, Step
from megalm.engine.device import claim_device, device_name, measured_peak, peak_flops
from megalm.engine.distributed import start_distributed
from megalm.model.model_config import flops_per_token
from megalm.rank_environment import rank_facts
from megalm.train.lifecycle.shutdown import exit_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--style", choices=["llama", "gpt2"], default="gpt2")
    parser.add_argument("--json", type=Path, default=ZERO1)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=["megalm", "bare PyTorch"])
    arguments = parser.parse_args()
    bench = SHAPES[arguments.shape]
    ranks = rank_facts()
    device = claim_device(ranks)
    comm = start_distributed(ranks, device)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(bench, device, comm, Path(folder), arguments.style, arguments.json)
        setting.write_tokens()
        loops = arguments.loops if comm.size == 1 else ["megalm"]
        work: dict[str, Step] = {}
        for compiled in [False] if arguments.no_compile else [False, True]:
            for name in loops:
                work[f"{name}, {'compiled' if compiled else 'eager'}"] = LOOPS[name](setting, compiled)
        run, shape = setting.resolve(False), setting.shape
        peak = peak_flops(device, run.precision != "fp32")[0] * comm.size
        if device.type == "cuda":
            print(f"one 8192 x 8192 product: {measured_peak(device, run.precision != 'fp32') / 1e12:.0f} TFLOP/s")
        print(f"{device_name()}; torch {torch.__version__}; {ranks.threads} threads; {run.precision}")
        print(
            f"{arguments.shape}, {arguments.style}: {shape.parameter_count():,} parameters, "
            f"{bench.batch} x {bench.sequence} tokens"
        )
        _report(work, arguments.steps, bench.batch * bench.sequence, flops_per_token(shape, bench.sequence), peak)
    exit_process(0)


def _report(work: dict[str, Step], steps: int, tokens: int, flops: float, peak: float) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for step in work.values():
        for number in range(1, 4):  # compilation, allocation, moments
            step(number)
    peaks = []
    for number in range(4, 4 + steps):
        peaks.append(_now_peak(peak))
        for name, step in work.items():
            start = time.perf_counter()
            step(number)
            seconds[name].append(time.perf_counter() - start)
    print(f"matrix products: {statistics.median(peaks) / 1e12:.2f} TFLOP/s (median in this run)")
    print(f"{'':24}{'s/step':>9}{'tokens/s':>12}{'of peak':>9}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:24}{median:9.4f}{tokens / median:12,.0f}{flops * tokens / median / statistics.median(peaks):9.1%}"
        )


def _now_peak(fallback: float) -> float:
    """On a CPU the peak drifts with the neighbours: measured beside each step."""
    if torch.cuda.is_available():
        return fallback
    return measured_peak(torch.device("cpu"), low_precision=True)
