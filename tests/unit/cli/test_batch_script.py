"""Options of sbatch as ranks, and the batch script; bash itself reads what was written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalm.cluster.batch_script import Allocation, SbatchOptions, render, without_options
from megalm.cluster.slurm_client import parse_queue
from megalm.errors import ConfigError
from tests.messages import assert_names


def of(*words: str) -> Allocation:
    return Allocation.of(SbatchOptions.parse(words))


@pytest.mark.parametrize(
    ("words", "nodes", "ranks_per_node", "gpu"),
    [
        ((), 1, 1, None),
        (("--nodes=4", "--gpus-per-node=8"), 4, 8, ""),
        (("-N4", "--gpus-per-node", "h100:8"), 4, 8, "h100"),
        (("-N", "4-4", "--gres=license:1,gpu:a100:4(S:0)"), 4, 4, "a100"),
        (("-N2", "--gres=gpu"), 2, 1, ""),
        (("-N2", "-G", "16"), 2, 8, ""),
        (("-N2", "--ntasks-per-node=4", "--gpus-per-task=1"), 2, 4, ""),
        (("-N2", "--ntasks-per-node=8", "--gpus-per-node=4"), 2, 4, ""),
        (("-N3", "--ntasks-per-node=4"), 3, 4, None),
        (("-N1", "-n", "6"), 1, 6, None),
        (("-N2", "-n2"), 2, 1, None),
        (("-N2", "--gpus-per-node=0", "--ntasks-per-node=2"), 2, 2, None),
    ],
)
def test_ranks_of_a_job(words: tuple[str, ...], nodes: int, ranks_per_node: int, gpu: str | None) -> None:
    found = of(*words)
    assert (found.nodes, found.ranks_per_node, found.ranks) == (nodes, ranks_per_node, nodes * ranks_per_node)
    assert (found.gpus, found.gpu_type) == (gpu is not None, gpu or None)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--nodes=2-4",), ("--nodes=2-4",)),
        (("-N2", "--ntasks=5"), ("--ntasks=5", "--ntasks-per-node")),
        (("-N2", "--gpus=3"), ("--gpus=3", "--gpus-per-node")),
        (("--gpus-per-node=a100:2,h100:2",), ("--gpus-per-node=a100:2,h100:2",)),
        (("--gpus-per-socket=2",), ("--gpus-per-socket",)),
        (("--array=a-b", "--nodes=2-4"), ("--array=a-b", "--nodes=2-4")),
        (("--nodes=2", "run.name=x"), ("run.name=x", "--")),
        (("--nodes", "2", "train.steps=4"), ("train.steps=4", "--")),
        (("--exclusive", "slurm/train.sh"), ("slurm/train.sh", "--")),
        (("--deepspeed_config", "x.json"), ("--deepspeed_config", "--")),
        (("--wrap=true", "--chdir", "/tmp"), ("--wrap", "--chdir")),
    ],
)
def test_what_leaves_the_ranks_open_is_refused(words: tuple[str, ...], names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        of(*words)
    assert_names(error.value, *names)


def test_tasks_of_an_array() -> None:
    assert (of("--array=1,5-7,10-20:5%2").tasks, of("-a", "0-3").at_once) == ((1, 5, 6, 7, 10, 15, 20), None)
    assert of("--array=1-9%2").at_once == 2


def test_the_last_option_counts_by_whatever_name() -> None:
    script = "#!/bin/bash\n#SBATCH --nodes=2 # two\n##SBATCH --time=1\n#SBATCH --requeue\n#SBATCH -J 'a b'\necho\n"
    options = SbatchOptions.of_script(script)
    assert options.values == {"nodes": "2", "requeue": None, "job-name": "a b"}
    environment = {"SBATCH_PARTITION": "cpu", "SBATCH_TIMELIMIT": "5", "SBATCH_GRES": "", "PATH": "/bin"}
    options = options.updated(SbatchOptions.of_environment(environment))
    options = options.updated(SbatchOptions.parse(["-N", "4", "-p", "gpu", "--no-requeue", "--exclusive"]))
    assert options.words() == [
        "--job-name=a b",
        "--time=5",
        "--nodes=4",
        "--partition=gpu",
        "--no-requeue",
        "--exclusive",
    ]
    assert without_options(environment) == {"PATH": "/bin"}


def test_the_script_has_all_words_as_they_were_given() -> None:
    options = SbatchOptions.parse(["--job-name=mine", '--comment=it\'s a "test" \\ #1', "--array=0-1"])
    text = render(options, Path("/a b"), ["run.name=x-%a", "x=['b c']"], {"A": "$b"}, {0: ["lr=1"], 1: ["lr=2 3"]})
    assert SbatchOptions.of_script(text) == options
    assert "export MEGALM_HOME='/a b'" in text
    assert re.search(r"^ +1\) set -- 'lr=2 3' ;;$", text, re.MULTILINE)
    assert text.endswith(""" run.name=x-%a 'x=['"'"'b c'"'"']' "$@"\n""")


def test_the_queue() -> None:
    lines = [
        ["12", "12", "RUNNING", "None", "2026-11-29T01:00:00", "n[1-2]", "/a b", "mine"],
        ["14", "13_[1-4]", "PENDING", "Priority", "N/A", "", "/a", "a|b"],
    ]
    running, waiting = parse_queue("".join("\x1f".join(line) + "\n" for line in lines))
    assert (running.number, running.nodes, running.folder, running.on_nodes) == ("12", "n[1-2]", "/a b", True)
    assert (running.whole, waiting.whole) == ("12", "13")
    assert (waiting.task, waiting.name, waiting.start, waiting.on_nodes) == ("13_[1-4]", "a|b", "", False)
    assert parse_queue("\n") == []
