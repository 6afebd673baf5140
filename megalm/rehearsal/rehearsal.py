"""Run a resolved run as one of its ranks, on a fake GPU: start, training steps, a validation batch, a sample.

Everything above torch is real: configuration, process groups, model, engine, DeepSpeed. This process must have loaded
the library of fake_cuda_library.py before torch, and plays no second rank afterwards.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from megalm.data.sampling.batch_loader import BatchLoader
from megalm.data.sampling.samples import Samples
from megalm.engine.build import build_engine
from megalm.engine.device import pin_batch
from megalm.engine.distributed import DistributedCommunicator, start_distributed
from megalm.engine.interface import Engine, StepResult
from megalm.engine.traffic_counter import TrafficCounter
from megalm.rank_environment import rank_facts
from megalm.rehearsal import stand_ins
from megalm.rehearsal.fake_cuda import FakeCuda, GpuProperties
from megalm.rehearsal.rehearsal_report import Phase, PhaseName, Rehearsal, RehearsalCase
from megalm.rehearsal.watcher import Watcher
from megalm.train.datasets import batch_layout

T = TypeVar("T")

_PROMPT_TOKENS = 64  # as text_samples.py pads them


class AgreeingCommunicator(DistributedCommunicator):
    """The control channel of a rank whose neighbors all say the same; its collectives are counted."""

    def __init__(self, real: DistributedCommunicator) -> None:
        self.__dict__ = vars(real)

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value] * self.size

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        dist.all_reduce(torch.empty(len(values), dtype=torch.float64), op=operation, group=self.process_group)
        return [value * (self.size if operation == dist.ReduceOp.SUM else 1) for value in values]


class ZeroSamples(Samples):
    """Samples of token 0, without a dataset."""

    def __init__(self, length: int, document_mask: bool) -> None:
        self.sequence_length, self.document_mask = length, document_mask

    def sample(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        tokens = np.zeros(self.sequence_length, np.int64)
        return tokens, tokens

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        return np.zeros(self.sequence_length, np.int32)

    def target_count(self, index: int) -> int:
        return self.sequence_length


class _Recorder:
    """Records the phases of a rehearsal."""

    def __init__(self, watcher: Watcher, traffic: TrafficCounter) -> None:
        self._watcher, self._traffic = watcher, traffic
        self.phases: list[Phase] = []

    def __call__(self, name: PhaseName, work: Callable[[], T]) -> T:
        """Run `work`; the last phase of a name is kept, and one that fails is kept up to there."""
        self._watcher.begin()
        self._traffic.start()
        try:
            return work()
        finally:
            device, host = (self._watcher.memory[kind] for kind in ("cuda", "cpu"))
            events, traffic = tuple(self._watcher.events()), tuple(self._traffic.stop())
            phase = Phase(name, device.peak, device.peak_place, device.live, host.peak, events, traffic)
            self.phases = [*(other for other in self.phases if other.name != name), phase]


def rehearse(case: RehearsalCase) -> Rehearsal:
    """Rehearse one rank of a run; an error of the run is the rehearsal's `failure`."""
    began = time.monotonic()
    run = case.run
    local = case.rank % case.ranks_per_node
    watcher, traffic = Watcher(), TrafficCounter()
    name = run.device.name or "GPU"
    FakeCuda(GpuProperties(name, run.device.memory_bytes, *case.capability), case.ranks_per_node, watcher).install()
    stand_ins.install(case.capability, watcher)
    _join(case, local)
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    record = _Recorder(watcher, traffic)
    updated, failure = False, None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), watcher:
            comm = AgreeingCommunicator(start_distributed(rank_facts(), device, traffic))
            # Threads draw initial weights, where the watcher sees nothing and numbers would be computed: without them.
            build = partial(build_engine, run, case.shape, device, comm, traffic=traffic, initial_weights=False)
            engine = record("start", build)
            updated = _train(case, engine, record)
            _use(case, engine, record)
    except Exception as error:  # any error of the run: it is what the rehearsal is for
        failure = "".join(traceback.format_exception(error))
    return Rehearsal(
        case.rank, case.stage, case.parameters, tuple(record.phases), failure, updated, time.monotonic() - began
    )


def _join(case: RehearsalCase, local: int) -> None:
    """Set what a launcher sets, and join a group of the run's size in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = case.run.topology.world_size
    os.environ |= {
        "RANK": str(case.rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(min(world, case.ranks_per_node)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "DS_ACCELERATOR": "cuda",
    }
    dist.init_process_group("fake", rank=case.rank, world_size=world, store=FakeStore())


def _train(case: RehearsalCase, engine: Engine, record: _Recorder) -> bool:
    """Train and evaluate; return whether the last step's update was applied."""
    run = case.run
    samples = ZeroSamples(run.config.data.sample_length, run.config.data.masks_documents)
    with BatchLoader(samples, batch_layout(run, run.topology.coordinate(case.rank).data), pin_batch) as batches:

        def step(number: int) -> StepResult:
            return engine.train_step(batches.batch((number - 1) * run.batch.global_batch), number, 1e-3)

        for number in range(1, case.steps + 1):
            result = record("step", partial(step, number))
        micro_batches = batches.batch(0).micro_batches[:1]
    record("validation", lambda: engine.evaluate(micro_batches))
    return not (result.skipped or result.refused)


def _use(case: RehearsalCase, engine: Engine, record: _Recorder) -> None:
    prompts = max(1, len(case.run.config.sample.prompts))
    tokens = np.zeros((prompts, min(_PROMPT_TOKENS, case.run.config.data.sample_length)), np.int64)
    record("sample", lambda: engine.next_token_logits(tokens, np.zeros(prompts, np.int64)))
