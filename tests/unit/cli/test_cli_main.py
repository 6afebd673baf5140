"""`megalm`: quick to answer, one line for an error, the right exit code."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import megalm
from megalm.cli import main as cli
from megalm.errors import CheckpointError, ConfigError, DataError, MegalmError
from tests.messages import assert_names

HEAVY = {"torch", "deepspeed", "mlflow", "matplotlib", "numpy", "pyarrow", "transformers"}


OVERVIEW = """
import importlib, sys
from megalm.cli.main import COMMANDS, main
try:
    main(["--help"])
except SystemExit as leave:
    assert leave.code == 0
print("LOADED", *sorted(sys.modules))
for module, _ in COMMANDS.values():
    importlib.import_module(f"megalm.cli.{module.partition(':')[0]}")
print("LOADED", *sorted(sys.modules))
"""


def test_the_overview_names_every_command_and_loads_nothing_heavy() -> None:
    """Nor does any command load torch before it runs: it first sets the environment that torch reads."""
    result = subprocess.run([sys.executable, "-c", OVERVIEW], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    overview, loaded, loaded_by_commands = result.stdout.split("LOADED")
    assert not {"torch", "deepspeed", "mlflow"} & set(loaded_by_commands.split())
    for name in cli.available_commands():
        assert f" {name} " in overview
    assert not HEAVY & set(loaded.split())
    assert {"doctor", "checkpoint", "compare", "track"} <= set(cli.available_commands())


def test_the_version() -> None:
    words = [sys.executable, "-m", "megalm.cli.main", "--version"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"megalm {megalm.__version__}\n")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["checkpointt", "list"], ["'checkpointt'", "'checkpoint'"]),
        (["checkpoint", "list", "nowhere"], ["nowhere"]),
    ],
)
def test_what_is_refused_is_one_line_and_exit_code_2(
    words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("megalm: error: ")
    assert error.count("\n") == 1
    assert_names(error, *names)


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (MegalmError("a\nb"), "a b"),
        (DataError("a\nb"), "a b"),
        (CheckpointError("a b"), "a b"),
        (ConfigError("a\nb"), "a b"),
        (ConfigError("a\nb", "c", "a b"), "2 problems\n  a b\n  c"),
        (pickle.loads(pickle.dumps(ConfigError("a", "b"))), "2 problems\n  a\n  b"),
    ],
)
def test_every_error_for_people_leaves_with_its_own_code(
    error: MegalmError, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_of: object) -> None:
        raise error

    monkeypatch.setattr("megalm.tracking.mlflow_mirror.mirror_process.sync_trackers", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["track", "sync", "."])
    assert caught.value.code == error.exit_code
    assert capsys.readouterr().err == f"megalm: error: {lines}\n"


@pytest.mark.parametrize(
    ("words", "path", "code"),
    [
        (["report", "x" * 300], "x" * 300, errno.ENAMETOOLONG),
        (["checkpoint", "show", "x" * 300], "x" * 300, errno.ENAMETOOLONG),
        (["plan", "--config", "x" * 300], "x" * 300, errno.ENAMETOOLONG),
        (["track", "sync", "run"], "run/mlflow.lock", errno.EISDIR),
    ],
    ids=["report", "checkpoint", "plan", "track"],
)
def test_what_the_file_system_refuses_is_one_line(
    words: list[str],
    path: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/mlflow.lock").mkdir(parents=True)
    Path("run/metrics.jsonl").touch()
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("megalm: error: ")
    assert_names(said, path, os.strerror(code))
    assert said.count("\n") == 1


def test_a_misspelt_run_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run/mlflow.lock").mkdir(parents=True)  # whoever delivers this run fails
    Path("run/metrics.jsonl").touch()
    with pytest.raises(SystemExit) as caught:
        cli.main(["track", "sync", "run", "rum"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert_names(error, "rum")
    assert "mlflow.lock" not in error


@pytest.mark.parametrize(
    ("words", "code", "names"),
    [
        (["plan"], 2, ["torch", "--gpu-memory"]),
        (["plan", "--gpu-memory", "24"], 0, []),
        (["checkpoint", "diff", "run", "run"], 1, ["torch", "make install"]),
    ],
    ids=["plan", "plan for GPUs", "diff"],
)
def test_a_machine_without_torch_does_what_needs_none(
    words: list[str], code: int, names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("megalm.engine.device", "megalm.checkpoint.diff", "megalm.checkpoint.checkpoint_reader"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert (caught.value.code or 0) == code
    assert_names(capsys.readouterr().err, *names)


@pytest.mark.parametrize("name", cli.available_commands())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"megalm {name}" in capsys.readouterr().out
