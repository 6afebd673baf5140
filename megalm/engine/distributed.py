"""The control channel between ranks: collectives of small values and decisions, never of the model's tensors."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megalm.config.deepspeed.json_reader import DeviceFacts
from megalm.engine.deepspeed_patches import allow_cpu_fp16_for_tests, avoid_shared_memory_op, silence_deepspeed
from megalm.engine.device import DeviceReport
from megalm.engine.ranks.flight_recorder import record_collectives
from megalm.engine.ranks.rendezvous import meet, unreachable
from megalm.engine.traffic_counter import TrafficCounter
from megalm.errors import EXIT_FAILED, ConfigError, OtherRankFailed
from megalm.rank_environment import RankFacts, RankPlace

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

# For collectives that all ranks enter together.
_TIMEOUT = datetime.timedelta(minutes=60)
# For work of one rank while the others wait, such as building datasets. In effect no limit: gloo notices at once when
# a rank dies. A limit of more than 24 days would overflow an int of milliseconds.
_PATIENCE = datetime.timedelta(days=7)
# For other ranks to read that the job is refused, before rank 0 ends with the store.
_REFUSAL_PATIENCE = datetime.timedelta(seconds=10)


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


def agree_on_device(own: DeviceReport, ranks: RankFacts, store: Store) -> DeviceFacts:
    """Return the device that every rank can count on: the smallest memory, and what all can do.

    All ranks call it, before they form a process group: a rank with another device would join one that no other joins.

    Raises:
        ConfigError: on every rank, if one of them has no usable device, or another kind of device than the others.
    """
    _put(store, f"device/{ranks.rank}", own)
    if ranks.rank == 0:
        reports = [_take(store, f"device/{rank}") for rank in range(ranks.world_size)]
        _put(store, "device", _common_device(reports))
    common: DeviceFacts | str = _take(store, "device")
    if isinstance(common, DeviceFacts):
        return common
    _put(store, f"refused/{ranks.rank}", None)
    if ranks.rank == 0:  # the store ends with this process
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"refused/{rank}" for rank in range(ranks.world_size)], _REFUSAL_PATIENCE)
    raise ConfigError(common)


def _put(store: Store, key: str, value: object) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # takes bytes too


def _take(store: Store, key: str) -> Any:
    """Return the value, once it is there."""
    return pickle.loads(store.get(key))


def _common_device(reports: Sequence[DeviceReport]) -> DeviceFacts | str:
    """Return the device that all ranks have, or why there is none."""
    if problems := sorted({report.problem for report in reports if report.problem}):
        others = f" (and {len(problems) - 1} more problems of this kind)" if len(problems) > 1 else ""
        return problems[0] + others
    kinds = {report.facts.kind: report.node for report in reports}
    if len(kinds) > 1:
        return (
            f"node {kinds['cpu']} would train on the CPU, because CUDA finds no GPU there, and node {kinds['cuda']} on "
            "GPUs; mend that node or leave it out, or set DS_ACCELERATOR=cpu on all nodes"
        )
    facts = [report.facts for report in reports]
    host = [each.host_memory_bytes for each in facts if each.host_memory_bytes is not None]
    return replace(
        facts[0],
        bf16=all(each.bf16 for each in facts),
        memory_bytes=min(each.memory_bytes for each in facts),
        host_memory_bytes=min(host, default=None),
        float8=all(each.float8 for each in facts),
        compiles=all(each.compiles for each in facts),
    )


def _form_group(ranks: RankFacts, device: torch.device, store: Store) -> None:
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=_TIMEOUT,
            device_id=device if on_gpu and ranks.world_size > 1 else None,  # as DeepSpeed does
        )
    except dist.DistNetworkError as error:
        raise unreachable(ranks.rank, error) from error


def start_distributed(
    ranks: RankFacts, device: torch.device, traffic: TrafficCounter | None = None, store: Store | None = None
) -> DistributedCommunicator:
    """Join the process group (NCCL on CUDA, gloo on a CPU) and return the control channel.

    Args:
        traffic: counts what goes through the groups from here on.
        store: of `meet`; None: meet the other ranks first.

    Raises:
        ConfigError: the other ranks cannot be reached.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed's own detection warns about missing devices
    import deepspeed

    silence_deepspeed()
    record_collectives()
    if traffic is not None:
        traffic.install()
    if device.type == "cpu":
        avoid_shared_memory_op()
        allow_cpu_fp16_for_tests()
    if not dist.is_initialized():  # a caller may have joined a group of its own
        _form_group(ranks, device, store or meet(ranks, RankPlace.of_this_process(ranks.rank, str(device))).store)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=_TIMEOUT)  # takes the existing group
    return DistributedCommunicator(ranks)
