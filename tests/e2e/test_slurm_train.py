"""`sbatch slurm/train.sh` on a real two-node Slurm: places of the ranks, losses, exit codes, going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import torch

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import DS_CONFIGS, ROOT, finish, losses, pretrain, rows, train_rows, until
from tests.messages import assert_names
from tests.slurm_cluster import SlurmCluster, can_name_hosts, slurm_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slurm]

TRAIN = ROOT / "slurm" / "train.sh"
COMPARED_STEPS, STEPS = 5, 60
JOB_SECONDS = 300.0
# The launch/pretrain.py of a checkout that only tells what it was started with.
TELL = """
import json, os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
facts = {name: os.environ.get(name) for name in (*names, "SITE_SETTING", "SLURM_JOB_END_TIME")}
host = os.uname().nodename
text = json.dumps({**facts, "host": host, "arguments": sys.argv[1:], "folder": os.getcwd()})
Path(f"told-{os.environ['RANK']}.json").write_text(text)
"""


@dataclass(frozen=True)
class Told:
    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    host: str
    master: str
    gpus: str | None
    setting: str | None
    end_time: float
    arguments: list[str]


def telling_checkout(folder: Path, program: str = TELL) -> Path:
    """A checkout with the real slurm/, settings of its own in env.sh, and another program; its train.sh."""
    home = folder / "a checkout"
    (home / "launch").mkdir(parents=True)
    (home / "launch" / "pretrain.py").write_text(program)
    shutil.copytree(ROOT / "slurm", home / "slurm")
    (home / "slurm" / "site.sh").write_text('export SITE_SETTING="$SITE_SETTING at this site"\n')
    # As many modules do: an unset variable and a command that fails are no reason to stop.
    settings = f'PATH="{Path(sys.executable).parent}:$PATH"\nfalse\nexport SITE_SETTING="ours$UNSET"\n'
    (home / "slurm" / "env.sh").write_text(settings)
    return home / "slurm" / "train.sh"


def read_told(folder: Path) -> list[Told]:
    contents = sorted((json.loads(path.read_text()) for path in folder.glob("told-*.json")), key=lambda it: it["RANK"])
    assert all(it["folder"] == str(folder) for it in contents)
    return [
        Told(
            rank=int(it["RANK"]),
            local_rank=int(it["LOCAL_RANK"]),
            local_world_size=int(it["LOCAL_WORLD_SIZE"]),
            world_size=int(it["WORLD_SIZE"]),
            host=it["host"],
            master=f"{it['MASTER_ADDR']}:{it['MASTER_PORT']}",
            gpus=it["CUDA_VISIBLE_DEVICES"],
            setting=it["SITE_SETTING"],
            end_time=float(it["SLURM_JOB_END_TIME"]),
            arguments=it["arguments"],
        )
        for it in contents
    ]


# A rank that trains until it has a signal, saves and leaves with 75; the second time it has nothing more to do.
SAVES = """
import os, signal, sys, time
from pathlib import Path
attempt = f"{os.environ.get('SLURM_RESTART_COUNT', '0')}-{os.environ['RANK']}"
if not attempt.startswith("0"):
    raise SystemExit
def save(number, frame):
    Path(f"saved-{attempt}-{signal.Signals(number).name}").touch()
    os._exit(75)
