"""`megalm plan --fit`: the largest model for some GPUs and days, and the two files of its run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from config_cases import refused

from megalm.cli.main import main
from megalm.cli.plan import planned, planned_run
from megalm.cost_model.gpu_specs import gpu_by_name, known_gpus
from megalm.planning.largest_model import FitRequest, FittedRun, largest_model
from megalm.planning.run_plan import Rate
from megalm.runs.run_settings import Arguments, read_settings
from tests.messages import assert_names

WEEK = 24.0 * 7


def fitted(gpu: str = "rtx-5090", ranks: int = 1, hours: float = WEEK, **changes: object) -> FittedRun:
    """The largest model; its shape has usual proportions, as those of all tests here must."""
    found = largest_model(replace(FitRequest(gpu_by_name(gpu), ranks, 8, hours), **changes))  # type: ignore[arg-type]
    shape = found.plan.shape
    assert shape.hidden_size % 128 == 0
    assert shape.head_dim in (64, 128)
    assert shape.num_attention_heads % 2 == 0
    assert 50 <= shape.hidden_size / shape.num_hidden_layers <= 160
    return found


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["plan", *words])
    shown = capsys.readouterr()
    return left.value.code or 0, shown.out, shown.err


@pytest.mark.parametrize(("gpu", "ranks"), [("rtx-5090", 1), ("V100", 4)])
def test_both_files_are_a_run_that_fits_and_ends_in_time(gpu: str, ranks: int, tmp_path: Path) -> None:
    found = fitted(gpu, ranks)
    assert found.plan.fit.level == "fits"
    assert found.plan.hours
    assert 0.9 * WEEK < found.plan.hours <= WEEK
    assert_names(found.limit, "time")
    assert found.plan.tokens_per_parameter == pytest.approx(20, rel=1e-3)
    yaml_file, json_file = map(str, found.write(tmp_path / "mine", "megalm"))
    device = gpu_by_name(gpu)
    again = planned(read_settings(yaml_file, [], json_file, False, ranks), ranks, device, 8)
    assert (again.memory, again.fit, again.hours) == (found.plan.memory, found.plan.fit, found.plan.hours)
    assert again.resolved.batch == found.plan.resolved.batch
    assert again.resolved.precision == ("bf16" if device.bf16 else "fp16")
    start = planned_run(Arguments(json_file, yaml_file), ranks, device, 8)
    assert (start.memory, start.total_tokens) == (again.memory, again.total_tokens)


def test_memory_bounds_what_time_does_not() -> None:
    """With enough time every block is recomputed and states are short and divided; a card of more memory has more."""
    device = gpu_by_name("rtx-5090")
    small, large = (fitted(hours=40 * WEEK, device=replace(device, memory_bytes=gib << 30)) for gib in (16, 32))
    for found in (small, large):
        assert_names(found.limit, "memory")
        train = found.plan.resolved.config.train
        assert (train.recompute, train.optimizer_state) == ("full", "8bit")
        assert found.plan.fit.needed > 0.75 * found.plan.fit.available
    assert large.plan.parameter_count > 1.5 * small.plan.parameter_count
    four = fitted(ranks=4, hours=400 * WEEK)
    assert four.plan.resolved.zero_stage == 3
    assert four.plan.parameter_count > 2 * large.plan.parameter_count


def test_a_node_with_cpu_memory_offloads(tmp_path: Path) -> None:
    """The time counts what offload moves, and the micro-batch is large for it."""
    device = gpu_by_name("rtx-5090")
    host = replace(device, host_memory_bytes=128 << 30)
    given = {"train.optimizer_state": "fp32"}  # offload keeps no others
    alone, found = (fitted(hours=60 * 24.0, tokens_per_parameter=2.0, device=it, given=given) for it in (device, host))
    assert not alone.plan.case.offloads_optimizer
    assert found.plan.case.offloads_optimizer
    assert found.plan.parameter_count > 2 * alone.plan.parameter_count
    assert found.plan.mfu < alone.plan.mfu
    assert found.plan.resolved.batch.micro_batch > 4
    assert found.plan.hours
    assert found.plan.hours <= 60 * 24
    yaml_file, json_file = map(str, found.write(tmp_path / "mine", "megalm"))
    again = planned(read_settings(yaml_file, [], json_file, False, 1), 1, host, 8)
    assert (again.memory, again.hours) == (found.plan.memory, found.plan.hours)


def test_the_users_settings_and_rate_count() -> None:
    given = {"data.sequence_length": 512, "model.vocab_size": 8192, "schedule.warmup_steps": 7}
    found = fitted(hours=24.0, given=given, rate=Rate(0.2, "--mfu"), tokens_per_parameter=40.0)
    config = found.plan.resolved.config
    assert (config.data.sequence_length, config.model.vocab_size, config.schedule.warmup_steps) == (512, 8192, 7)
    assert found.plan.tokens_per_parameter == pytest.approx(40, rel=1e-3)
    assert found.plan.hours == pytest.approx(found.plan.total_flops / (209.5e12 * 0.2) / 3600)
    assert found.plan.hours <= 24


def test_the_command_writes_both_files_and_overwrites_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--fit", "--gpu", "rtx-5090", "--days", "0.1")
    code, out, _ = called(capsys, *words)
    assert code == 0
    yaml_file, json_file = sorted(tmp_path.iterdir(), reverse=True)
    assert (yaml_file.suffix, json_file.suffix, yaml_file.stem) == (".yaml", ".json", json_file.stem)
    assert_names(out, yaml_file.name, json_file.name, "RTX 5090", "fits")
    before = yaml_file.read_bytes()
    assert called(capsys, *words)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{yaml_file.stem}{number}{suffix}" for number in ("", "-2") for suffix in (".yaml", ".json")
    }
    code, _, error = called(capsys, *words, "--write", yaml_file.stem)
    assert code == 2
    assert_names(error, yaml_file.name, "--write")
    assert yaml_file.read_bytes() == before


def test_an_impossible_request_names_a_possible_one() -> None:
    message = refused(fitted, hours=0.001)
    found = re.search(r"--days (\S+) or --tokens-per-parameter (\S+)", message)
    assert found
    assert fitted(hours=24 * float(found[1])).plan.fit.level == "fits"
    assert fitted(hours=0.001, tokens_per_parameter=float(found[2])).plan.fit.level == "fits"
    tiny = replace(gpu_by_name("T4"), memory_bytes=1 << 30)
    assert_names(refused(fitted, device=tiny), "1.0 GiB")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--fit", "--days", "7"], ["--gpu", *known_gpus()]),
        (["--fit", "--gpu", "rtx-6090", "--days", "7"], ["rtx-6090", *known_gpus()]),
        (["--fit", "--gpu", "H100"], ["--days"]),
        (["--fit", "--gpu", "H100", "--days", "0"], ["--days 0"]),
        (["--fit", "--gpu", "H100", "--days", "nan"], ["--days"]),
        (["--fit", "--gpu", "H100", "--days", "1", "--tokens-per-parameter", "-1"], ["--tokens-per-parameter -1"]),
        (["--fit", "--gpu", "H100", "--days", "1", "train.steps=3", "parallel.tensor=2"], ["train.steps"]),
        (["--fit", "--gpu", "H100", "--days", "1", "parallel.tensor=2"], ["parallel.tensor"]),
        (["--fit", "--gpu", "H100", "--days", "1", "--config", "quickstart"], ["--fit", "--config"]),
        (["--days", "1"], ["--days", "--fit"]),
        (["--write", "x"], ["--write", "--fit"]),
        (["--fit", "--gpu", "H100", "--days", "1", "data.sequence_length=-1"], ["data.sequence_length=-1"]),
        (["--fit", "--gpu", "H100", "--days", "1", "data.seqence_length=1"], ["data.seqence_length"]),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str],
    names: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = called(capsys, *words)
    assert code == 2
    assert_names(error, *names)
    assert not [*tmp_path.iterdir()]
