"""Every layout against one rank on the same global batch: step time, communication, memory of activations and states.

    python -m benchmarks parallel [--shape quickstart|34m|124m|1.3b] [--layouts one dp2 tp2 ...] [--steps 8] [--zero 1]

Each layout is started by itself, as several processes of this file, one a GPU or, on a CPU, sharing the cores: there
layouts cannot be faster than one rank, and what the table shows is what they cost and what they save. Columns:

- s/step: median of `--steps` steps after three others; the whole of `train_step`.
- communicating: time inside collectives and waiting for other ranks in them, of a step, on the rank with most.
- activations: the most bytes that autograd keeps at one time, on the fullest rank, parameters apart.
- states: all tensors held between steps, on the fullest rank; "planned": weights, gradients, masters and moments by
  `megalm plan`, at their largest; 16 N / P: the rule of thumb of 16 bytes a parameter over what divides them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_runs import engine_steps, keys_of, launch_ranks, resolved_run, write_random_tokens
from benchmarks.nanogpt import Shape
from megalm.cost_model.memory import estimate_memory
from megalm.engine.device import claim_device, device_name, wait_for
from megalm.engine.distributed import DistributedCommunicator, start_distributed
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.planning.resolve import ResolvedRun
from megalm.rank_environment import rank_facts
from megalm.train.lifecycle.shutdown import exit_process
from megalm.train.step_diagnostics import step_profiler

_WARM_UP = 3


@dataclass(frozen=True)
class Bench(Shape):
    micro_batch: int


SHAPES = {
    "quickstart": Bench(4, 256, 4, 8192, 256, 16, 2),
    "34m": Bench(8, 512, 8, 16384, 512, 8, 1),
    "124m": Bench(12, 768, 12, 50304, 1024, 16, 2),
    "1.3b": Bench(24, 2048, 16, 50304, 2048, 16, 1),
}
# Name -> ranks, and what the run configuration states.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"parallel.tensor": 2}),
    "sp2": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "cp2": (2, {"parallel.context": 2}),
    "ring2": (2, {"parallel.context": 2, "parallel.context_method": "ring"}),
    "tp2xdp2": (4, {"parallel.tensor": 2}),
    "tp2xpp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "pp2xdp2": (4, {"parallel.pipeline": 2}),
    "tp4": (4, {"parallel.tensor": 4}),
    "pp4": (4, {"parallel.pipeline": 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="quickstart")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["one", "dp2", "tp2", "sp2", "pp2"])
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=1, help="a pipeline takes 0 or 1")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one-of", metavar="LAYOUT", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_of:
        _rank(arguments)
        return
    print(f"{device_name()}; torch {torch.__version__}; {arguments.precision}, ZeRO {arguments.zero}")
    print(
        f"{'layout':10}{'s/step':>9}{'of one':>8}{'communicating':>15}{'activations':>13}{'states':>11}"
        f"{'planned':>11}{'16 N / P':>11}"
    )
    first: float | None = None
    bench = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        write_random_tokens(Path(folder) / "data", bench.vocabulary, bench.sequence)
        for layout in arguments.layouts:
            words = ["--one-of", layout, "--folder", folder]
            found = json.loads(launch_ranks(LAYOUTS[layout][0], words, layout).splitlines()[-1])
            first = first or found["seconds"]
            print(
                f"{layout:10}{found['seconds']:9.3f}{found['seconds'] / first:8.2f}{found['communicating']:15.1%}"
                + "".join(
                    f"{found[name] / 2**20:{width}.1f}"
                    for name, width in (("activations", 13), ("states", 11), ("planned", 11), ("rule", 11))
                )
                + "   MiB"
            )


def _rank(arguments: argparse.Namespace) -> None:
    """One rank of one layout: measures, and prints the fullest rank's figures if it is the first."""
    ranks = rank_facts()
    device = claim_device(ranks)
    comm = start_distributed(ranks, device)
    bench = SHAPES[arguments.shape]
    run = _resolve(arguments, bench)
    shape = build_model_config(run.config.model, bench.vocabulary, bench.sequence)
    before = _tensor_bytes(device)
    engine, train = engine_steps(run, bench.vocabulary, device, comm, arguments.folder / "data")

    def step(number: int) -> float:
        comm.barrier()
        start = time.perf_counter()
        train(number)
        wait_for(device)
        return time.perf_counter() - start

    seconds = [step(number) for number in range(1, _WARM_UP + arguments.steps + 1)][_WARM_UP:]
    following = _WARM_UP + arguments.steps + 1
    states = _tensor_bytes(device) - before
    communicating = _communicating(lambda: step(following))
    activations = _activations(engine, lambda: step(following + 1))
    found = _fullest(comm, run, shape, communicating, activations, states)
    if comm.is_main:
        print(json.dumps({"seconds": statistics.median(seconds), **found}))
    exit_process(0)