for name in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(name, save)
Path(f"trains-{attempt}").touch()
time.sleep(600)
"""


def slow_end(code: int) -> str:
    """The program of a rank 0 that is slower to say why than the other ranks are to leave."""
    slow = "import os, time\nif os.environ['RANK'] == '0':\n    time.sleep(2)\n    print('why')\n"
    return f"{slow}raise SystemExit({code})\n"


GPU_OPTIONS = ("--gpus-per-node=2", "--gres=gpu:2", "--gpus=4", "--exclusive")
PLACES = {"": (), "tasks a node": ("--ntasks-per-node=3",), "tasks": ("--nodes=1", "--ntasks=3")}
CODES = (1, 2)
WORDS = ("a word", "x=['b c']", "--resume", "auto")


@dataclass(frozen=True)
class Submitted:
    cluster: SlurmCluster
    folder: Path
    job_id: str

    def end(self) -> dict[str, str]:
        return self.cluster.wait(self.job_id, JOB_SECONDS)

    def log(self) -> str:
        return (self.folder / f"megalm-{self.job_id}.log").read_text()

    def told(self) -> list[Told]:
        job = self.end()
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.log()
        ranks = read_told(self.folder)
        assert all(it.arguments == list(WORDS) for it in ranks)
        return ranks


@pytest.fixture(scope="module")
def jobs(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[object, Submitted]:
    """All that only tell or end, submitted at once: each has its turn while the tests wait for others."""
    gpu_options = GPU_OPTIONS if slurm.has_gpus else ()
    options = {**PLACES, **{option: (option,) for option in gpu_options}, "unknown": ("--ntasks=6",)}
    wanted: dict[object, tuple[tuple[str, ...], str]] = {name: (words, TELL) for name, words in options.items()}
    wanted |= {code: ((), slow_end(code)) for code in CODES}
    submitted = {}
    for name, (words, program) in wanted.items():
        folder = tmp_path_factory.mktemp("job")
        script = telling_checkout(folder, program).relative_to(folder)
        submitted[name] = Submitted(slurm, folder, slurm.sbatch(folder, *words, script, *WORDS))
    return submitted


def test_one_rank_a_node_by_default(slurm: SlurmCluster, jobs: dict[object, Submitted]) -> None:
    ranks = jobs[""].told()
    assert [(it.rank, it.local_rank, it.local_world_size, it.world_size) for it in ranks] == [
        (0, 0, 1, 2),
        (1, 0, 1, 2),
    ]
    # The port is the job's own, so that jobs that share a node do not meet.
    assert {it.master for it in ranks} == {f"{slurm.nodes[0]}:{20_000 + int(jobs[''].job_id) % 10_000}"}
    assert {it.setting for it in ranks} == {"ours at this site"}
    started = datetime.fromisoformat(jobs[""].end()["StartTime"]).timestamp()
    assert {it.end_time - started for it in ranks} == {600.0}, "the ten minutes that a job has by default"
    if can_name_hosts():
        assert [it.host for it in ranks] == list(slurm.nodes)


@pytest.mark.parametrize("name", ["tasks a node", "tasks"])
def test_ranks_by_tasks(jobs: dict[object, Submitted], name: str) -> None:
    ranks = jobs[name].told()
    places = [(it.rank, it.local_rank, it.local_world_size, it.world_size) for it in ranks]
    assert places == [(rank, rank % 3, 3, len(ranks)) for rank in range(3 if name == "tasks" else 6)]


@pytest.mark.parametrize("option", GPU_OPTIONS)
def test_one_rank_a_gpu_each_seeing_all_of_its_node(
    slurm: SlurmCluster, jobs: dict[object, Submitted], option: str
) -> None:
    if not slurm.has_gpus:
        pytest.skip("no device files to stand for GPUs")
    ranks = jobs[option].told()
    places = [(it.rank, it.local_rank, it.local_world_size, it.world_size) for it in ranks]
    assert places == [(0, 0, 2, 4), (1, 1, 2, 4), (2, 0, 2, 4), (3, 1, 2, 4)]
    assert [it.gpus for it in ranks] == ["0,1"] * 4


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def test_what_a_site_puts_around_a_rank(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Its srun comes first in PATH and takes options of its own, as pyxis does; the ranks start inside apptainer."""
    script = telling_checkout(tmp_path)
    site = tmp_path / "site"
    ours = 'for word; do [[ $word == --container-* ]] || kept+=("$word"); done\n'
    real = slurm.ask("which", "srun")
    program(site / "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun-words\n{ours}exec {real} "${{kept[@]}}"\n')
    program(site / "apptainer", f'printf "%s\\n" "$@" > {tmp_path}/container-$SLURM_PROCID\nshift 3\nexec "$@"\n')
    settings = [
        f'export PATH="{site}:$PATH" MASTER_PORT=23456',
        'export MEGALM_CONTAINER="apptainer exec --nv megalm.sif"',
        'export MEGALM_SRUN_OPTIONS="--container-image=megalm --container-mounts=/data:/data"',
    ]
    (script.parent / "site.sh").write_text("\n".join(settings) + "\n")
    job = Submitted(slurm, tmp_path, slurm.sbatch(tmp_path, script, *WORDS))
    assert {it.master.partition(":")[2] for it in job.told()} == {"23456"}
    for rank in (0, 1):
        words = (tmp_path / f"container-{rank}").read_text().splitlines()
        pretrain_py = str(script.parents[1] / "launch" / "pretrain.py")
        assert words == ["exec", "--nv", "megalm.sif", "python", pretrain_py, *WORDS]
    words = (tmp_path / "srun-words").read_text().splitlines()
    assert {"--container-image=megalm", "--container-mounts=/data:/data", "--ntasks=2"} <= set(words)


def test_a_chain_of_jobs_by_an_array(slurm: SlurmCluster, tmp_path: Path) -> None:
    """One after another; Slurm shows several jobs where it is asked for the one that has the array's number."""
    job_id = slurm.sbatch(tmp_path, "--array=1-3%1", telling_checkout(tmp_path))
    ends = [slurm.wait(f"{job_id}_{number}", JOB_SECONDS)["ExitCode"] for number in (1, 2, 3)]
    assert ends == ["0:0"] * 3, [path.read_text() for path in tmp_path.glob("megalm-*.log")]
    assert len(read_told(tmp_path)) == 2


def test_shares_of_unknown_size_are_refused(jobs: dict[object, Submitted]) -> None:
    assert jobs["unknown"].end()["ExitCode"] == "2:0"
    (line,) = jobs["unknown"].log().splitlines()
    assert line.startswith("megalm: ")
    assert "--ntasks=6" in line
    assert "--ntasks-per-node" in line


@pytest.mark.parametrize("code", CODES)
def test_rank_0_has_the_last_word(jobs: dict[object, Submitted], code: int) -> None:
    """srun ends the others as soon as one rank leaves; the one that was slow to say why is not cut off."""
    assert jobs[code].end()["ExitCode"] == f"{code}:0"
    assert "why" in jobs[code].log().splitlines()


@dataclass(frozen=True)
class Stop:
    """A way to stop a job that can save: options of sbatch, words of scancel before the job's number, and its end."""

    options: tuple[str, ...]
    scancel: tuple[str, ...]
    state: str
    exit_code: str
    restarts: str


STOPS = {
    "a signal for the ranks": Stop((), ("--signal=TERM",), "COMPLETED", "0:0", "1"),
    "a signal for the shell": Stop((), ("--batch", "--signal=USR1"), "COMPLETED", "0:0", "1"),
    "not to be queued again": Stop(("--no-requeue",), ("--signal=TERM",), "FAILED", "75:0", "0"),
    "cancelled": Stop((), (), "CANCELLED", "", "0"),  # with the code of whoever comes first
}


def test_a_job_that_saved_is_queued_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    """In every way to stop that lets the ranks save; not after a person's scancel."""
    folders = {name: tmp_path / name for name in STOPS}
    for folder in folders.values():
        folder.mkdir()
    jobs = {
        name: slurm.sbatch(folders[name], *stop.options, telling_checkout(folders[name], SAVES))
        for name, stop in STOPS.items()
    }
    until(lambda: all(len(list(folder.glob("trains-0-*"))) == 2 for folder in folders.values()), JOB_SECONDS)
    for name, stop in STOPS.items():
        slurm.ask("scancel", *stop.scancel, jobs[name])
    for name, stop in STOPS.items():
        until(lambda name=name: len(list(folders[name].glob("saved-0-*"))) == 2, JOB_SECONDS)
        job = slurm.wait(jobs[name], JOB_SECONDS)
        log = (folders[name] / f"megalm-{jobs[name]}.log").read_text()
        assert (job["JobState"], job["Restarts"]) == (stop.state, stop.restarts), log
        assert job["ExitCode"].startswith(stop.exit_code), log


def test_a_preempted_job_saves_in_its_grace_time_and_is_queued_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    spare = slurm.sbatch(tmp_path, "--partition=spare", "--exclusive", telling_checkout(tmp_path, SAVES))
    ranks = range(4 if slurm.has_gpus else 2)
    until(lambda: len(list(tmp_path.glob("trains-0-*"))) == len(ranks), JOB_SECONDS)
    urgent = slurm.sbatch(tmp_path, "--partition=urgent", "--exclusive", "--nodes=2", "--wrap", "true")
    assert slurm.wait(urgent, JOB_SECONDS)["JobState"] == "COMPLETED"
    job = slurm.wait(spare, JOB_SECONDS)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == [f"saved-0-{rank}-SIGTERM" for rank in ranks]


def test_one_failed_rank_ends_the_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    program = "import os, time\ntime.sleep(600 if os.environ['RANK'] != '0' else 0)\nos._exit(7)\n"
    job_id = slurm.sbatch(tmp_path, telling_checkout(tmp_path, program))
    job = slurm.wait(job_id, JOB_SECONDS)
    # The other one answers no signals, as a rank that is still starting, and 143 would be the higher code.
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "7:0")


