"""Child processes run the code of the checkout that was started, and nothing that lies in the working directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.jobs import ROOT

pytestmark = pytest.mark.e2e

# Names that Python, multiprocessing or the mirror import early.
TRAPS = ("mlflow", "random", "tempfile", "threading", "logging", "typing", "numpy", "torch", "console", "yaml")
# A record of every process that loads the package of a checkout.
RECORD = '\n__import__("pathlib").Path({folder!r}, str(__import__("os").getpid())).touch()\n'

TRAINER = """
import sys
sys.path.insert(0, {checkout!r})
import megalm
sys.path.pop(0)
from megalm.runs.metrics_log import MetricsWriter
from megalm.tracking.mlflow_mirror.mirror_process import start_mirror
handle = start_mirror({run!r})
with MetricsWriter({run!r} + "/metrics.jsonl") as writer:
    writer.row("event", event="start", attempt=1)
    writer.row("train", step=1, loss=1.0)
    writer.row("event", event="end", step=1, status="finished", exit_code=0)
sys.exit(0 if handle.finish(180) else 1)
"""


class Checkout:
    """A copy of this checkout that is not installed, and a working directory full of traps."""

    def __init__(self, folder: Path, inside: bool) -> None:
        self.root = folder / "checkout"
        for name in ("megalm", "launch", "data_tools", "ds_configs"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.directory = self.root if inside else folder / "elsewhere"
        self._ran, self._sprung = folder / "ran", folder / "sprung"
        for path in (self.directory, self._ran, self._sprung):
            path.mkdir(exist_ok=True)
        with (self.root / "megalm" / "__init__.py").open("a") as file:
            file.write(RECORD.format(folder=str(self._ran)))
        for name in TRAPS:
            trap = f"open({str(self._sprung / name)!r}, 'w').close()\nraise ImportError('a trap')\n"
            (self.directory / f"{name}.py").write_text(trap)

    def run(self, script: Path, *words: object) -> str:
        """Run a script in the working directory; return its output."""
        command = [sys.executable, str(script), *map(str, words)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert sorted(path.name for path in self._sprung.iterdir()) == []
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def processes(self) -> int:
        """How many processes have loaded the package of this checkout."""
        return len(list(self._ran.iterdir()))


@pytest.fixture(params=["outside", "inside"])
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Checkout:
    """Started from outside, or from its own folder, where a person keeps files too."""
    return Checkout(tmp_path, request.param == "inside")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="multiprocessing has no safe import path before Python 3.11")
def test_data_workers_run_the_code_of_the_tool(checkout: Checkout, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{number} of many. " * 7000}) + "\n" for number in range(130)))
    assert lines.stat().st_size > 9e6  # several units of work
    words = ("--input", lines, "--tokenizer", "bytes", "--output-prefix", tmp_path / "out", "--workers", 2)
    checkout.run(checkout.root / "data_tools" / "build_dataset.py", *words)
    assert checkout.processes == 3  # the tool and two workers
    assert (tmp_path / "out.idx").is_file()


# From outside the two cheaper tests here find the same.
@pytest.mark.parametrize("checkout", [pytest.param("outside", marks=pytest.mark.slow), "inside"], indirect=True)
def test_the_mirror_runs_the_code_of_the_training_process(checkout: Checkout, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    trainer = tmp_path / "scripts" / "trainer.py"
    trainer.write_text(TRAINER.format(checkout=str(checkout.root), run=str(run)))
    checkout.run(trainer)
    assert checkout.processes == 2, (run / "mlflow.log").read_text()
    assert json.loads((run / "mlflow.json").read_text())["status_sent"] == "FINISHED"


def test_a_checkout_that_is_not_installed_runs_its_own_code(checkout: Checkout) -> None:
    plan = checkout.run(checkout.root / "launch" / "pretrain.py", "--dry-run", "--world-size", 2)
    assert "quickstart" in plan
    assert checkout.processes == 1
