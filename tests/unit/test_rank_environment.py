"""Which rank a process is, by each launcher's variables."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.rank_environment import (
    RankFacts,
    RankPlace,
    describe_ranks,
    exclude_advice,
    gpu_driver,
    host_of_rank,
    is_other_rank,
    job_and_restarts,
    launched_ranks,
    rank_facts,
)
from tests.messages import assert_names

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[003-005,9]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
WHERE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}


def place(environment: dict[str, str]) -> tuple[int, int, int, int]:
    facts = rank_facts(environment)
    return facts.rank, facts.world_size, facts.local_rank, facts.local_world_size


def test_torch_s_own_variables() -> None:
    environment = {**TORCH, "LOCAL_SIZE": "2"}
    assert place(environment) == (3, 4, 1, 2)
    assert environment == {**TORCH, "LOCAL_SIZE": "2"}
    assert is_other_rank(environment)
    assert launched_ranks(environment) == 4


@pytest.mark.parametrize("empty", [{}, dict.fromkeys(TORCH, ""), {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}])
def test_without_a_launcher_there_is_one_rank(empty: dict[str, str]) -> None:
    """A batch script is no step, and variables that are set to nothing are as good as absent."""
    first, second = dict(empty), dict(empty)
    assert place(first) == place(second) == (0, 1, 0, 1)
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"].isdecimal()
    assert not is_other_rank(empty)


def test_a_task_of_srun() -> None:
    environment = dict(SLURM)
    assert place(environment) == (5, 7, 1, 2)
    assert environment["MASTER_ADDR"] == "gpu003"
    assert environment["MASTER_PORT"] == str(20000 + (12345 + 2 * 101) % 10000)
    assert launched_ranks(SLURM) == 7
    assert is_other_rank(SLURM)
    assert place({**SLURM, "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}) == (5, 7, 0, 1)


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1,a[2-3]", "a1"), ("node7", "node7"), ("n[01,5]-x", "n01-x"), ("r[1-2]", "r1")]
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    environment = {**SLURM, "SLURM_STEP_NODELIST": nodes}
    rank_facts(environment)
    assert environment["MASTER_ADDR"] == first


def test_one_node_listens_on_itself() -> None:
    environment = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    assert place({**environment, "SLURM_PROCID": "1"}) == (1, 2, 1, 2)
    rank_facts(environment := {**environment, "SLURM_PROCID": "1"})
    assert environment["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(("variables", "expected"), [(OPEN_MPI, (2, 4, 0, 2)), (MPICH, (1, 2, 1, 2))])
def test_ranks_of_mpi(variables: dict[str, str], expected: tuple[int, ...]) -> None:
    assert place({**variables, **WHERE}) == expected
    with pytest.raises(ConfigError) as refused:
        rank_facts(dict(variables))
    assert_names(refused.value, "MASTER_ADDR", "MASTER_PORT", expected[1])


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"RANK": "3"}, ("RANK", "WORLD_SIZE", "MASTER_ADDR")),
        ({**TORCH, "RANK": "abc"}, ("RANK", "abc")),
        ({**TORCH, "RANK": "-1"}, ("RANK", "-1")),
        ({**TORCH, "RANK": "4"}, ("RANK=4", "WORLD_SIZE=4")),
        ({**TORCH, "LOCAL_WORLD_SIZE": "1"}, ("LOCAL_RANK=1", "LOCAL_WORLD_SIZE=1")),
        ({**TORCH, "LOCAL_WORLD_SIZE": "0"}, ("LOCAL_RANK=1", "LOCAL_WORLD_SIZE=0")),
        ({"PMIX_RANK": "3"}, ("PMIX_RANK=3",)),
        ({**SLURM, "SLURM_NODEID": "9"}, ("SLURM_NODEID=9",)),
        ({**SLURM, "SLURM_PROCID": ""}, ("SLURM_PROCID",)),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        rank_facts(environment)
    assert_names(refused.value, *names)


def test_a_left_over_rank_is_not_another_rank() -> None:
    assert not is_other_rank({"RANK": "3"})


def test_restarts_of_a_job() -> None:
    assert job_and_restarts({}) == (None, 0)
    slurm = {"SLURM_JOB_ID": "7", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert job_and_restarts(slurm)[0] == "7"
    assert job_and_restarts({**slurm, "SLURM_RESTART_COUNT": "1"})[1] > job_and_restarts(slurm)[1] > 0
    named = {"TORCHELASTIC_RUN_ID": "mine", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    first, again = ({**named, "TORCHELASTIC_RESTART_COUNT": count} for count in "01")
    assert job_and_restarts(first) == (job_and_restarts(again)[0], 0)
    assert job_and_restarts(again)[1] == 1
    alone = {**first, "LOCAL_WORLD_SIZE": "8"}
    assert str(os.getppid()) in str(job_and_restarts(alone)[0])


@pytest.mark.parametrize(
    ("nodelist", "counts", "hosts"),
    [
        ("gpu[003-005,9]", "2(x3),1", ["gpu003", "gpu003", "gpu004", "gpu004", "gpu005", "gpu005", "gpu9"]),
        ("n1,gpu[09-10]-ib,n2", "1(x4)", ["n1", "gpu09-ib", "gpu10-ib", "n2"]),
        ("127.0.0.[2-3]", "1(x2)", ["127.0.0.2", "127.0.0.3"]),
        ("one", "2", ["one", "one"]),
    ],
)
def test_slurm_tells_the_node_of_a_rank_that_is_not_there(nodelist: str, counts: str, hosts: list[str]) -> None:
    told = {"SLURM_STEP_NUM_TASKS": str(len(hosts)), "SLURM_STEP_NODELIST": nodelist}
    told["SLURM_STEP_TASKS_PER_NODE"] = counts
    facts = RankFacts(0, len(hosts), 0, 1, 1)
    assert [host_of_rank(rank, facts, told) for rank in range(len(hosts))] == hosts
    if len(hosts) > 1:
        assert host_of_rank(0, replace(facts, world_size=2 * len(hosts)), told) is None, "a task is no rank"


def test_without_slurm_only_a_single_node_is_known() -> None:
    assert host_of_rank(1, RankFacts(0, 4, 0, 2, 1), {}) is None
    assert host_of_rank(1, RankFacts(0, 4, 0, 4, 1), {"SLURMD_NODENAME": "n7"}) == "n7"


def test_ranks_in_words() -> None:
    assert describe_ranks([(3, "n2")]) == "rank 3 on n2"
    assert describe_ranks([(9, "n4"), (8, "n4"), (3, "n2"), (10, None)]) == "rank 3 on n2, ranks 8-9 on n4, rank 10"
    assert "12 more" in describe_ranks((rank, f"n{rank}") for rank in range(20))


def test_a_node_is_left_out_where_there_are_others() -> None:
    assert exclude_advice(["n2"], {}) == ""
    assert exclude_advice(["n2"], {"SLURM_JOB_NUM_NODES": "1"}) == ""
    assert exclude_advice([None], {"SLURM_JOB_NUM_NODES": "2"}) == ""
    assert_names(exclude_advice(["n2", "n1", "n2"], {"SLURM_JOB_NUM_NODES": "4"}), "--exclude=n1,n2")


def test_the_state_of_a_process() -> None:
    own = RankPlace.of_this_process(0, "cpu")
    assert own.process_state() == "alive"
    assert replace(own, started=own.started + 1).process_state() == "gone", "another process has its number now"


def test_a_driver_is_read_where_there_is_one(tmp_path: Path) -> None:
    record = tmp_path / "version"
    assert gpu_driver(record) is None
    record.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
    )
    assert gpu_driver(record) == "550.54.15"
    record.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n")
    assert gpu_driver(record) == "570.86.10"