def test_refused_configuration(slurm: SlurmCluster, small_data: SmallData, tmp_path: Path) -> None:
    words = ("--deepspeed_config", DS_CONFIGS / "fp32.json", *small_data.words, "train.stepz=3")
    job_id = slurm.sbatch(tmp_path, TRAIN, *words)
    job = slurm.wait(job_id, JOB_SECONDS)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    log = (tmp_path / f"megalm-{job_id}.log").read_text()
    (said,) = (line for line in log.splitlines() if "train.stepz" in line)
    assert "train.steps" in said
    assert "Traceback" not in log
    assert not (tmp_path / "runs").exists()


def test_gpus_that_do_not_work_are_refused(slurm: SlurmCluster, small_data: SmallData, tmp_path: Path) -> None:
    if not slurm.has_gpus or torch.cuda.is_available():
        pytest.skip("no device files to stand for GPUs, or real ones")
    words = ("--deepspeed_config", DS_CONFIGS / "fp32.json", *small_data.words)
    job_id = slurm.sbatch(tmp_path, "--gpus-per-node=1", TRAIN, *words)
    job = slurm.wait(job_id, JOB_SECONDS)
    log = (tmp_path / f"megalm-{job_id}.log").read_text()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), log
    said = next(line for line in log.splitlines() if line.startswith("megalm: error: "))
    assert_names(said, "SLURM_GPUS_ON_NODE=1", "CUDA", "DS_ACCELERATOR=cpu")
    assert "Traceback" not in log
    assert not (tmp_path / "runs").exists()