def _fullest(
    comm: DistributedCommunicator,
    run: ResolvedRun,
    shape: ModelConfig,
    communicating: float,
    activations: int,
    states: int,
) -> dict[str, float]:
    plan = estimate_memory(run.memory_case(shape))
    held = plan.weights + plan.gradients + plan.master + plan.moments
    # What divides the sixteen bytes: tensor and pipeline ranks all of them, ZeRO 1 those of the optimizer only.
    model_ranks, data = run.topology.tensor * run.topology.pipeline, run.topology.data_context
    whole = {0: 16, 1: 4, 2: 2, 3: 0}[run.zero_stage]
    rule = shape.parameter_count() / model_ranks * (whole + (16 - whole) / data)
    measured = comm.max([communicating, activations, states])
    return dict(zip(("communicating", "activations", "states"), measured, strict=True)) | {
        "planned": held,
        "rule": rule,
    }


def _communicating(step: Any) -> float:
    """The part of a step's time in which a collective was under way, by torch's profiler."""
    with step_profiler() as profile:
        seconds = step()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.name.startswith("gloo:") or "nccl" in event.name.lower()
    )
    covered, end = 0.0, float("-inf")
    for begin, finish in spans:  # those under way at one time count once
        covered += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return covered / 1e6 / seconds


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: torch.Tensor, meter: _Meter) -> None:
        self.tensor, self._meter = tensor, meter
        meter.add(tensor.untyped_storage())

    def __del__(self) -> None:
        self._meter.drop(self.tensor.untyped_storage())


class _Meter:
    """Bytes of the storages that are kept, each once, and the most there were at one time."""

    def __init__(self, parameters: set[int]) -> None:
        self._parameters, self._counts = parameters, dict[int, int]()
        self._now = self.most = 0

    def add(self, storage: Any) -> None:
        place = storage.data_ptr()
        if place in self._parameters:
            return
        self._counts[place] = self._counts.get(place, 0) + 1
        if self._counts[place] == 1:
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)

    def drop(self, storage: Any) -> None:
        place = storage.data_ptr()
        if place in self._parameters:
            return
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place]
            self._now -= storage.nbytes()


def _activations(engine: Any, step: Any) -> int:
    parameters = engine._engine.module.parameters()
    meter = _Meter({parameter.untyped_storage().data_ptr() for parameter in parameters})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, meter), lambda kept: kept.tensor):
        step()
    return meter.most


def _tensor_bytes(device: torch.device) -> int:
    """Bytes of all tensors alive."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _resolve(arguments: argparse.Namespace, bench: Bench) -> ResolvedRun:
    changes = {
        "train_batch_size": bench.batch,
        "train_micro_batch_size_per_gpu": bench.micro_batch,
        "bf16": {"enabled": arguments.precision == "bf16"},
        "zero_optimization": {"stage": arguments.zero},
    }
    path = arguments.folder / f"{arguments.one_of}-{rank_facts().rank}.json"
    return resolved_run(path, changes, keys_of(bench, "llama") | LAYOUTS[arguments.one_of][1], bench.vocabulary)
