"""Schedules of a pipeline: the time of a step, and the share of it that ranks wait, beside what the simulation says.

    python benchmarks/pipelines.py [--ranks 2 4] [--blocks 8] [--micro-batches 8] [--milliseconds 5] [--rounds 5]

What a block computes is tiny; beside it, it sleeps some milliseconds in the forward pass and twice as many in the
backward pass. So ranks do not take cores from each other, as they would on a CPU, and each stage takes the time that it
would on a device of its own: what is measured is the schedule and all that the engines add to it. The engines of one
number of ranks are built in the same processes and take their steps in turn.

- s/step: median over the rounds of the slowest rank's `train_step`.
- ideal: without any waiting.
- waits: the share of the step's time that is above it.
- simulated: the same share by cost_model/pipeline_simulation.py, of stages that take the time of their blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megalm.engine.deepspeed_patches import (  # noqa: E402
    limit_openmp_spin,
    silence,
)

limit_openmp_spin()
silence()

import torch  # noqa: E402

from benchmarks.launch_ranks import launch_ranks  # noqa: E402
from benchmarks.random_data import random_batches, write_random_tokens  # noqa: E402
from megalm.config.deepspeed.json_reader import read_deepspeed_json  # noqa: E402
from megalm.config.loading import load_run_config  # noqa: E402
from megalm.cost_model.pipeline_simulation import ActionCosts, simulate  # noqa: E402
from megalm.engine.build import build_engine  # noqa: E402
from megalm.engine.device import claim_device, device_facts  # noqa: E402
from megalm.engine.distributed import start_distributed  # noqa: E402
from megalm.model.model_config import build_model_config  # noqa: E402
from megalm.model.transformer import Block  # noqa: E402
from megalm.parallel.pipeline_schedules import PipelineSchedule  # noqa: E402
from megalm.planning.resolve import resolve  # noqa: E402
from megalm.rank_environment import rank_facts  # noqa: E402
from megalm.train.lifecycle.shutdown import exit_process  # noqa: E402

_VOCABULARY, _SEQUENCE = 64, 16
_WARM_UP = 2
_BACKWARD = 2  # times the forward pass


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
    print(f"{'ranks':>5}{'virtual stages':>16}{'s/step':>9}{'ideal':>8}{'waits':>8}{'simulated':>11}")
    with tempfile.TemporaryDirectory() as folder:
        write_random_tokens(Path(folder) / "data", _VOCABULARY, _SEQUENCE)
        for ranks in arguments.ranks:
            words = ["--one-of", str(ranks), "--folder", folder]
            found = json.loads(launch_ranks(ranks, words, f"{ranks} ranks").splitlines()[-1])
            ideal = _ideal(arguments, ranks)
            for virtual, seconds in found.items():
                simulated = _simulated(arguments, ranks, int(virtual))
                waits = 1 - ideal / seconds
                print(f"{ranks:5}{virtual:>16}{seconds:9.3f}{ideal:8.3f}{waits:8.1%}{simulated:11.1%}", flush=True)


def _ideal(arguments: argparse.Namespace, ranks: int) -> float:
    passes: float = arguments.micro_batches * arguments.blocks / ranks
    return passes * (1 + _BACKWARD) * arguments.milliseconds / 1000


def _simulated(arguments: argparse.Namespace, ranks: int, virtual: int) -> float:
    schedule = _schedule(ranks, virtual, arguments.micro_batches)
    actions = [schedule.actions(rank) for rank in range(ranks)]
    costs = ActionCosts.equal(schedule.stages, 1, _BACKWARD / 2, _BACKWARD / 2)
    return statistics.mean(simulate(actions, schedule.stage_ranks, costs).bubble_shares)


def _schedule(ranks: int, virtual: int, micro_batches: int) -> PipelineSchedule:
    return PipelineSchedule("1f1b" if virtual == 1 else "interleaved_1f1b", ranks, virtual, micro_batches)


def _rank(arguments: argparse.Namespace) -> None:
    """One rank: takes steps with each engine in turn; the first prints the median of each."""
    torch.set_num_threads(1)
    Block.run = _sleeping(Block.run, arguments.milliseconds / 1000)  # type: ignore[method-assign]
    ranks = rank_facts()
    comm = start_distributed(ranks, device := claim_device(ranks))
    engines = {}
    for virtual in (1, 2, 4):
        if arguments.one_of * virtual <= arguments.blocks:
            engines[virtual] = _step(arguments, comm, device, virtual)
    found: dict[int, list[float]] = {virtual: [] for virtual in engines}
    for number in range(1, _WARM_UP + arguments.rounds + 1):
        for virtual, step in engines.items():
            comm.barrier()
            start = time.perf_counter()
            step(number)
            (slowest,) = comm.max([time.perf_counter() - start])
            if number > _WARM_UP:
                found[virtual].append(slowest)
    if comm.is_main:
        print(json.dumps({virtual: statistics.median(seconds) for virtual, seconds in found.items()}))
    exit_process(0)


def _step(arguments: argparse.Namespace, comm: Any, device: torch.device, virtual: int) -> Callable[[int], None]:
    """Build an engine; return what takes a step with it."""
    content = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    content |= {
        "train_batch_size": arguments.micro_batches,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": False},
    }
    path = arguments.folder / f"{virtual}-{comm.rank}.json"
    path.write_text(json.dumps(content))
    overrides = [
        "model.style=llama",
        f"model.num_hidden_layers={arguments.blocks}",
        "model.hidden_size=32",
        "model.num_attention_heads=2",
        f"data.sequence_length={_SEQUENCE}",
        f"parallel.pipeline={comm.size}",
        f"parallel.virtual_stages={virtual}",
    ]
    facts = device_facts(comm.size)
    run = resolve(load_run_config(None, overrides), read_deepspeed_json(str(path)), comm.size, facts, _VOCABULARY)
    shape = build_model_config(run.config.model, _VOCABULARY, _SEQUENCE)
    engine = build_engine(run, shape, device, comm)
    loader = random_batches(run, arguments.folder / "data", comm.rank)

    def step(number: int) -> None:
        engine.train_step(loader.batch((number - 1) * run.batch.global_batch), number, 1e-4)

    return step


class _Sleep(torch.autograd.Function):
    """The same tensor, some time later; its gradient too."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(_BACKWARD * ctx.seconds)
        return gradients[0], None


def _sleeping(run: Callable[..., torch.Tensor], seconds: float) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: _Sleep.apply(run(*args, **options), seconds)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
