"""What the training loop may ask of the other ranks: small values and decisions, never tensors of the model."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalm.engine.deepspeed_patches import allow_cpu_fp16_if_asked, avoid_shared_memory_op, silence_deepspeed
from megalm.engine.device import RankFacts
from megalm.errors import EXIT_FAILED, ConfigError, OtherRankFailed

T = TypeVar("T")

# Of what ranks do together.
_TIMEOUT = datetime.timedelta(minutes=60)
# Of what one rank does while the others wait, such as building datasets: as long as it lives, for gloo notices at once
# when its connection breaks. Seven days are less than the milliseconds that an int holds.
_PATIENCE = datetime.timedelta(days=7)


class DistributedCommunicator:
    """Collectives of the whole world on a gloo group of its own: control never waits for the device's queue."""

    def __init__(self, ranks: RankFacts) -> None:
        self.rank = ranks.rank
        self.size = ranks.world_size
        self.is_main = ranks.rank == 0
        self.timeout = _TIMEOUT  # of every group but this one
        self._is_first_of_node = ranks.local_rank == 0
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in the order of ranks."""
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value, group=self._group)
        return boxes

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def once_per_node(self, work: Callable[[], T]) -> T:
        """Run `work` on each node's first rank while the others wait; its result on every rank of the world.

        Raises:
            OtherRankFailed: on the ranks that did not fail themselves; those raise their own error.
        """
        return self._shared(work, self._is_first_of_node)

    def once(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 while the others wait; its result, or its failure, on every rank."""
        return self._shared(work, self.is_main)

    def _shared(self, work: Callable[[], T], mine: bool) -> T:
        outcome: tuple[bool, Any] | None = None
        failure: Exception | None = None
        if mine:
            try:
                outcome = (True, work())
            except Exception as error:  # told to everybody below, then raised again
                failure, outcome = error, (False, getattr(error, "exit_code", EXIT_FAILED))
        outcomes = [each for each in self.gather(outcome) if each is not None]
        if failure is not None:
            raise failure
        if codes := [code for good, code in outcomes if not good]:
            raise OtherRankFailed(codes[0])
        values = [value for _, value in outcomes]
        if any(value != values[0] for value in values):
            raise ConfigError(f"the nodes prepared different things: {values[0]} and others; are they set up alike?")
        return values[0]

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        return tensor.tolist()


def start_distributed(ranks: RankFacts, device: torch.device) -> DistributedCommunicator:
    """Join the process group (NCCL on CUDA, gloo on a CPU) and return the control channel.

    Raises:
        ConfigError: where the other ranks cannot be reached.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed's own search warns of what it does not find
    import deepspeed

    silence_deepspeed()
    if device.type == "cpu":
        avoid_shared_memory_op()
        allow_cpu_fp16_if_asked()

    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=_TIMEOUT)
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"rank {ranks.rank} cannot reach the others: {error}; check MASTER_ADDR and MASTER_PORT, and where another "
            "job of this machine has the port, give the launcher another: --master_port=29501"
        ) from error
    return DistributedCommunicator(ranks)
