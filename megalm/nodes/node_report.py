"""What a rank finds out about its node before training: versions, memory, and how fast it computes, copies and sends.

Every rank measures at the same time, as in training: cards of a node that share a bus or a supply show it here.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import megalm
from megalm.communicator import Communicator
from megalm.engine.device import fastest_seconds, measured_peak
from megalm.nodes.temperature import device_temperature
from megalm.rank_environment import RankFacts, RankPlace
from megalm.runs.run_folder import git_commit, package_version

_REPEATS = 4
_MOST_SECONDS = 1.0  # for these on a device that is very slow
_CLOCK_ROUNDS = 5
# On a GPU enough to reach the full speed; on a CPU a copy is more than caches hold, and a message takes milliseconds.
_COPY_BYTES = 1 << 26
_MESSAGE_BYTES = {"cuda": 1 << 26, "cpu": 1 << 23}
# Of a report: the more, the better.
_FIGURES = ("free_bytes", "product_flops", "copy_bytes", "link_bytes", "inner_link_bytes")


@dataclass(frozen=True)
class RankReport:
    """A rank's own figures; None is not known, or does not exist.

    Attributes:
        device: such as `cuda:3 NVIDIA H100` or `cpu`.
        versions: of what has to be equal on all nodes, by name.
        commit, code: the commit of the checkout that megalm is in, and a hash of its files; of each node's first rank.
        free_bytes: memory of the device; on a CPU, of the node.
        product_flops: of a matrix product, per second.
        copy_bytes: per second, from the CPU's memory to the GPU, or within the CPU's memory.
        link_bytes: per second, each way, to the rank at the same place of a neighbour node: the faster of two.
        inner_link_bytes: the same, to a neighbour rank of this node.
        clock_seconds: how far the node's clock is ahead of that of rank 0.
    """

    rank: int
    node: str
    device: str
    versions: dict[str, str]
    commit: str | None
    code: str | None
    free_bytes: int | None = None
    product_flops: float | None = None
    copy_bytes: float | None = None
    link_bytes: float | None = None
    inner_link_bytes: float | None = None
    clock_seconds: float = 0.0
    temperature: float | None = None
    folder_problem: str = ""

    def better_of(self, other: RankReport) -> RankReport:
        """Return this report with the better figures of both."""

        def best(*values: float | None) -> float | None:
            return max((value for value in values if value is not None), default=None)

        figures: dict[str, Any] = {name: best(getattr(self, name), getattr(other, name)) for name in _FIGURES}
        return replace(self, **figures, clock_seconds=min(self.clock_seconds, other.clock_seconds, key=abs))


def identity_of_rank(ranks: RankFacts, place: RankPlace, device: torch.device, folder_problem: str = "") -> RankReport:
    """Return what this rank is and runs, without figures."""
    is_first = ranks.local_rank == 0
    return RankReport(
        rank=ranks.rank,
        node=place.host,
        device=f"{place.device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu",
        versions=_versions(device, place.driver),
        commit=git_commit() if is_first else None,
        code=_hash_of_package() if is_first else None,
        folder_problem=folder_problem,
    )


def with_figures(report: RankReport, device: torch.device) -> RankReport:
    """Return the report with the figures that take one rank."""
    return replace(
        report,
        free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available,
        product_flops=measured_peak(
            device, low_precision=device.type == "cuda", repeats=_REPEATS, most_seconds=_MOST_SECONDS
        ),
        copy_bytes=_copy_speed(device),
        temperature=device_temperature(device),
    )


def _versions(device: torch.device, driver: str | None) -> dict[str, str]:
    found = {"python": platform.python_version(), "megalm": megalm.__version__, "torch": torch.__version__}
    found["deepspeed"] = package_version("deepspeed") or "not installed"
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = driver or "unknown"
    return found


def _hash_of_package() -> str:
    root = Path(megalm.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _copy_speed(device: torch.device) -> float:
    size = _COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = fastest_seconds(
        lambda: target.copy_(source, non_blocking=True), device, _REPEATS, most_seconds=_MOST_SECONDS
    )
    return size / seconds


# --- Between ranks ----------------------------------------------------------------------------------------------------


def pair_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return the neighbours of a ring as rounds of pairs, in each of which a place has one partner at most."""
    if count < 2:
        return []
    edges = [(place, place + 1) for place in range(count - 1)]
    rounds = [edges[::2], edges[1::2]]
    if count > 2:
        last = (count - 1, 0)
        if count % 2:
            rounds.append([last])
        else:
            rounds[1].append(last)
    return [each for each in rounds if each]


def partners(places: Sequence[RankPlace], rank: int) -> tuple[list[int | None], list[int | None]]:
    """Return the partner of `rank` in each round between nodes, and in each round within nodes; None: none.

    Args:
        places: of all ranks.
    """
    by_node: dict[str, list[int]] = {}
    for place in places:
        by_node.setdefault(place.host, []).append(place.rank)
    nodes, own = list(by_node.values()), places[rank].host
    number, index = list(by_node).index(own), by_node[own].index(rank)
    between: list[int | None] = []
    for pairs in pair_rounds(len(nodes)):
        other = _partner(pairs, number)
        between.append(nodes[other][index] if other is not None and index < len(nodes[other]) else None)
    within: list[int | None] = []
    for pairs in pair_rounds(max(map(len, nodes))):
        other = _partner(pairs, index)
        within.append(by_node[own][other] if other is not None and other < len(by_node[own]) else None)
    return between, within


def _partner(pairs: Sequence[tuple[int, int]], place: int) -> int | None:
    both = {**dict(pairs), **{second: first for first, second in pairs}}
    return both.get(place)


def with_links(report: RankReport, places: Sequence[RankPlace], device: torch.device, comm: Communicator) -> RankReport:
    """Collective: return the report with the figures that take two ranks."""
    between, within = partners(places, report.rank)
    return replace(
        report,
        link_bytes=_best_link(between, device, comm),
        inner_link_bytes=_best_link(within, device, comm),
        clock_seconds=_clock_ahead(comm),
    )


def _best_link(rounds: Sequence[int | None], device: torch.device, comm: Communicator) -> float | None:
    """A bad neighbour slows the exchange with it, but not that with the other one."""
    size, speeds = _MESSAGE_BYTES[device.type], []
    sent = torch.zeros(size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    for partner in rounds:
        comm.barrier()  # the pairs of a round at once, and no other
        if partner is None:
            continue
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]

        def exchange(operations: list[dist.P2POp] = operations) -> None:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        exchange()
        speeds.append(size / fastest_seconds(exchange, device, _REPEATS))
    return max(speeds, default=None)


def all_reduce_speed(device: torch.device, comm: Communicator) -> float:
    """Collective: return the bus bandwidth of an all-reduce over all ranks, in bytes per second."""
    size = _MESSAGE_BYTES[device.type]
    message = torch.zeros(size // 4, device=device)
    dist.all_reduce(message)
    seconds = fastest_seconds(lambda: dist.all_reduce(message), device, _REPEATS)
    return comm.max([2 * (comm.size - 1) / comm.size * size / seconds])[0]


def _clock_ahead(comm: Communicator) -> float:
    """A rank may be late after a barrier, so the smallest of several differences counts."""
    own = []
    for _ in range(_CLOCK_ROUNDS):
        comm.barrier()
        own.append(time.time())
    first = comm.broadcast(own)
    return min((ours - theirs for ours, theirs in zip(own, first, strict=True)), key=abs)
