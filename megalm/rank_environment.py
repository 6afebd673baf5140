"""This process's rank and the number of ranks, from the variables of the launcher that started it; needs no torch.

`deepspeed`, `torchrun` and slurm/train.sh set torch's own five variables. A plain `srun` or `mpirun` sets others: they
are translated, so that its processes are the ranks of one job instead of as many independent runs.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from megalm.errors import ConfigError

_TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Below the ports that systems assign by themselves; slurm/train.sh takes its port from the same range.
_FIRST_PORT, _PORTS = 20000, 10000
# More than torchrun restarts in one attempt of a Slurm job; the next attempt counts from 0 again.
_RESTARTS_OF_TORCHRUN = 10_000
# By which Slurm says that a job has GPUs.
_SLURM_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS", "SLURM_GPUS_PER_NODE")
# The process on each node that is the ancestor of all ranks there.
_MPI_DAEMONS = {"hydra_pmi_proxy", "mpirun", "mpiexec", "orterun", "orted", "prterun", "prted"}


@dataclass(frozen=True)
class RankFacts:
    """A process's place in its job.

    Attributes:
        local_rank, local_world_size: on this node.
        threads: this rank's share of the node's cores.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    threads: int


ProcessState = Literal["alive", "stopped", "gone"]


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs, as its job knows it.

    Attributes:
        host: the node's name, as Slurm's options take it.
        device: such as "cuda:3"; "cpu".
        started: of the process, in ticks of the kernel's clock: tells it from a later one with the same number.
        driver: the version of the node's NVIDIA driver; None: it has none.
    """

    rank: int
    host: str
    device: str
    pid: int
    started: int
    driver: str | None = None

    @staticmethod
    def of_this_process(rank: int, device: str) -> RankPlace:
        started = _kernel_record(os.getpid())[1]
        return RankPlace(rank, node_name(), device, os.getpid(), started, gpu_driver())

    def process_state(self) -> ProcessState:
        """Return what the kernel says of this rank's process; for ranks of this node."""
        try:
            state, started = _kernel_record(self.pid)
        except OSError:
            return "gone"
        if started != self.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else "alive"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.device})"


@dataclass(frozen=True)
class _Launched:
    """What a launcher other than torch's says; `address` and `port` are where rank 0 listens, None if not known."""

    name: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str | None = None
    port: int | None = None


