"""`megalm doctor`: what it finds is there, and what it finds missing is said."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch

from megalm.cli import doctor
from megalm.cli.main import main


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert platform.python_version() in line_of(out, "python")
    assert torch.__version__ in line_of(out, "torch")
    assert "0.19.8" in line_of(out, "deepspeed")
    assert line_of(out, "training on the CPU").split()[5] == "yes"
    expected = "yes" if torch.cuda.is_available() else "no"
    assert line_of(out, "training on GPUs").split()[4] == expected


def test_without_a_compiler_it_trains_but_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "g++" else found(name, path=path))
    code, out, _ = run(capsys)
    assert code == 0
    assert line_of(out, "g++").split()[-1] == "absent"
    assert line_of(out, "training on the CPU").split()[5] == "yes"
    assert line_of(out, "optimizer offload").split()[5] == "no"
    assert line_of(out, "torch.compile").split()[1] == "no"


def test_without_deepspeed_nothing_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    code, out, error = run(capsys)
    assert code == 1
    assert line_of(out, "training on the CPU").split()[5] == "no"
    assert "missing and essential: deepspeed" in error


def test_slurm_commands_without_a_cluster_are_no_slurm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (("sbatch", 0), ("srun", 0), ("scontrol", 0), ("sinfo", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'debug: 2 nodes'\nexit {answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "finds no controller" in line_of(run(capsys)[1], "Slurm  ")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'debug: 2 nodes'\n")
    _, out, _ = run(capsys)
    assert line_of(out, "Slurm  ").split()[1:] == ["debug:", "2", "nodes", "ok"]
    assert line_of(out, "Slurm jobs from here").split()[4] == "yes"


def test_a_python_outside_the_range_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 13, 0))
    findings = {item.name: item for item in doctor.machine_findings()}
    assert findings["python"].state == "missing"


def test_bf16_follows_the_device() -> None:
    machine = {item.name: item for item in doctor.machine_findings()}
    machine |= {"CUDA": doctor.Finding("CUDA", "12.8, 1 devices")}
    for found, expected in (("Tesla V100, 16.0 GiB, fp16 only", "no"), ("NVIDIA A100, 40.0 GiB, bf16", "yes")):
        machine["CUDA device 0"] = doctor.Finding("CUDA device 0", found)
        rows = {row[0]: row[1] for row in doctor.capabilities(machine)}
        assert rows["bf16 on GPUs"] == expected
        assert rows["training on GPUs (NCCL)"] == "yes"
