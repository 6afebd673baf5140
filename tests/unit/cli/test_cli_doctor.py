"""`megalm doctor`: what it finds is there, and what is missing is named."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

from megalm.cli import doctor
from megalm.cli.main import main
from tests.messages import assert_names


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def row_of(text: str, *names: str) -> list[str]:
    """The cells of the first row of the tables in whose first cell all the names stand."""
    rows = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    return next(row for row in rows if all(name in row[0] for name in names))


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert platform.python_version() in row_of(out, "python")[1]
    assert torch.__version__ in row_of(out, "torch")[1]
    assert "0.19.8" in row_of(out, "deepspeed")[1]
    assert row_of(out, "gloo")[1] == "yes"
    assert row_of(out, "NCCL")[1] == ("yes" if torch.cuda.is_available() else "no")


def test_under_srun_one_task_of_each_node_reports_and_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row_of(run(capsys)[1], "host")[1] == platform.node()
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    code, out, _ = run(capsys)
    assert (code, {line.partition(":")[0] for line in out.splitlines()}) == (0, {platform.node()})
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert run(capsys) == (0, "", "")


def test_without_a_compiler_it_trains_but_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "g++" else found(name, path=path))
    code, out, _ = run(capsys)
    assert code == 0
    assert row_of(out, "g++")[-1] == "absent"
    assert row_of(out, "gloo")[1] == "yes"
    assert row_of(out, "offload", "CPU")[1] == "no"
    assert row_of(out, "torch.compile")[1] == "no"


def test_without_deepspeed_nothing_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    code, out, error = run(capsys)
    assert code == 1
    assert row_of(out, "gloo")[1] == "no"
    assert_names(error, "deepspeed", "make install")


def test_slurm_commands_without_a_cluster_are_no_slurm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (("sbatch", 0), ("srun", 0), ("scontrol", 0), ("sinfo", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'debug: 2 nodes'\nexit {answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    row = row_of(run(capsys)[1], "Slurm")
    assert "sinfo" in row[1]
    assert row[2] == "absent"
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'debug: 2 nodes'\n")
    _, out, _ = run(capsys)
    assert row_of(out, "Slurm") == ["Slurm", "debug: 2 nodes", "ok"]
    assert row_of(out, "Slurm jobs")[1] == "yes"


def test_a_python_outside_the_range_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 13, 0))
    findings = {item.name: item for item in doctor.machine_findings()}
    assert findings["python"].state == "missing"


def test_bf16_follows_the_device() -> None:
    machine = {item.name: item for item in doctor.machine_findings()}
    machine |= {"CUDA": doctor.Finding("CUDA", "12.8, 1 devices")}
    for found, expected in (("Tesla V100, 16.0 GiB, fp16 only", "no"), ("NVIDIA A100, 40.0 GiB, bf16", "yes")):
        machine["CUDA device 0"] = doctor.Finding("CUDA device 0", found)
        rows = "\n".join("  ".join(row) for row in doctor.capabilities(machine))
        assert row_of(rows, "bf16")[1] == expected
        assert row_of(rows, "NCCL")[1] == "yes"


def test_a_gpu_needs_nvcc_for_nvme_and_triton_to_compile() -> None:
    names = ("python", "torch", "deepspeed", "g++", "ninja", "Python.h", "libaio.h", "CUDA", "nvcc", "triton")
    whole = {name: doctor.Finding(name, "found") for name in (*names, "mlflow", "Slurm")}
    gpu = {"CUDA device 0": doctor.Finding("CUDA device 0", "NVIDIA A100, 80.0 GiB, bf16")}
    for machine, absent, row, works in (
        (whole, "nvcc", "NVMe", "yes"),
        (whole | gpu, "", "NVMe", "yes"),
        (whole | gpu, "nvcc", "NVMe", "no"),
        (whole | gpu, "nvcc", "offload to the CPU", "yes"),
        (whole, "triton", "torch.compile", "yes"),
        (whole | gpu, "triton", "torch.compile", "no"),
    ):
        found = {name: item for name, item in machine.items() if name != absent}
        cells = row_of("\n".join("  ".join(cells) for cells in doctor.capabilities(found)), row)
        assert cells[1] == works, (absent, row)
        assert works == "yes" or absent in cells[2]
