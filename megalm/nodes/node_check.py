"""The check of all nodes at the start of a job on more than one: some seconds that can save hours.

Bad and slow nodes are named. With `slurm.exclude_bad` the job leaves them: slurm/train.sh gives their names to Slurm
and queues the job again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megalm.communicator import Communicator
from megalm.errors import ConfigError
from megalm.nodes.node_report import RankReport, all_reduce_speed, identity_of_rank, with_figures, with_links
from megalm.nodes.node_verdict import NodeFinding, judge_nodes
from megalm.planning.resolve import ResolvedRun
from megalm.rank_environment import RankFacts, RankPlace, job_and_restarts
from megalm.runs.run_folder import RunFolder, read_mapping
from megalm.utils.atomic_files import write_json
from megalm.utils.formatting import format_bytes

# Set by slurm/train.sh: where the names of nodes to leave out are written before the job ends to be queued again.
EXCLUDE_FILE = "MEGALM_EXCLUDE_FILE"
_MOST_EXCLUSIONS = 3  # of a job
# A network file system may show a file of another node a moment later.
_PATIENCE_SECONDS = 3.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class NodeCheck:
    """The result, the same on every rank.

    Attributes:
        excludes: the job leaves these nodes and is to be queued again.
        fact: a line for the facts at the start of the run; None: nothing was checked.
    """

    findings: tuple[NodeFinding, ...] = ()
    excludes: tuple[str, ...] = ()
    fact: str | None = None


def check_nodes(
    run: ResolvedRun,
    folder: RunFolder,
    attempt: int,
    ranks: RankFacts,
    device: torch.device,
    comm: Communicator,
    places: Sequence[RankPlace],
    info: Callable[[str], None],
) -> NodeCheck:
    """Collective: measure and compare all nodes, and write node_check.json; with one node do nothing.

    Raises:
        ConfigError: a run on these nodes would be wrong or fail, and the job is not to leave them.
    """
    if not run.config.train.check_nodes or ranks.world_size == ranks.local_world_size:
        return NodeCheck()
    began = time.perf_counter()
    reports, all_reduce = measure_nodes(folder, ranks, device, comm, places, run.config.train.slow_factor)
    findings = judge_nodes(reports, run.config.train.slow_factor)
    seconds = comm.max([time.perf_counter() - began])[0]
    bad = tuple(dict.fromkeys(finding.node for finding in findings))
    why_stay = (
        comm.once(lambda: _why_stay(folder, set(bad), {each.host for each in places}))
        if bad and run.config.slurm.exclude_bad
        else None
    )
    excludes = bad if why_stay == "" else ()
    comm.once(lambda: _write(folder, attempt, reports, findings, excludes, all_reduce, seconds))
    for finding in findings:
        info(f"  WARNING: {finding}")
    if excludes:
        info(f"the job leaves {', '.join(excludes)} (slurm.exclude_bad): it is queued again for other nodes")
        return NodeCheck(tuple(findings), excludes)
    if why_stay:
        info(f"  note: {why_stay}; {_advice(bad)}")
    if forbidding := [finding for finding in findings if finding.forbids]:
        raise ConfigError(*(f"{finding}; {_advice(bad)}" for finding in forbidding))
    return NodeCheck(tuple(findings), fact=_fact(reports, findings, all_reduce, seconds))


def _why_stay(folder: RunFolder, bad: set[str], nodes: set[str]) -> str:
    """Return why this job cannot leave nodes; empty: it can. A job that finds bad nodes each time has another fault."""
    if EXCLUDE_FILE not in os.environ:
        return "slurm.exclude_bad works in a job of slurm/train.sh"
    if bad == nodes:
        return "slurm.exclude_bad leaves no job without nodes, and all are named"
    job, known = job_and_restarts()[0], read_mapping(folder.bad_nodes).get("nodes", [])
    times = len({entry.get("time") for entry in known if entry.get("excluded") and entry.get("job") == job})
    return f"slurm.exclude_bad has left nodes {times} times in this job" if times >= _MOST_EXCLUSIONS else ""


def _advice(bad: Sequence[str]) -> str:
    return f"mend it, leave it out (--exclude={','.join(bad)}), or train with it (train.check_nodes=false)"


def measure_nodes(
    folder: RunFolder,
    ranks: RankFacts,
    device: torch.device,
    comm: Communicator,
    places: Sequence[RankPlace],
    slow_factor: float,
) -> tuple[list[RankReport], float]:
    """Collective: return the reports of all ranks, and the bus bandwidth of an all-reduce in bytes per second.

    What seems slow is measured once more, and the better figures count: something else may have run meanwhile.
    """
    own = identity_of_rank(ranks, places[ranks.rank], device, _folder_problem(folder, ranks, places, comm))
    if any(comm.gather(own.folder_problem)):  # a rank that sees no folder ends itself in some seconds
        return comm.gather(own), 0.0

    def measured() -> RankReport:
        return with_links(with_figures(own, device), places, device, comm)

    all_reduce = all_reduce_speed(device, comm)
    own = measured()
    reports = comm.gather(own)
    if any(not finding.forbids for finding in judge_nodes(reports, slow_factor)):
        reports = comm.gather(own.better_of(measured()))
        all_reduce = max(all_reduce, all_reduce_speed(device, comm))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return reports, all_reduce


def _folder_problem(folder: RunFolder, ranks: RankFacts, places: Sequence[RankPlace], comm: Communicator) -> str:
    """Collective: each node writes a file into the run folder, which all others read; return what is wrong on this one.

    The folder is the one of rank 0: a node that does not see rank 0's file has another, and is not looked for.
    """
    words, is_first = comm.broadcast(os.urandom(8).hex()), ranks.local_rank == 0
    own, problem = _token(folder, ranks.rank), ""
    if is_first:
        try:
            own.write_text(words)
        except OSError as error:
            problem = f"cannot write into {folder.path} ({error.strerror})"
    comm.barrier()
    if is_first and not problem and _unseen(folder, [0], words):
        problem = f"does not see in {folder.path} what rank 0 wrote there; it has to be on a file system of all nodes"
    good = [rank for rank, fine in enumerate(comm.gather(is_first and not problem)) if fine]
    if is_first and not problem and (unseen := _unseen(folder, good, words)):
        problem = f"does not see in {folder.path} what {', '.join(places[rank].host for rank in unseen)} wrote there"
    comm.barrier()
    if is_first:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
    return problem


def _token(folder: RunFolder, rank: int) -> Path:
    return folder.path / f".node-of-rank-{rank}"


def _unseen(folder: RunFolder, ranks: Sequence[int], words: str) -> list[int]:
    """Return those of `ranks` whose file does not have `words`, after some seconds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while unseen := [rank for rank in ranks if _read(_token(folder, rank)) != words]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return unseen


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


