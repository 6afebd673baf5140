"""The control channel between ranks: collectives of small values and decisions, never of the model's tensors."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalm.engine.deepspeed_patches import allow_cpu_fp16_for_tests, avoid_shared_memory_op, silence_deepspeed
from megalm.engine.traffic_counter import TrafficCounter
from megalm.errors import EXIT_FAILED, ConfigError, OtherRankFailed
from megalm.rank_environment import RankFacts

T = TypeVar("T")

# For collectives that all ranks enter together.
_TIMEOUT = datetime.timedelta(minutes=60)
# For work of one rank while the others wait, such as building datasets. In effect no limit: gloo notices at once when
# a rank dies. A limit of more than 24 days would overflow an int of milliseconds.
_PATIENCE = datetime.timedelta(days=7)


class DistributedCommunicator:
    """The `Communicator` of all ranks, on its own gloo group, so that control never waits for the device's queue."""

    def __init__(self, ranks: RankFacts) -> None:
        self.rank = ranks.rank
        self.size = ranks.world_size
        self.is_main = ranks.rank == 0
        self.timeout = _TIMEOUT  # for every group but this one
        self._is_first_of_node = ranks.local_rank == 0
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def process_group(self) -> dist.ProcessGroup:
        return self._group

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return all ranks' values, in rank order, on every rank."""
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value, group=self._group)
        return boxes

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return element-wise sums over all ranks, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def once_per_node(self, work: Callable[[], T]) -> T:
        """Run `work` on each node's first rank while the others wait; return its result on every rank.

        Raises:
            OtherRankFailed: on the ranks that did not fail; a rank that fails raises its own error.
            ConfigError: the nodes' results differ.
        """
        return self._shared(work, self._is_first_of_node)

    def once(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 while the others wait; return its result on every rank.

        Raises:
            OtherRankFailed: on the other ranks, if `work` fails; rank 0 raises its own error.
        """
        return self._shared(work, self.is_main)

    def _shared(self, work: Callable[[], T], mine: bool) -> T:
        outcome: tuple[bool, Any] | None = None
        failure: Exception | None = None
        if mine:
            try:
                outcome = (True, work())
            except Exception as error:  # sent to all ranks below, then raised again
                failure, outcome = error, (False, getattr(error, "exit_code", EXIT_FAILED))
        outcomes = [each for each in self.gather(outcome) if each is not None]
        if failure is not None:
            raise failure
        if codes := [code for good, code in outcomes if not good]:
            raise OtherRankFailed(codes[0])
        values = [value for _, value in outcomes]
        if any(value != values[0] for value in values):
            raise ConfigError(f"the nodes have different results, {values[0]} and others; set all nodes up alike")
        return values[0]

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        return tensor.tolist()


def start_distributed(
    ranks: RankFacts, device: torch.device, traffic: TrafficCounter | None = None
) -> DistributedCommunicator:
    """Join the process group (NCCL on CUDA, gloo on a CPU) and return the control channel.

    Args:
        traffic: counts what goes through the groups from here on.

    Raises:
        ConfigError: the other ranks cannot be reached.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed's own detection warns about missing devices
    import deepspeed

    silence_deepspeed()
    if traffic is not None:
        traffic.install()
    if device.type == "cpu":
        avoid_shared_memory_op()
        allow_cpu_fp16_for_tests()

    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
            _join_after_restart(backend, ranks)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=_TIMEOUT)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"rank {ranks.rank} cannot reach the other ranks: {error}; check MASTER_ADDR and MASTER_PORT; if another "
            "job of this machine uses the port, choose another one with --master_port=29501"
        ) from error
    return DistributedCommunicator(ranks)


def _join_after_restart(backend: str, ranks: RankFacts) -> None:
    """Join the process group after torchrun has restarted its workers.

    Its agent keeps one store for all restarts, in which the addresses of the killed workers still are: without a prefix
    of its own a worker connects to those.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, ranks.world_size, is_master=False, timeout=_TIMEOUT)  # type: ignore[attr-defined]
    prefix = f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(prefix, store),  # type: ignore[attr-defined]
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_TIMEOUT,
    )
