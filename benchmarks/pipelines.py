"""Schedules of a pipeline: the time of a step, and the share of it that ranks wait, beside what the simulation says.

    python -m benchmarks pipelines [--ranks 2 4] [--blocks 8] [--micro-batches 8] [--milliseconds 5] [--rounds 5]

What a block computes is tiny; beside it, it sleeps some milliseconds in the forward pass, and as many for the
gradient of its input and for those of its weights. So ranks do not take cores from each other, as they would on a CPU,
and each stage takes the time that it would on a device of its own: what is measured is the schedule and all that the
engines add to it. The engines of one number of ranks are built in the same processes and take their steps in turn.

- s/step: median over the rounds of the slowest rank's `train_step`.
- ideal: without any waiting.
- waits: the share of the step's time that is above it.
- simulated: the same share by cost_model/pipeline_simulation.py, of stages that take the time of their blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_runs import engine_steps, keys_of, launch_ranks, resolved_run, write_random_tokens
from benchmarks.nanogpt import Shape
from megalm.cost_model.pipeline_simulation import ActionCosts, simulate
from megalm.engine.device import claim_device
from megalm.engine.distributed import DistributedCommunicator, start_distributed
from megalm.model.float8 import Products
from megalm.model.transformer import Block
from megalm.model.weight_gradients import SplitLinear
from megalm.parallel.pipeline_schedules import PipelineSchedule
from megalm.rank_environment import rank_facts
from megalm.topology import PipelineScheduleName
from megalm.train.lifecycle.shutdown import exit_process

_VOCABULARY, _SEQUENCE = 64, 16
_WARM_UP = 2
_KINDS: dict[str, tuple[PipelineScheduleName, int]] = {
    "1f1b": ("1f1b", 1),
    "interleaved, 2 stages a rank": ("interleaved_1f1b", 2),
    "zb_v": ("zb_v", 2),
    "interleaved, 4 stages a rank": ("interleaved_1f1b", 4),
}
_MATRICES = 7  # of a block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_of:
        _rank(arguments)
        return
    print(f"{arguments.blocks} blocks of {arguments.milliseconds:g} ms, {arguments.micro_batches} micro-batches a step")
    print(f"{'ranks':>5}  {'schedule':30}{'s/step':>9}{'ideal':>8}{'waits':>8}{'simulated':>11}")
    with tempfile.TemporaryDirectory() as folder:
        write_random_tokens(Path(folder) / "data", _VOCABULARY, _SEQUENCE)
        for ranks in arguments.ranks:
            words = ["--one-of", str(ranks), "--folder", folder]
            found = json.loads(launch_ranks(ranks, words, f"{ranks} ranks").splitlines()[-1])
            ideal = _ideal(arguments, ranks)
            for kind, seconds in found.items():
                simulated = _simulated(arguments, ranks, kind)
                waits = 1 - ideal / seconds
                print(f"{ranks:5}  {kind:30}{seconds:9.3f}{ideal:8.3f}{waits:8.1%}{simulated:11.1%}", flush=True)


def _ideal(arguments: argparse.Namespace, ranks: int) -> float:
    passes: float = arguments.micro_batches * arguments.blocks / ranks
    return passes * 3 * arguments.milliseconds / 1000


def _simulated(arguments: argparse.Namespace, ranks: int, kind: str) -> float:
    name, virtual = _KINDS[kind]
    schedule = PipelineSchedule(name, ranks, virtual, arguments.micro_batches)
    actions = [schedule.actions(rank) for rank in range(ranks)]
    return statistics.mean(simulate(actions, schedule.stage_ranks, ActionCosts.equal(schedule.stages)).bubble_shares)


def _rank(arguments: argparse.Namespace) -> None:
    """One rank: takes steps with each engine in turn; the first prints the median of each."""
    torch.set_num_threads(1)
    seconds = arguments.milliseconds / 1000
    Block.run = _sleeping(Block.run, seconds)  # type: ignore[method-assign]
    Products.weight_gradient = _slower(Products.weight_gradient, seconds / _MATRICES)  # type: ignore[method-assign]
    ranks = rank_facts()
    comm = start_distributed(ranks, device := claim_device(ranks))
    engines = {}
    for kind, (_, virtual) in _KINDS.items():
        if arguments.one_of * virtual <= arguments.blocks:
            engines[kind] = _step(arguments, comm, device, kind)
    found: dict[str, list[float]] = {kind: [] for kind in engines}
    for number in range(1, _WARM_UP + arguments.rounds + 1):
        for kind, step in engines.items():
            comm.barrier()
            start = time.perf_counter()
            step(number)
            (slowest,) = comm.max([time.perf_counter() - start])
            if number > _WARM_UP:
                found[kind].append(slowest)
    if comm.is_main:
        print(json.dumps({kind: statistics.median(seconds) for kind, seconds in found.items()}))
    exit_process(0)


def _step(
    arguments: argparse.Namespace, comm: DistributedCommunicator, device: torch.device, kind: str
) -> Callable[[int], object]:
    """Build an engine; return what takes a step with it."""
    name, virtual = _KINDS[kind]
    shape = Shape(arguments.blocks, 32, 2, _VOCABULARY, _SEQUENCE, arguments.micro_batches)
    changes = {"train_batch_size": shape.batch, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": False}}
    keys = {
        **keys_of(shape, "llama"),
        "parallel.pipeline": comm.size,
        "parallel.virtual_stages": virtual,
        "parallel.pipeline_schedule": name,
    }
    run = resolved_run(arguments.folder / f"{name}-{virtual}-{comm.rank}.json", changes, keys, _VOCABULARY)
    return engine_steps(run, _VOCABULARY, device, comm, arguments.folder / "data")[1]


class _Sleep(torch.autograd.Function):
    """The same tensor, some time later; its gradient too."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, seconds: float, backward_seconds: float) -> torch.Tensor:
        ctx.seconds = backward_seconds
        time.sleep(seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None, None


def _sleeping(run: Callable[..., torch.Tensor], seconds: float) -> Callable[..., torch.Tensor]:
    def sleeping(block: Block, *args: Any) -> torch.Tensor:
        # Layers that put gradients of weights off sleep for these themselves.
        matrices = sum(isinstance(module, SplitLinear) for module in block.modules())
        assert matrices in (0, _MATRICES)
        passes = 1 if matrices else 2
        return _Sleep.apply(run(block, *args), seconds, passes * seconds)  # type: ignore[no-untyped-call]

    return sleeping


def _slower(function: Callable[..., torch.Tensor], seconds: float) -> Callable[..., torch.Tensor]:
    def slower(*args: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return function(*args)

    return slower