def rank_facts(environment: MutableMapping[str, str] = os.environ) -> RankFacts:
    """Return this process's place in its job, and set torch's five variables where the launcher did not.

    A run without a launcher is one rank and gets a free port, so that two such runs never collide.

    Raises:
        ConfigError: the launcher set only some of its variables, a senseless one, or nothing by which the ranks find
            each other.
    """
    present = [name for name in _TORCH_NAMES if environment.get(name)]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        launched = _launched(environment)
        if launched is None or launched.world_size == 1:
            launched = _Launched("", 0, 1, 0, 1, "127.0.0.1", _free_port())
        environment.update(_torch_variables(launched, environment))
    elif len(present) < len(_TORCH_NAMES):
        missing = ", ".join(name for name in _TORCH_NAMES if name not in present)
        raise ConfigError(
            f"the environment has {', '.join(present)} but not {missing}; start with deepspeed or torchrun, or unset "
            f"{', '.join(present)} for a run of one rank"
        )
    rank, world_size, local_rank = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # torchrun and Slurm scripts set LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), "WORLD_SIZE")
    local_size = _number(environment, local)
    for name, value, size_name, size in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, local, local_size),
    ):
        if value >= size:
            raise ConfigError(f"{name}={value} is not below {size_name}={size}; mend the launcher's variables")
    return RankFacts(rank, world_size, local_rank, local_size, max(1, len(os.sched_getaffinity(0)) // local_size))


def is_other_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher started this process as another rank than 0: what is printed once, rank 0 prints."""
    if environment.get("RANK") and environment.get("WORLD_SIZE"):
        return _number(environment, "RANK") > 0
    launched = _launched(environment)
    return launched is not None and launched.rank > 0


def rank_in_messages(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank as far as it can be read, to say whose message it is; 0 if it cannot."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")
    text = next((environment[name] for name in names if environment.get(name)), "0")
    return int(text) if text.isascii() and text.isdecimal() else 0


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that the launcher started; 1 without one."""
    if environment.get("WORLD_SIZE"):
        return _number(environment, "WORLD_SIZE")
    launched = _launched(environment)
    return 1 if launched is None else launched.world_size


def sign_of_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str | None:
    """Return what says that this job is to train on GPUs, such as "SLURM_GPUS_ON_NODE=2"; None: nothing does.

    Not `deepspeed --num_gpus`: it gives the number of ranks on a machine without GPUs too.
    """
    wish = environment.get("DS_ACCELERATOR")
    if wish is not None:
        return f"DS_ACCELERATOR={wish}" if wish == "cuda" else None
    slurm = next((name for name in _SLURM_GPUS if environment.get(name, "0") not in ("", "0")), None)
    if slurm is not None:
        return f"{slurm}={environment[slurm]}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "CROSS_SIZE" not in environment:  # DeepSpeed's launcher sets both, on a CPU too
        return f"CUDA_VISIBLE_DEVICES={visible}" if re.match(r"\d|GPU-|MIG-", visible) else None
    if environment.get("SLURM_JOB_ID"):  # /dev has all GPUs of a node, also in a job that asked for none
        return None
    found = sorted(devices.glob("nvidia[0-9]*"))
    return str(found[0]) if found else None


def job_and_restarts(environment: Mapping[str, str] = os.environ) -> tuple[str | None, int]:
    """Return an identifier of the job that survives its restarts, None without one, and a number that grows with them.

    A job that Slurm requeues, or whose workers `torchrun --max-restarts` starts again, has its first start's command.
    """
    slurm, elastic = environment.get("SLURM_JOB_ID"), environment.get("TORCHELASTIC_RESTART_COUNT")
    restarts = [
        int(text) if text and text.isdecimal() else 0 for text in (environment.get("SLURM_RESTART_COUNT"), elastic)
    ]
    job = slurm or None
    if job is None and elastic:
        agent = psutil.Process().parent()
        name = environment.get("TORCHELASTIC_RUN_ID", "none")
        if name == "none":
            name = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        on_one_node = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
        started = f" {agent.pid} {agent.create_time():.2f}" if on_one_node and agent is not None else ""
        job = f"torchrun {name}{started}"
    return job, restarts[0] * _RESTARTS_OF_TORCHRUN + restarts[1]


JOB_FIELDS = {"%a": "SLURM_ARRAY_TASK_ID", "%x": "SLURM_JOB_NAME"}


@dataclass(frozen=True)
class StepPlace:
    """The place of a task of `srun`: its number on its node, and how many nodes there are."""

    local_rank: int
    nodes: int


def step_place(environment: Mapping[str, str] = os.environ) -> StepPlace | None:
    """Return this process's place in a step of Slurm; None: it is no task of `srun`."""
    local, nodes = environment.get("SLURM_LOCALID", ""), environment.get("SLURM_STEP_NUM_NODES", "")
    return StepPlace(int(local), int(nodes)) if local.isdecimal() and nodes.isdecimal() else None


def expand_job_fields(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return `text` with the index in a Slurm array for `%a` and the job's name for `%x`, as in names of sbatch's logs.

    Outside of such a job a field stays as it is.
    """
    for field, name in JOB_FIELDS.items():
        text = text.replace(field, environment.get(name) or field)
    return text


def _kernel_record(pid: int) -> tuple[str, int]:
    """Return a process's state letter and its start in ticks, of /proc.

    Raises:
        OSError: there is no such process.
    """
    words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return words[0], int(words[19])


def gpu_driver(record: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of this node's NVIDIA driver; None: it has none."""
    try:
        found = re.search(r"Kernel Module\s.*?(\d+(?:\.\d+)+)", record.read_text())
    except OSError:
        return None
    return found[1] if found else None


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return this node's name: as Slurm spells it, or the host's."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def host_of_rank(rank: int, ranks: RankFacts, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the node of a rank that is not here: by Slurm's layout, or this one if it has all; None: unknown."""
    if ranks.local_world_size == ranks.world_size:
        return node_name(environment)
    if environment.get("SLURM_STEP_NUM_TASKS") != str(ranks.world_size):
        return None  # without Slurm; or a task is a launcher with ranks of its own
    counts = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    hosts = _hosts(environment.get("SLURM_STEP_NODELIST", ""))
    of_ranks = [host for host, count in zip(hosts, counts, strict=False) for _ in range(count)]
    return of_ranks[rank] if rank < len(of_ranks) else None


_SHOWN_RANKS = 8


def describe_ranks(ranks: Iterable[tuple[int, str | None]]) -> str:
    """Return (rank, node) pairs in words: "rank 3 on n2, ranks 8-15 on n4"; a node that is not known is left out."""
    groups: list[tuple[int, int, str | None]] = []
    for rank, host in sorted(ranks):
        if groups and groups[-1][1:] == (rank - 1, host):
            groups[-1] = (groups[-1][0], rank, host)
        else:
            groups.append((rank, rank, host))
    words = [
        (f"rank {first}" if first == last else f"ranks {first}-{last}") + (f" on {host}" if host else "")
        for first, last, host in groups
    ]
    others = f" and {len(words) - _SHOWN_RANKS} more" if len(words) > _SHOWN_RANKS else ""
    return ", ".join(words[:_SHOWN_RANKS]) + others


def exclude_advice(hosts: Iterable[str | None], environment: Mapping[str, str] = os.environ) -> str:
    """Return how a Slurm job of several nodes continues without these; empty where that is no way."""
    names = sorted({host for host in hosts if host})
    if not names or environment.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return ""
    return f"; sbatch --exclude={','.join(names)} starts the job without {'it' if len(names) == 1 else 'them'}"


def submit_options(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the options of `megalm submit` that ask for a job like this one; None outside of slurm/train.sh."""
    try:
        return shlex.split(environment["MEGALM_SUBMIT_OPTIONS"]) if environment.get("SLURM_JOB_ID") else None
    except (KeyError, ValueError):
        return None


def allocation_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the time, in seconds since 1970, at which Slurm ends this job; None without a limit or without Slurm."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isascii() and text.isdecimal() else None


def _launched(environment: Mapping[str, str]) -> _Launched | None:
    readers: tuple[tuple[str, Callable[[Mapping[str, str]], _Launched]], ...] = (
        ("OMPI_COMM_WORLD_RANK", _open_mpi),
        ("SLURM_STEP_ID", _slurm_step),
        ("PMI_RANK", _mpich),
        ("PMIX_RANK", _pmix),
    )
    return next((read(environment) for name, read in readers if environment.get(name)), None)


def _open_mpi(environment: Mapping[str, str]) -> _Launched:
    prefix = "OMPI_COMM_WORLD_"
    return _on_one_node(
        "mpirun", environment, *(prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    )


def _mpich(environment: Mapping[str, str]) -> _Launched:
    """Of MPICH, Intel MPI and others that use its process manager."""
    return _on_one_node("mpiexec", environment, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _pmix(environment: Mapping[str, str]) -> _Launched:
    raise ConfigError(
        f"PMIX_RANK={environment['PMIX_RANK']}: this launcher does not say how many ranks there are; start with "
        f"torchrun, deepspeed, srun or mpirun, or set {', '.join(_TORCH_NAMES)} for each rank"
    )


def _slurm_step(environment: Mapping[str, str]) -> _Launched:
    """Of a task of `srun`; a batch script by itself is no step."""
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    if size == 1:
        return _Launched("srun", 0, 1, 0, 1)
    per_node = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID")
    if node >= len(per_node):
        raise ConfigError(f"SLURM_NODEID={node} is not in SLURM_STEP_TASKS_PER_NODE; start with sbatch slurm/train.sh")
    address = (
        "127.0.0.1" if len(per_node) == 1 else next(iter(_hosts(environment.get("SLURM_STEP_NODELIST", ""))), None)
    )
    identity = _number(environment, "SLURM_JOB_ID") + 101 * _number(environment, "SLURM_STEP_ID")
    rank, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    return _Launched("srun", rank, size, local, per_node[node], address, _FIRST_PORT + identity % _PORTS)


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]; [] if it is something else."""
    counts: list[int] = []
    try:
        for part in text.split(","):
            count, _, times = part.partition("(x")
            counts += [int(count)] * int(times.removesuffix(")") or 1)
    except ValueError:
        return []
    return counts


def _hosts(nodelist: str) -> list[str]:
    """`gpu[003-005,9],login` -> gpu003, gpu004, gpu005, gpu9, login."""
    hosts: list[str] = []
    for prefix, numbers, suffix in re.findall(r"([^\[,]*)(?:\[([^\]]*)\])?([^\[,]*),?", nodelist):
        for part in numbers.split(",") if numbers else ():
            first, _, last = part.partition("-")
            if not (first.isdecimal() and (last or first).isdecimal()):
                return []
            count = range(int(first), int(last or first) + 1)
            hosts += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in count]
        if not numbers and prefix + suffix:
            hosts.append(prefix + suffix)
    return hosts


def _on_one_node(
    launcher: str, environment: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str
) -> _Launched:
    """Return the ranks by these variables. Where rank 0 listens is known if all ranks are on this node."""
    numbers = [_number(environment, name) for name in (rank, size, local_rank, local_size)]
    launched = _Launched(launcher, numbers[0], numbers[1], numbers[2], numbers[3])
    daemon = next(
        (process.pid for process in psutil.Process().parents() if process.name().split(".")[0] in _MPI_DAEMONS), None
    )
    if launched.local_world_size < launched.world_size or daemon is None:
        return launched
    return replace(launched, address="127.0.0.1", port=_FIRST_PORT + daemon % _PORTS)


def _torch_variables(launched: _Launched, environment: Mapping[str, str]) -> dict[str, str]:
    address = environment.get("MASTER_ADDR") or launched.address
    port = environment.get("MASTER_PORT") or launched.port
    if address is None or port is None:
        raise ConfigError(
            f"{launched.name} started {launched.world_size} ranks, which do not know where rank 0 is; set MASTER_ADDR "
            "to its host and MASTER_PORT to a free port there for all of them (mpirun -x MASTER_ADDR=HOST "
            "-x MASTER_PORT=29500), or start with deepspeed, torchrun or slurm/train.sh"
        )
    return {
        "RANK": str(launched.rank),
        "WORLD_SIZE": str(launched.world_size),
        "LOCAL_RANK": str(launched.local_rank),
        "LOCAL_WORLD_SIZE": str(launched.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isascii() or not text.isdecimal():
        found = f"{name}={text!r} is no whole number" if text else f"the launcher set no {name}"
        raise ConfigError(f"{found}; start with deepspeed or torchrun, or unset the launcher's variables")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
