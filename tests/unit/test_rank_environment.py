"""Which rank a process is, by each launcher's variables."""

from __future__ import annotations

import os

import pytest

from megalm.errors import ConfigError
from megalm.rank_environment import is_other_rank, job_and_restarts, launched_ranks, rank_facts
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
