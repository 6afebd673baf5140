"""Shared by all tests: what a test needs of the machine, and freedom from the shell's own settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

# In /usr/sbin, which an ordinary user's PATH may lack.
_SLURM_PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged")
_SLURM_INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"


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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The markers `gpu` and `slurm` name what a test needs; looked for only where a test has them."""
    if item.get_closest_marker("gpu"):
        import torch

        require("gpu", torch.cuda.is_available(), "no CUDA device")
    if item.get_closest_marker("slurm"):
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        missing = [program for program in _SLURM_PROGRAMS if shutil.which(program, path=path) is None]
        require("slurm", not missing, f"no {', '.join(missing)}; {_SLURM_INSTALL}")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the MLflow server, or is one rank of the job, of the shell that started it."""
    mlflow = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN", "MLFLOW_TAGS")
    for name in (*mlflow, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
