"""`megalm doctor`: check this machine, and report which features of megalm work on it and why others do not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import psutil
import typer

from megalm.config.schema import RunSection
from megalm.rank_environment import step_place
from megalm.utils.formatting import format_bytes, table
from megalm.utils.terminal import echo

_GIB = 2**30
_SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "sinfo")
_SLURM_TIMEOUT_SECONDS = 10
# With less, gloo and data workers run out of shared memory; containers have 64 MiB by default.
_ENOUGH_SHM_BYTES = _GIB


@dataclass(frozen=True)
class Finding:
    """The result of one check; training is impossible without an item in state `missing`."""

    name: str
    found: str
    state: str = "ok"  # ok | absent | missing


def command() -> None:
    """Check this machine: its hardware and software, and the features of megalm that work.

    Exits with code 1 if something essential is missing. `srun --nodes=2 megalm doctor` checks several machines.
    """
    place = step_place()
    if place is not None and place.local_rank > 0:
        return  # another task of this node reports it
    machine = machine_findings()
    works = capabilities({finding.name: finding for finding in machine})
    report = table(["machine", "found", ""], [[item.name, item.found, item.state] for item in machine])
    report += "\n\n" + table(["feature", "works", "reason"], works)
    # srun mixes what its tasks print: there each line has its node.
    prefix = "" if place is None or place.nodes == 1 else f"{platform.node()}: "
    echo("\n".join(f"{prefix}{line}".rstrip() for line in report.splitlines()))
    missing = [item.name for item in machine if item.state == "missing"]
    if missing:
        echo(f"\n{prefix}essential, but missing: {', '.join(missing)}; `make install` installs it", err=True)
        raise typer.Exit(1)


def machine_findings() -> list[Finding]:
    """Check everything that megalm uses of a machine, without changes to it."""
    return [
        Finding("host", platform.node()),
        _python(),
        *_torch(),
        _package("deepspeed", essential=True),
        _package("triton", essential=False),
        Finding("DeepSpeed ops built", ", ".join(_built_ops()) or "none yet; the first run with offload builds them"),
        _package("mlflow", essential=False),
        Finding("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable, {platform.machine()}"),
        _memory(),
        _disk(),
        _shared_memory(),
        _tool("g++"),
        _tool("ninja"),
        _nvcc(),
        _header("Python.h", sysconfig.get_path("include")),
        _header("libaio.h", "/usr/include"),
        _slurm(),
    ]


def capabilities(machine: dict[str, Finding]) -> list[list[str]]:
    """Rows of feature, yes or no, and reason."""

    def ok(name: str) -> bool:
        return name in machine and machine[name].state == "ok"

    gpu, compiler = ok("CUDA device 0"), all(map(ok, ("g++", "ninja", "Python.h")))
    bf16 = gpu and "bf16" in machine["CUDA device 0"].found
    base = ok("torch") and ok("deepspeed") and ok("python")
    no_gpu = machine["CUDA"].found if "CUDA" in machine else "no CUDA device"
    no_compiler = "needs g++, ninja and Python.h to compile"
    # The header of libaio always; for a GPU, CUDA's compiler and Triton too.
    no_nvme = [name for name in ("libaio.h", *(["nvcc"] if gpu else [])) if not ok(name)]
    no_triton = gpu and not ok("triton")
    rows = [
        ("training on the CPU (gloo)", base, "nothing to compile" if base else "needs python, torch and deepspeed"),
        ("training on GPUs (NCCL)", base and gpu, machine["CUDA device 0"].found if gpu else no_gpu),
        ("bf16 on GPUs", bf16, "supported by the device" if bf16 else "use fp16 instead" if gpu else no_gpu),
        ("optimizer offload to the CPU", base and compiler, "compiles DeepSpeedCPUAdam" if compiler else no_compiler),
        (
            "optimizer offload to NVMe",
            base and compiler and not no_nvme,
            (f"needs {' and '.join(no_nvme)}" if no_nvme else "compiles async_io") if compiler else no_compiler,
        ),
        (
            "torch.compile",
            base and compiler and not no_triton,
            ("needs triton" if no_triton else "compiles its kernels") if compiler else no_compiler,
        ),
        ("mirror to MLflow", ok("mlflow"), machine["mlflow"].found),
        ("Slurm jobs from here", ok("Slurm"), machine["Slurm"].found),
    ]
    return [[what, "yes" if works else "no", why] for what, works, why in rows]


def _python() -> Finding:
    inside = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", f"{platform.python_version()} (3.10-3.12)", "ok" if inside else "missing")


def _package(name: str, essential: bool) -> Finding:
    """Read the metadata only: importing DeepSpeed or MLflow takes seconds."""
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "missing" if essential else "absent")


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return [Finding("torch", f"import fails: {error}", "missing")]
    findings = [Finding("torch", torch.__version__)]
    from megalm.engine.device import cuda_problem

    if problem := cuda_problem():
        return [*findings, Finding("CUDA", problem, "absent")]
    findings.append(Finding("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} devices"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        # Ampere and later compute in bf16; earlier devices only emulate it.
        precision = "bf16" if properties.major >= 8 else "fp16 only"
        memory = format_bytes(properties.total_memory)
        findings.append(Finding(f"CUDA device {index}", f"{properties.name}, {memory}, {precision}"))
    return findings


def _built_ops() -> list[str]:
    """The compiled DeepSpeed operations in torch's cache or in the package."""
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))
    found = {path.stem for path in cache.rglob("*.so")}
    package = importlib.util.find_spec("deepspeed")
    for folder in package.submodule_search_locations or [] if package else []:
        found |= {path.name.split(".")[0] for path in (Path(folder) / "ops").rglob("*.so")}
    return sorted(found)