def test_trains_stops_and_goes_on_with_the_node_that_is_left(
    slurm: SlurmCluster, small_data: SmallData, tmp_path: Path
) -> None:
    by_hand, on_nodes = tmp_path / "by hand", tmp_path / "on nodes"
    by_hand.mkdir()
    on_nodes.mkdir()
    same = (*small_data.words, "schedule.kind=constant")
    finished = finish(by_hand, pretrain(*same, f"train.steps={COMPARED_STEPS}"))
    assert finished.code == 0, finished.explain()
    words = [
        *("--nodes=1-2", "--export=ALL,DS_ACCELERATOR=cpu", "--output=train.log", TRAIN),
        *("--deepspeed_config", DS_CONFIGS / "fp32.json", *same),
        *(f"train.steps={STEPS}", "run.name=mine", "--resume", "auto"),
    ]

    first = slurm.sbatch(on_nodes, *words)
    until(lambda: any(row["step"] > COMPARED_STEPS for row in train_rows(on_nodes)), JOB_SECONDS)
    slurm.ask("scontrol", "update", f"nodename={slurm.nodes[1]}", "state=drain", "reason=test")
    try:
        slurm.ask("scancel", "--signal=TERM", first)
        job = slurm.wait(first, JOB_SECONDS)
    finally:
        slurm.ask("scontrol", "update", f"nodename={slurm.nodes[1]}", "state=resume")
    log = (on_nodes / "train.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert job["NumNodes"] == "1"
    for node in slurm.nodes:
        assert f"launch task StepId={first}.0" in (slurm.folder / "log" / f"slurmd-{node}.log").read_text()
    expected = losses(by_hand)
    assert len(expected) == COMPARED_STEPS
    assert {step: losses(on_nodes)[step] for step in expected} == pytest.approx(expected, abs=1e-5)
    stopped = max(row["step"] for row in train_rows(on_nodes) if row["attempt"] == 1)
    assert stopped < STEPS
    assert [(row["step"], row["attempt"]) for row in train_rows(on_nodes)] == [
        (step, 1 if step <= stopped else 2) for step in range(1, STEPS + 1)
    ]
    (resumed,) = (row for row in rows(on_nodes) if row.get("event") == "resume")
    (line,) = (line for line in resumed["changed"] if line.startswith("the grid "))
    was, now = line.split(", is ")
    assert_names(was, "data 2")
    assert_names(now, "data 1")
    each_step = {row["samples"] // row["step"] for row in train_rows(on_nodes)}
    assert len(each_step) == 1, "the global batch stays"
    ends = [(row["event"], row["status"]) for row in rows(on_nodes) if row.get("event") == "end"]
    assert ends == [("end", "stopped"), ("end", "finished")]
    assert log.count(f"job {first} on") == 2, "one log of both starts"
    assert f"step {stopped}," in log


@pytest.mark.slow
def test_a_requeued_job_goes_on_with_what_it_did(slurm: SlurmCluster, small_data: SmallData, tmp_path: Path) -> None:
    """Its line says to start at step 2, where another attempt has been further already."""
    words = ("train.steps=4", "run.name=mine", "schedule.kind=constant")
    before = finish(tmp_path, pretrain(*with_word(small_data.words, "checkpoint.interval_steps=2"), *words))
    assert before.code == 0, before.explain()
    line = ("run.name=mine", "--resume", "2", "train.steps=60", "checkpoint.interval_steps=null")
    one_rank = ("--nodes=1", "--ntasks=1", "--export=ALL,DS_ACCELERATOR=cpu", "--output=train.log")
    job_id = slurm.sbatch(tmp_path, *one_rank, TRAIN, *line)
    until(lambda: any(row["step"] > 6 for row in train_rows(tmp_path)), JOB_SECONDS)
    slurm.ask("scontrol", "requeue", job_id)
    job = slurm.wait(job_id, JOB_SECONDS)
    log = (tmp_path / "train.log").read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    requeued = [(row["step"], row["attempt"]) for row in train_rows(tmp_path) if row["attempt"] > 1]
    assert [step for step, _ in requeued] == list(range(3, 61)), "saved where it was stopped, and gone on from there"
    assert [attempt for _, attempt in requeued] == sorted(attempt for _, attempt in requeued)
    assert {attempt for _, attempt in requeued} == {2, 3}


def with_word(words: tuple[str, ...], word: str) -> list[str]:
    """`words` with another value of one key."""
    key = word.split("=", 1)[0]
    return [word, *(other for other in words if not other.startswith(f"{key}="))]


def test_doctor_finds_the_cluster(slurm: SlurmCluster) -> None:
    command = (Path(sys.executable).with_name("megalm"), "doctor")
    told = slurm.ask("srun", "--nodes=2", "--ntasks-per-node=2", *command)
    hosts = [line.split(":")[0] for line in told.splitlines() if line.partition(": ")[2].startswith("host ")]
    assert sorted(hosts) == (sorted(slurm.nodes) if can_name_hosts() else [os.uname().nodename] * 2)
    told = slurm.ask(*command)
    (line,) = (line for line in told.splitlines() if line.startswith("Slurm jobs from here"))
    assert {"yes", "debug*:", "2"} <= set(line.split())


def holding(folder: Path) -> list[psutil.Process]:
    """Processes with an open file in a folder, were it deleted; another look than the cluster's own."""
    found = []
    for process in psutil.process_iter():
        try:
            opened = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(f"{folder}/") for name in opened):
            found.append(process)
    return found


def test_nodes_without_root(tmp_path: Path) -> None:
    """The form of the cluster that needs no host names of its own; and nothing is alive after its block."""
    with slurm_cluster(named_hosts=False) as cluster:
        job_id = cluster.sbatch(tmp_path, telling_checkout(tmp_path))
        assert cluster.wait(job_id, JOB_SECONDS)["JobState"] == "COMPLETED"
        assert len(read_told(tmp_path)) == 2
        endless = cluster.sbatch(tmp_path, "--wrap", "srun sleep 600")
        until(lambda: cluster.job(endless)["JobState"] == "RUNNING", 120)
        until(lambda: "slurmstepd" in {process.name() for process in holding(cluster.folder)}, 120)
    assert not holding(cluster.folder)
    assert not cluster.folder.exists()


def test_a_cluster_ends_with_a_test_process_that_is_killed() -> None:
    program = (
        "import time\nfrom tests.slurm_cluster import slurm_cluster\n"
        "with slurm_cluster() as cluster:\n    print(cluster.folder, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        assert {"munged", "slurmctld", "slurmd"} <= {process.name() for process in holding(folder)}
        holder.kill()
    until(lambda: not holding(folder) and not folder.exists(), 120)


def test_tasks_of_a_plain_srun_are_the_ranks_of_one_job(slurm: SlurmCluster) -> None:
    program = (
        "import os; from megalm.rank_environment import rank_facts; it = rank_facts(); "
        "print(it.rank, it.world_size, it.local_rank, it.local_world_size, os.environ['MASTER_ADDR'], "
        "os.environ['MASTER_PORT'])"
    )
    words = (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--distribution=block",
        f"--chdir={ROOT}",
        sys.executable,
        "-c",
        program,
    )
    places = sorted(line.split() for line in slurm.ask("srun", *words).splitlines())
    assert [place[:4] for place in places] == [
        ["0", "4", "0", "2"],
        ["1", "4", "1", "2"],
        ["2", "4", "0", "2"],
        ["3", "4", "1", "2"],
    ]
    assert {place[4] for place in places} == {slurm.nodes[0]}
    assert len({place[5] for place in places}) == 1
