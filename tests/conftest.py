"""Shared by all tests: what a test needs of the machine, and freedom from the shell's own settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import hypothesis
import pytest

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("megalm", deadline=None)
hypothesis.settings.load_profile("megalm")

# In /usr/sbin, which an ordinary user's PATH may lack.
_SLURM_PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged")
_SLURM_INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"

_TESTS = Path(__file__).resolve().parent
_MEGALM = f"{_TESTS.parent / 'megalm'}{os.sep}"
_LAST_LOOK_SECONDS = 5.0  # of a thread that has been told to end


def require(name: str, present: object, reason: str) -> None:
    """Skip where something is not `present`; with MEGALM_REQUIRE_<NAME>=1 (set in CI) that is a failure."""
    if present:
        return
    variable = f"MEGALM_REQUIRE_{name.upper()}"
    if os.environ.get(variable, "0") not in ("", "0"):
        pytest.fail(f"{reason} ({variable} is set)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(name="require", scope="session")
def _require() -> Callable[[str, object, str], None]:
    """`require("chromium", shutil.which("chromium"), "no chromium; apt-get install chromium")`."""
    return require


@pytest.fixture
def mounted_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mounted_disk("5m")`: a folder that is a disk of that size."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        require("tmpfs", mounted, "no small disk: mounting a tmpfs needs root")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", disk], check=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The markers `gpu` and `slurm` name what a test needs; looked for only where a test has them."""
    if item.get_closest_marker("gpu"):
        import torch

        require("gpu", torch.cuda.is_available(), "no CUDA device")
    if item.get_closest_marker("slurm"):
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        missing = [program for program in _SLURM_PROGRAMS if shutil.which(program, path=path) is None]
        require("slurm", not missing, f"no {', '.join(missing)}; {_SLURM_INSTALL}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix the modules of all folders but the units, which come last, in the order in which workers take them.

    Ranks keep all cores busy, commands wait for launchers, Slurm and MLflow: side by side, one uses what the other
    leaves. The many short modules of the units let the workers end together.
    """
    modules: dict[str, dict[Path, None]] = {}  # folder of tests/ -> its modules, as collected
    for item in items:
        modules.setdefault(_folder(item), {})[item.path] = None
    places = {
        path: (folder == "unit", (number + 0.5) / len(paths))
        for folder, paths in modules.items()
        for number, path in enumerate(paths)
    }
    items.sort(key=lambda item: places[item.path])  # stable: the tests of a module stay as they are


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(_TESTS).parts[0] if item.path.is_relative_to(_TESTS) else ""


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the MLflow server, or is one rank of the job, of the shell that started it."""
    mlflow = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN", "MLFLOW_TAGS")
    for name in (*mlflow, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """For the small tensors of tests, of two threads one waits awake for the other: twenty times the processor's time
    on a busy machine.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _no_thread_is_left() -> Iterator[None]:
    """A thread of megalm that outlives its tests meets what others replace, and may end the process of all."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _LAST_LOOK_SECONDS
    while left := [thread.name for thread in set(threading.enumerate()) - before if _runs_megalm(thread)]:
        assert time.monotonic() < deadline, f"threads of megalm are left: {', '.join(sorted(left))}"
        time.sleep(0.01)


def _runs_megalm(thread: threading.Thread) -> bool:
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_MEGALM):
            return True
        frame = frame.f_back
    return False
