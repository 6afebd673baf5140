"""Which nodes are bad or slow, by the reports of all ranks: arithmetic alone, the same on every rank."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megalm.nodes.node_report import RankReport
from megalm.utils.formatting import format_bytes

# Beside train.slow_factor, which is the matrix product's: buses and switches are shared with others, memory is not.
# CPUs are shared with other programs, and measured over TCP.
_LINK_FACTORS = {"cuda": 1.5, "cpu": 3.0}
_MEMORY_FACTOR = 1.25
_CLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class NodeFinding:
    """What is wrong with a node.

    Attributes:
        forbids: whether a run with this node would be wrong or fail, not only slow.
    """

    node: str
    what: str
    forbids: bool = False

    def __str__(self) -> str:
        return f"node {self.node}: {self.what}"


@dataclass(frozen=True)
class _Figure:
    name: str
    of: Callable[[RankReport], float | None]
    factor: float
    shown: Callable[[float], str | None]


def judge_nodes(reports: Sequence[RankReport], slow_factor: float) -> list[NodeFinding]:
    """Return what is wrong, node by node.

    Args:
        reports: of all ranks, in their order.
        slow_factor: a device whose matrix product takes this multiple of the median is slow.
    """
    unseen = {report.node: report.folder_problem for report in reports if report.folder_problem}
    found = [NodeFinding(node, problem, forbids=True) for node, problem in unseen.items()]
    found += [*_differences(reports), *_clocks(reports)]
    device = "cuda" if any(report.device.startswith("cuda") for report in reports) else "cpu"
    for figure in _figures(slow_factor, device):
        found += _below_median(reports, figure)
    order = list(dict.fromkeys(report.node for report in reports))
    return sorted(found, key=lambda finding: (not finding.forbids, order.index(finding.node)))


def _figures(slow_factor: float, device: str) -> tuple[_Figure, ...]:
    links = _LINK_FACTORS[device]

    def per_second(value: float) -> str:
        return f"{format_bytes(value)}/s"

    return (
        _Figure(
            "matrix product", lambda it: it.product_flops, slow_factor, lambda value: f"{value / 1e12:.3g} TFLOP/s"
        ),
        _Figure("copy", lambda it: it.copy_bytes, links, per_second),
        _Figure("exchange with other nodes", lambda it: it.link_bytes, links, per_second),
        _Figure("exchange within the node", lambda it: it.inner_link_bytes, links, per_second),
        _Figure("free memory", lambda it: it.free_bytes, _MEMORY_FACTOR, format_bytes),
    )


def _below_median(reports: Sequence[RankReport], figure: _Figure) -> Iterator[NodeFinding]:
    """Yield each node's worst rank that is below the median by the figure's factor.

    Of an even number the upper one of the middle: of two nodes the slow one is named.
    """
    values = [(report, value) for report in reports if (value := figure.of(report)) is not None]
    if not values:
        return
    median = statistics.median_high(value for _, value in values)
    worst: dict[str, tuple[RankReport, float]] = {}
    for report, value in values:
        if value * figure.factor < median and value < worst.get(report.node, (report, median))[1]:
            worst[report.node] = report, value
    for node, (report, value) in worst.items():
        share = f"{value / median:.2f} of the median {figure.shown(median)}"
        yield NodeFinding(node, f"{figure.name} {figure.shown(value)}, {share} (rank {report.rank}, {report.device})")


def _differences(reports: Sequence[RankReport]) -> Iterator[NodeFinding]:
    names = dict.fromkeys(name for report in reports for name in report.versions)
    for name in names:
        for node, own, usual in _minority(reports, partial(_version, name)):
            yield NodeFinding(node, f"{name} {own}, the others have {usual}", forbids=name != "driver")
    known = [report for report in reports if report.code is not None]
    for node, own, usual in _minority(known, lambda report: (report.code, report.commit)):
        if own[0] == usual[0]:
            continue  # only what git knows about the same files differs
        commits = [value[1] or "unknown" for value in (own, usual)]
        which = f"commit {commits[0]}, the others have {commits[1]}"
        if commits[0] == commits[1]:
            which = f"files that differ from the others' at commit {commits[0]}"
        yield NodeFinding(node, f"another megalm: {which}", forbids=True)


def _version(name: str, report: RankReport) -> str:
    return report.versions.get(name, "none")


def _minority(reports: Sequence[RankReport], value_of: Callable[[RankReport], Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield node, own value and the usual one of each node that has another; of equally many, rank 0's is usual."""
    values = {report.node: value_of(report) for report in reversed(reports)}  # of each node's first rank
    counts = Counter(values.values())
    first = values[reports[0].node] if reports else None
    usual = max(counts, key=lambda value: (counts[value], value == first), default=None)
    for node in dict.fromkeys(report.node for report in reports):
        if values[node] != usual:
            yield node, values[node], usual


def _clocks(reports: Sequence[RankReport]) -> Iterator[NodeFinding]:
    """Yield each node whose clock is far from the one that most agree with; of equally many, from rank 0's."""
    clocks = {report.node: report.clock_seconds for report in reports}

    def agree(time: float) -> int:
        return sum(abs(other - time) <= _CLOCK_SECONDS for other in clocks.values())

    usual = max([reports[0].clock_seconds, *clocks.values()], key=agree)  # the first of the best
    off = {node: seconds - usual for node, seconds in clocks.items()}
    for node, seconds in off.items():
        if abs(seconds) > _CLOCK_SECONDS:
            side = "ahead of" if seconds > 0 else "behind"
            yield NodeFinding(node, f"its clock is {abs(seconds):.1f} s {side} the others'")