def _memory() -> Finding:
    """The memory that a process can use; a container's limit can be lower than the machine's memory."""
    memory = psutil.virtual_memory()
    limit = memory.total
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = min(limit, int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return Finding("memory", f"{format_bytes(limit)}, {format_bytes(min(limit, memory.available))} free")


def _disk() -> Finding:
    root = Path(RunSection().root).absolute()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    return Finding("disk for runs", f"{format_bytes(free)} free at {place}", "ok" if free > _GIB else "absent")


def _shared_memory() -> Finding:
    if not Path("/dev/shm").is_dir():
        return Finding("/dev/shm", "does not exist", "absent")
    total = shutil.disk_usage("/dev/shm").total
    if total >= _ENOUGH_SHM_BYTES:
        return Finding("/dev/shm", f"{format_bytes(total)}")
    return Finding("/dev/shm", f"{format_bytes(total)}; start the container with --shm-size=8g", "absent")


def _tool(name: str) -> Finding:
    # The virtual environment comes first; `make` has it on PATH, a bare shell may not.
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        return Finding(name, "not on PATH", "absent")
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Finding(name, next(iter(result.stdout.splitlines()), "no version"))


def _nvcc() -> Finding:
    """CUDA's compiler, where torch looks for it: only NVMe offload on a GPU needs it."""
    try:
        from megalm.engine.cpp_extensions import cuda_compiler

        nvcc = cuda_compiler()
    except (ImportError, OSError):  # no torch
        nvcc = None
    return Finding("nvcc", str(nvcc)) if nvcc else Finding("nvcc", "no CUDA toolkit (CUDA_HOME)", "absent")


def _header(name: str, folder: str) -> Finding:
    path = Path(folder) / name
    return Finding(name, str(path)) if path.is_file() else Finding(name, f"not in {folder}", "absent")


def _slurm() -> Finding:
    """Slurm works if its commands are installed and its controller answers."""
    missing = [name for name in _SLURM_COMMANDS if shutil.which(name) is None]
    if missing:
        return Finding("Slurm", f"no {', '.join(missing)}", "absent")
    try:
        command = ["sinfo", "--noheader", "--format=%P: %D nodes"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SLURM_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("Slurm", f"the controller does not answer within {_SLURM_TIMEOUT_SECONDS} s", "absent")
    if answer.returncode != 0:
        return Finding("Slurm", "commands installed, but sinfo finds no controller", "absent")
    return Finding("Slurm", ", ".join(answer.stdout.split("\n")[:-1]) or "no partitions")
