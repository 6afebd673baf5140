"""`megalm`: quick to answer, one line for an error, the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megalm
from megalm.cli import main as cli
from megalm.errors import CheckpointError, DataError, MegalmError

HEAVY = {"torch", "deepspeed", "mlflow", "matplotlib", "numpy", "pyarrow", "transformers"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megalm.cli.main", *words], capture_output=True, text=True, check=False
    )


def test_the_overview_names_every_command_and_loads_nothing_heavy() -> None:
    program = "import sys\nfrom megalm.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit as leave:\n"
    program += "    print('LOADED', *sorted(sys.modules))\n    sys.exit(leave.code)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    overview, loaded = result.stdout.split("LOADED")
    for name in cli.available_commands():
        assert f" {name} " in overview
    assert not HEAVY & set(loaded.split())
    assert {"doctor", "checkpoint", "compare", "track"} <= set(cli.available_commands())


def test_the_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"megalm {megalm.__version__}\n")


def test_an_unknown_command_gets_the_nearest_name() -> None:
    result = run("checkpointt", "list")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("megalm: error: no such command 'checkpointt', did you mean 'checkpoint'?")
    assert result.stderr.count("\n") == 1


def test_a_refused_input_is_one_line_and_exit_code_2() -> None:
    result = run("checkpoint", "list", "nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("megalm: error: nowhere: no such run folder")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("error", [MegalmError("a\nb"), DataError("a\nb"), CheckpointError("a b")])
def test_every_error_for_people_leaves_with_its_own_code(
    error: MegalmError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_run_dir: Path, _deadline: float) -> None:
        raise error

    monkeypatch.setattr("megalm.tracking.mlflow_mirror.mirror_process.sync", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["track", "sync", "."])
    assert caught.value.code == error.exit_code
    assert capsys.readouterr().err == "megalm: error: a b\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["report", "x" * 300], "File name too long"),
        (["checkpoint", "show", "x" * 300], "File name too long"),
        (["plan", "--config", "x" * 300], "File name too long"),
        (["track", "sync", "run"], "run/mlflow.lock: Is a directory"),
    ],
    ids=["report", "checkpoint", "plan", "track"],
)
def test_what_the_file_system_refuses_is_one_line(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/mlflow.lock").mkdir(parents=True)
    Path("run/metrics.jsonl").touch()
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("megalm: error: ")
    assert why in said
    assert said.count("\n") == 1


def test_a_misspelt_run_is_told_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/mlflow.lock").mkdir(parents=True)  # whoever delivers this run fails
    Path("run/metrics.jsonl").touch()
    with pytest.raises(SystemExit) as caught:
        cli.main(["track", "sync", "run", "rum"])
    assert caught.value.code == 2
    assert "rum: no such run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["plan"], 2, "plan for GPUs of so many GiB with --gpu-memory"),
        (["plan", "--gpu-memory", "24"], 0, ""),
        (["checkpoint", "diff", "run", "run"], 1, "this needs torch, which is not installed here; `make install`"),
    ],
    ids=["plan", "plan for GPUs", "diff"],
)
def test_a_machine_without_torch_does_what_needs_none(
    words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("megalm.engine.device", "megalm.checkpoint.diff", "megalm.checkpoint.checkpoint_reader"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert (caught.value.code or 0) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.available_commands())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"megalm {name}" in capsys.readouterr().out