# --- What stays -------------------------------------------------------------------------------------------------------


def _write(
    folder: RunFolder,
    attempt: int,
    reports: Sequence[RankReport],
    findings: Sequence[NodeFinding],
    excludes: Sequence[str],
    all_reduce: float,
    seconds: float,
) -> None:
    """Write node_check.json, add to bad_nodes.json, and tell slurm/train.sh which nodes to leave out; on rank 0."""
    now, job = time.strftime("%Y-%m-%dT%H:%M:%S%z"), job_and_restarts()[0]
    found = [asdict(finding) for finding in findings]
    head = {"time": now, "job": job, "attempt": attempt, "seconds": round(seconds, 3)}
    ranks = [asdict(report) for report in reports]
    write_json(folder.node_check, {**head, "all_reduce_bytes": all_reduce, "findings": found, "ranks": ranks})
    if findings:
        known = read_mapping(folder.bad_nodes).get("nodes", [])
        added = [{"time": now, "job": job, "excluded": each.node in excludes, **asdict(each)} for each in findings]
        write_json(folder.bad_nodes, {"nodes": [*known, *added]})
    if excludes:
        Path(os.environ[EXCLUDE_FILE]).write_text(",".join(excludes) + "\n")


def _fact(reports: Sequence[RankReport], findings: Sequence[NodeFinding], all_reduce: float, seconds: float) -> str:
    """Return the line of the opening facts."""
    nodes = len({report.node for report in reports})
    slowest, node = min((report.product_flops or 0.0, report.node) for report in reports)
    fastest = max(report.product_flops or 0.0 for report in reports)
    clocks = max(report.clock_seconds for report in reports) - min(report.clock_seconds for report in reports)
    bad = len({finding.node for finding in findings})
    return (
        f"{nodes} nodes, {bad or 'none'} of them bad; slowest {node} at "
        f"{slowest / fastest:.0%} of the fastest, all-reduce {format_bytes(all_reduce)}/s, clocks within "
        f"{clocks * 1e3:.0f} ms; checked in {seconds:.1f} s"
    )
