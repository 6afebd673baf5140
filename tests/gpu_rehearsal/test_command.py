"""`megalm rehearse`: what it prints, its exit codes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.engine.interface import Traffic
from megalm.rehearsal.rehearsal_report import HostEvent, Phase, Rehearsal, extrapolated
from tests.gpu_rehearsal.budgets import MODEL
from tests.messages import assert_names

KEYS = [f"{key}={value}" for key, value in MODEL.items()]


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["rehearse", *words])
    return int(left.value.code or 0)


def json_with_batch(folder: Path, name: str, sequences: int) -> str:
    content = json.loads(Path("ds_configs", name).read_text())
    path = folder / name
    path.write_text(json.dumps({**content, "train_batch_size": sequences, "train_micro_batch_size_per_gpu": 1}))
    return str(path)


def test_json_has_the_verdict_the_plan_and_the_phases(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = json_with_batch(tmp_path, "pipeline.json", 6)  # more micro-batches than are rehearsed
    words = ["--gpu", "H100", "--ranks", "2", "--rank", "1", "--deepspeed_config", settings, "--json"]
    assert call(*words, *KEYS, "parallel.pipeline=2") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["verdict"]["level"] == "runs"
    assert (found["gpu"], found["ranks"], found["rank"], found["stage"]) == ("H100", 2, 1, 1)
    assert found["plan"]["total"] > sum(found["plan"]["host"].values())
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert list(phases) == ["start", "step", "validation", "sample"]
    received = [item for item in phases["step"]["traffic"] if item["collective"] == "recv"]
    # The hidden states of each micro-batch, and the first stage's gradient of the tied weight.
    assert [item["calls"] for item in received] == [6 + 1]


def test_a_run_that_does_not_fit_fails(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = json_with_batch(tmp_path, "zero2.json", 2)
    words = ["--gpu", "A100-1GB", "--ranks", "2", "--deepspeed_config", settings]
    large = {**MODEL, "model.hidden_size": 1024, "model.vocab_size": 30000}
    assert call(*words, *(f"{key}={value}" for key, value in large.items())) == 1
    text = capfd.readouterr().out
    assert_names(text, "fails", "start", "step", "validation", "sample", "plan")


def test_an_unknown_gpu_lists_the_known_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--gpu", "A200") == 2
    assert_names(capfd.readouterr().err, "A200", "A100", "H100", "V100")


def test_a_rank_beyond_the_last_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--ranks", "4", "--rank", "4") == 2
    assert_names(capfd.readouterr().err, "--rank", 4, 3)


def test_what_the_plan_refuses_is_refused_in_its_words(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--gpu", "A100", "--ranks", "6", *KEYS, "parallel.tensor=4"]
    assert call(*words) == 2
    refused = capfd.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["plan", *words])
    assert left.value.code == 2
    assert capfd.readouterr().err == refused
    assert_names(refused, "parallel.tensor")


def test_a_machine_without_a_compiler_is_refused_with_what_to_install(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MEGALM_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert call("--deepspeed_config", "zero1.json", *KEYS) == 2
    assert_names(capfd.readouterr().err, "g++", "CXX")


def test_a_compiler_that_fails_is_named_with_its_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fake_cuda.cpp:1: error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MEGALM_CACHE", str(tmp_path / "cache"))
    assert call("--deepspeed_config", "zero1.json", *KEYS) == 2
    assert_names(capfd.readouterr().err, str(broken), "no such header", "CXX")
    assert not list((tmp_path / "cache").iterdir())


def test_each_further_micro_batch_adds_the_same() -> None:
    def of(calls: int, waits: int) -> Rehearsal:
        events = (HostEvent("read", "a", 1, 4), HostEvent("to_device", "b", waits, 8 * waits))
        traffic = (Traffic("data", "all_reduce", calls, 100 * calls),)
        return Rehearsal(0, 0, 10, (Phase("step", 5, "a", 1, 0, events, traffic),), None, True, 1.0)

    assert extrapolated(of(2, 4), of(3, 6), 14).phases == of(16, 32).phases
