"""torch's flight recorder: the last collectives of each rank, written by all when a job hangs, and who has not joined.

NCCL and gloo record alike. The files are those of torch's own tools: `torchfrtrace --prefix nccl_rank_ FOLDER`.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from megalm.engine.interface import StalledCollective

_COLLECTIVES = "2000"  # that each rank remembers
# Name of a dump up to its rank -> torch's function that gives its content; a build without NCCL lacks the first.
_NCCL_PREFIX = "nccl_rank_"
_DUMPS = {_NCCL_PREFIX: "_dump_nccl_trace", "gloo_rank_": "_dump_fr_trace"}


def record_collectives() -> None:
    """Let torch record the collectives; call before any process group exists. What is set already stays."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", _COLLECTIVES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_DYNAMIC_FILE_NAME", "1")  # the run folder is not known yet


class FlightRecorder:
    """The recorder of this rank.

    Args:
        folder: for the dumps of all ranks; NCCL's own, at its timeout, goes there too. Older ones of this rank go.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / _NCCL_PREFIX))
        if dist.is_nccl_available():  # which makes no folder for its own dump
            folder.mkdir(parents=True, exist_ok=True)
        for prefix in _DUMPS:
            with contextlib.suppress(OSError):
                (folder / f"{prefix}{rank}").unlink(missing_ok=True)

    def dump(self) -> None:
        """Write what this rank has recorded; an error in writing must not hide the original problem."""
        for prefix, name in _DUMPS.items():
            function = getattr(_distributed_c10d, name, None)
            if function is None:
                continue
            with contextlib.suppress(OSError, RuntimeError, ValueError, pickle.PickleError):
                content = pickle.loads(function())
                if content.get("entries"):
                    content["pg_config"] = {**_known_groups(), **_named_groups(content)}
                    self._folder.mkdir(parents=True, exist_ok=True)
                    (self._folder / f"{prefix}{self._rank}").write_bytes(pickle.dumps(content, protocol=2))

    def stalled(self) -> StalledCollective | None:
        """Return the collective in which ranks wait for others that have not joined; None: no such is in the dumps."""
        for prefix in _DUMPS:
            with contextlib.suppress(OSError, ValueError, KeyError, AssertionError, pickle.PickleError, EOFError):
                if (found := find_stalled(read_dumps(self._folder, prefix))) is not None:
                    return found
        return None


def _known_groups() -> dict[str, dict[str, str]]:
    """Return the groups of this rank as a dump has them; gloo's does not."""
    world = dist.distributed_c10d._world
    return {
        name: {"name": name, "desc": group.group_desc, "ranks": str(list(world.pg_group_ranks[group]))}
        for group, name in world.pg_names.items()
        if isinstance(group, dist.ProcessGroup)
    }


def _named_groups(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {name: group for name, group in content["pg_config"].items() if name and group["ranks"] != "[]"}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_dumps(folder: Path, prefix: str) -> dict[int, dict[str, Any]]:
    """Return rank -> dump of the files of a prefix, read by torch's own loader."""
    from torch.distributed.flight_recorder.components.loader import read_dump

    paths = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    dumps = [read_dump(prefix, str(path)) for path in paths]
    return {int(dump["rank"]): dump for dump in dumps}  # type: ignore[arg-type]


@dataclass(frozen=True)
class _GroupRecord:
    """What each rank of a group that has a dump has entered: rank -> number of the collective -> entry."""

    name: str
    ranks: tuple[int, ...]
    entered: dict[int, dict[int, Mapping[str, Any]]] = field(default_factory=dict)

    def stalled(self) -> StalledCollective | None:
        """Return the first collective that a rank waits in and another has not joined."""
        last = {rank: max(entries, default=0) for rank, entries in self.entered.items()}
        for number in sorted({n for entries in self.entered.values() for n in entries if _is_pending(entries[n])}):
            joined = {rank: entries[number] for rank, entries in self.entered.items() if number in entries}
            names = [str(entry["profiling_name"]) for entry in joined.values()]
            usual = max(names, key=names.count)
            others = {rank: str(entry["profiling_name"]) for rank, entry in joined.items()}
            others = {rank: name for rank, name in others.items() if name != usual}
            missing = sorted(others) or [rank for rank in self.ranks if last.get(rank, 0) < number]
            waiting = [rank for rank in joined if rank not in missing and _is_pending(joined[rank])]
            if missing and waiting:
                return StalledCollective(
                    collective=_operation(usual),
                    group=self.name,
                    number=number,
                    waiting=tuple(sorted(waiting)),
                    missing=tuple(missing),
                    instead=next(map(_operation, others.values()), None),
                    since_ns=min(int(joined[rank]["time_created_ns"]) for rank in waiting),
                )
        return None


def find_stalled(dumps: Mapping[int, Mapping[str, Any]]) -> StalledCollective | None:
    """Return the collective at the root: ranks wait in it for others that wait nowhere themselves, if there is one."""
    found = [stalled for group in _groups(dumps) if (stalled := group.stalled()) is not None]
    found = found or list(_stalled_messages(dumps))
    waiting = {rank for stalled in found for rank in stalled.waiting}
    return min(found, key=lambda it: (set(it.missing) <= waiting, it.since_ns), default=None)


def _groups(dumps: Mapping[int, Mapping[str, Any]]) -> Iterable[_GroupRecord]:
    groups: dict[tuple[str, tuple[int, ...]], _GroupRecord] = {}
    for rank, dump in dumps.items():
        own = {}
        for name, group in dump["pg_config"].items():
            ranks, described = _ranks_of(group), group["desc"]
            record = _GroupRecord(described if described not in ("", "undefined") else name, ranks)
            own[name] = groups.setdefault((name, ranks), record).entered.setdefault(rank, {})
        for entry in dump["entries"]:
            if not entry["is_p2p"] and entry["process_group"][0] in own:
                own[entry["process_group"][0]][entry["collective_seq_id"]] = entry
    return groups.values()


def _stalled_messages(dumps: Mapping[int, Mapping[str, Any]]) -> Iterator[StalledCollective]:
    """Yield sends and receives that wait for a rank that does not wait for theirs."""
    pending: dict[tuple[int, int], Mapping[str, Any]] = {}
    for rank, dump in dumps.items():
        for entry in dump["entries"]:
            if entry["is_p2p"] and _is_pending(entry):
                ranks = _ranks_of(dump["pg_config"][entry["process_group"][0]])
                peer = int(re.split("->|<-", entry["profiling_name"])[1])  # "nccl:recv 3<-0", numbers of the group
                pending[rank, ranks[peer]] = entry
    for (rank, peer), entry in pending.items():
        if (peer, rank) not in pending:
            yield StalledCollective(
                _operation(entry["profiling_name"]),
                entry["process_group"][1],
                entry["p2p_seq_id"],
                (rank,),
                (peer,),
                since_ns=entry["time_created_ns"],
            )


def _operation(profiling_name: str) -> str:
    """`nccl:recv 3<-0` -> recv."""
    return profiling_name.partition(":")[2].partition(" ")[0]


def _ranks_of(group: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(ast.literal_eval(group["ranks"]))


def _is_pending(entry: Mapping[str, Any]) -> bool:
    return not entry["retired"] and entry["state"] != "completed"
