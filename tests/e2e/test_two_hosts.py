"""One run over two hosts, two names of this machine: by mpirun, and by deepspeed with a hostfile.

What a launcher starts over there it starts through `agent`, which does what ssh would: a command on the host of a name.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import finish, job, losses, pretrain, run_folder
from tests.slurm_cluster import can_name_hosts

# Each launcher imports DeepSpeed in three or more processes; unit tests have what launchers set.
pytestmark = [pytest.mark.e2e, pytest.mark.slow]
STEPS = 6
HOSTS = ("n1", "n2")
AGENT = """#!/bin/sh
host=$1
shift
exec unshare --uts sh -c 'hostname "$0" && exec sh -c "$*"' "$host" "$@"
"""


@pytest.fixture
def hosts(tmp_path: Path, require: Callable[[str, object, str], None]) -> Path:
    """A hostfile; the agent is beside it."""
    require("hosts", can_name_hosts(), "host names of one's own take root")
    agent = tmp_path / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    file = tmp_path / "hostfile"
    file.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return file


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def words(data: SmallData) -> tuple[str, ...]:
    return (*data.words, f"train.steps={STEPS}", "schedule.kind=constant")


def check(folder: Path, data: SmallData) -> None:
    """The run of two hosts has the losses of one rank."""
    alone = folder / "alone"
    alone.mkdir()
    one = finish(alone, pretrain(*words(data)))
    assert one.code == 0, one.explain()
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    facts = json.loads((run_folder(folder) / "environment.json").read_text())
    assert (facts["world_size"], facts["host"]) == (2, HOSTS[0])


def mpirun_options(hosts: Path) -> list[str]:
    agent = ["--mca", "plm_rsh_agent", str(hosts.with_name("agent"))]
    return [*agent, "-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={free_port()}"]


@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed --launcher openmpi"])
def test_ranks_by_mpirun(
    hosts: Path,
    small_data: SmallData,
    tmp_path: Path,
    require: Callable[[str, object, str], None],
    launcher: str,
) -> None:
    require("mpirun", shutil.which("ompi_info"), "no Open MPI; apt-get install openmpi-bin")
    options = mpirun_options(hosts)
    start: list[str | Path] = ["mpirun", "-np", "2", "--hostfile", hosts, *options, sys.executable]
    if launcher != "mpirun":
        deepspeed = Path(sys.executable).with_name("deepspeed")
        start = [deepspeed, "--hostfile", hosts, "--no_ssh_check", "--master_addr", "127.0.0.1"]
        start += ["--launcher", "openmpi", "--launcher_args", " ".join(options)]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    finished = finish(tmp_path, [*start, *pretrain(*words(small_data), using="python")[1:]], environment=allowed)
    assert finished.code == 0, finished.explain()
    check(tmp_path, small_data)


def test_deepspeed_started_on_each_host(hosts: Path, small_data: SmallData, tmp_path: Path) -> None:
    """`--no_ssh`: a person, or a scheduler without ssh, starts the same line on each host with its number."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    port = free_port()

    def command(number: int) -> list[str | Path]:
        place = ["--hostfile", hosts, "--no_ssh", "--node_rank", str(number)]
        start = [deepspeed, *place, "--master_addr", "127.0.0.1", "--master_port", port]
        on_host = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', HOSTS[number]]
        return [*on_host, *start, *pretrain(*words(small_data), using="python")[1:]]

    with job(tmp_path, command(1)) as second:
        first = finish(tmp_path, command(0))
        ended = second.wait(60.0)
    assert (first.code, ended.code) == (0, 0), first.explain() + ended.explain()
    check(tmp_path, small_data)
