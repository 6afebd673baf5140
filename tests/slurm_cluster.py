"""A real Slurm cluster on this machine for a test: munge, slurmctld and a slurmd a node, started in a second or two.

As root each node has a host name and an address of its own (`unshare`); without, nodes are named by their loopback
addresses. Whatever happens to the test process, nothing is left behind: the cluster belongs to a reaper, a process that
ends everything of this cluster (`processes`) as soon as its standard input is closed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import WORKER

ROOT = Path(__file__).resolve().parents[1]
_START_SECONDS = 90.0
_REAPER_SECONDS = 20.0
_NODE_CPUS = 16
_SHARED_NODES = 2  # of all partitions; `wide` has one more
_NODE_GPUS = 2
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True)
class SlurmCluster:
    """Idle nodes and the commands to use them; `environment` is what every Slurm command here needs.

    Partition `wide` has `nodes` and one more, the others have `nodes`.
    """

    folder: Path
    nodes: tuple[str, ...]
    has_gpus: bool
    environment: Mapping[str, str]

    def sbatch(self, folder: Path, *words: str | Path) -> str:
        """Submit from `folder`; the job's id."""
        return self.ask("sbatch", "--parsable", *words, folder=folder)

    def ask(self, *command: str | Path, folder: Path | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder or self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job` (JobState, ExitCode "code:signal", NodeList, ...)."""
        line = self.ask("scontrol", "show", "job", "-o", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def wait(self, job_id: str, timeout_seconds: float) -> dict[str, str]:
        """The job's fields after its end; a job that does not end is cancelled."""
        deadline = time.monotonic() + timeout_seconds
        while (fields := self.job(job_id))["JobState"] not in _OVER:
            if time.monotonic() > deadline:
                self.ask("scancel", job_id)
                raise AssertionError(f"job {job_id} is {fields} after {timeout_seconds} s\n{self.logs()}")
            time.sleep(0.2)
        return fields

    def logs(self) -> str:
        """The ends of the daemons' logs, to explain a failure."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


@contextmanager
def slurm_cluster(named_hosts: bool | None = None) -> Iterator[SlurmCluster]:
    """A cluster until the end of the block.

    Args:
        named_hosts: nodes with host names of their own, which takes root; default: where it is possible.
    """
    if named_hosts is None:
        named_hosts = can_name_hosts()
    # Short: a socket's path holds about a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    reaper = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm_cluster", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for the tests
    )
    try:
        yield _start(folder, named_hosts)
    finally:
        reaper.communicate(timeout=_REAPER_SECONDS + 10)
    assert reaper.returncode == 0, "the reaper could not end all processes of the cluster"


def can_name_hosts() -> bool:
    command = ["unshare", "--uts", "--mount", "true"]
    return os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


def processes(folder: Path) -> list[psutil.Process]:
    """Everything alive of the cluster in `folder`: daemons, jobs, and what jobs left in the background.

    Jobs' processes have the cluster in their environment. slurmstepd writes its title over its environment, but stays
    in the folder that the daemons were started in.
    """
    mark = _configuration(folder)
    return [
        process
        for process in psutil.process_iter()
        if _environment(process).get("SLURM_CONF") == mark or _working_folder(process) == str(folder)
    ]


def _start(folder: Path, named_hosts: bool) -> SlurmCluster:
    nodes = ("n1", "n2", "n3") if named_hosts else ("127.0.0.2", "127.0.0.3", "127.0.0.4")
    gpus = [Path(f"/dev/tty{number}") for number in range(_NODE_GPUS)]  # any device files will do
    has_gpus = all(gpu.is_char_device() for gpu in gpus)
    _write_files(folder, nodes, has_gpus)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    path = f"{inherited.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    environment = inherited | {"SLURM_CONF": _configuration(folder), "PATH": path}
    cluster = SlurmCluster(folder, nodes[:_SHARED_NODES], has_gpus, environment)

    munge = folder / "munge"
    own_files = [f"--{name}={munge / name}" for name in ("key-file", "pid-file", "seed-file", "log-file")]
    _daemon(cluster, "munged", ["munged", "-F", "--force", f"--socket={munge / 'sock'}", *own_files])
    _daemon(cluster, "slurmctld", ["slurmctld", "-D", "-i", "-f", _configuration(folder)])
    for node in nodes:
        slurmd = ["slurmd", "-D", "-f", _configuration(folder), "-N", node]
        _daemon(cluster, f"slurmd-{node}", _as_host(node, folder, slurmd) if named_hosts else slurmd)
    _wait_until_idle(cluster)
    return cluster


def _daemon(cluster: SlurmCluster, name: str, command: Sequence[str]) -> None:
    with open(cluster.folder / "log" / f"{name}.out.log", "ab") as log:
        subprocess.Popen(
            command,
            cwd=cluster.folder,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _as_host(name: str, folder: Path, command: Sequence[str]) -> list[str]:
    """The command on a host of that name, which finds the other hosts in an /etc/hosts of its own."""
    script = f'hostname {name} && mount --make-rprivate / && mount --bind {folder}/hosts /etc/hosts && exec "$@"'
    return ["unshare", "--uts", "--mount", "bash", "-c", script, "host", *command]


def _wait_until_idle(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + _START_SECONDS
    command = ["sinfo", "-h", "-N", "-p", "wide", "-o", "%T"]
    while True:
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.split() == ["idle"] * (len(cluster.nodes) + 1):
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"no idle nodes: {done.stdout} {done.stderr}\n{cluster.logs()}")
        time.sleep(0.1)


def _write_files(folder: Path, nodes: Sequence[str], has_gpus: bool) -> None:
    folder.chmod(0o755)
    for name in ("munge", "state", "spool", "log"):
        (folder / name).mkdir()
    key = folder / "munge" / "key-file"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "munge").chmod(0o711)  # as munged demands
    if has_gpus:
        (folder / "gres.conf").write_text(f"Name=gpu File=/dev/tty[0-{_NODE_GPUS - 1}]\n")
    addresses = "".join(f"127.0.0.{number} {node}\n" for number, node in enumerate(nodes, start=2))
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + addresses)
    Path(_configuration(folder)).write_text(_slurm_conf(folder, nodes, has_gpus))


def _slurm_conf(folder: Path, nodes: Sequence[str], has_gpus: bool) -> str:
    host = socket.gethostname().split(".")[0]
    user = psutil.Process().username()
    shared = ",".join(nodes[:_SHARED_NODES])
    controller, *ports = _free_ports(1 + len(nodes))
    gpus = f" Gres=gpu:{_NODE_GPUS}" if has_gpus else ""
    lines = [
        "ClusterName=megalmtest",
        f"FirstJobId={1 + 4000 * WORKER}",  # from it train.sh has the port of a job
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"SlurmctldPort={controller}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={folder}/munge/sock,cred_expire=5",  # a requeued job waits for old credentials to expire
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "MailProg=/bin/true",
        "ReturnToService=2",
        "KillWait=20",
        "SlurmdTimeout=10",
        "MinJobAge=3600",  # what has ended stays readable
        "EnforcePartLimits=ALL",  # an impossible request fails instead of waiting for ever
        "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",  # more cores than the machine has
        *(["GresTypes=gpu"] if has_gpus else []),
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={_NODE_CPUS} RealMemory=64000{gpus}"
            for node, port in zip(nodes, ports, strict=True)
        ),
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        f"PartitionName=debug Nodes={shared} Default=YES DefaultTime=10 MaxTime=60 State=UP PreemptMode=OFF",
        # A job of `urgent` takes the nodes of one in `spare`, which has some seconds to save.
        f"PartitionName=spare Nodes={shared} DefaultTime=10 MaxTime=60 State=UP PriorityTier=1 GraceTime=30",
        f"PartitionName=urgent Nodes={shared} DefaultTime=10 MaxTime=60 State=UP PriorityTier=2 PreemptMode=OFF",
        "PartitionName=wide Nodes=ALL DefaultTime=10 MaxTime=60 State=UP PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _configuration(folder: Path) -> str:
    return str(folder / "slurm.conf")


def _free_ports(count: int) -> list[int]:
    """All held at once, so that no two are the same."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):
        return {}


def _working_folder(process: psutil.Process) -> str:
    try:
        return process.cwd().removesuffix(" (deleted)")
    except (psutil.Error, OSError):
        return ""


def _reap(folder: Path) -> bool:
    """Wait for the end of the tests, then end what is alive of the cluster and remove its folder; whether all ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.read()
    deadline = time.monotonic() + _REAPER_SECONDS
    while alive := processes(folder):
        if time.monotonic() > deadline:
            return False
        for process in alive:
            try:
                process.kill()
            except psutil.Error:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
    return True


if __name__ == "__main__":
    sys.exit(0 if _reap(Path(sys.argv[1])) else 1)
