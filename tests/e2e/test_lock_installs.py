"""requirements.lock is complete, and installable on every Python that is promised: by pip itself, without installing.

torch and deepspeed are left out: which build of torch an index gives is its own affair, and deepspeed exists as source
only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.container_files import DEFINITION, copied, sections

# Minutes of downloads; tests/unit/test_lock.py shows by the metadata of what is installed that the lock is complete.
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12")
THIS_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
OWN_STEP = {"torch", "deepspeed"}
# What pip writes when it is the network, not the lock.
UNREACHABLE = re.compile(r"connection broken|Could not fetch URL|Failed to establish|name resolution|timed out", re.I)


def locked(python: str) -> dict[str, Requirement]:
    """Name -> what both locks want on this Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    files = (ROOT / "requirements.lock", ROOT / "requirements-dev.lock")
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    wanted = {canonicalize_name(item.name): item for item in map(Requirement, filter(None, lines))}
    return {
        name: item
        for name, item in wanted.items()
        if name not in OWN_STEP and (item.marker is None or item.marker.evaluate(environment))
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.Popen[str]]]:
    """One pip for each Python, all at once: where each leaves its report, and its process."""
    return {python: _start(python, tmp_path_factory.mktemp("pip")) for python in PYTHONS}


def _start(python: str, folder: Path) -> tuple[Path, subprocess.Popen[str]]:
    lines = (f"{item.name}{item.specifier}\n" for item in locked(python).values())
    (folder / "wanted.txt").write_text("".join(lines))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--retries", "2"]
    command += ["--only-binary=:all:", "--python-version", python, "--target", str(folder / "target")]
    command += ["--report", str(folder / "report.json"), "--requirement", str(folder / "wanted.txt")]
    # pip reads the markers of dependencies for the Python it runs on: on another one it would follow the wrong ones.
    command += [] if python == THIS_PYTHON else ["--no-deps"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return folder / "report.json", process


@pytest.mark.parametrize("python", PYTHONS)
def test_pip_finds_a_wheel_of_everything(
    python: str,
    started: dict[str, tuple[Path, subprocess.Popen[str]]],
    require: Callable[[str, object, str], None],
) -> None:
    report, process = started[python]
    _, errors = process.communicate(timeout=550)
    if process.returncode:
        require("index", not UNREACHABLE.search(errors), "the package index cannot be reached")
    assert process.returncode == 0, errors
    installed = json.loads(report.read_text())["install"]
    found = {canonicalize_name(item["metadata"]["name"]) for item in installed}
    assert found == locked(python).keys(), "the lock is incomplete"


def test_the_install_part_of_the_containers_in_a_clean_folder(
    tmp_path: Path, require: Callable[[str, object, str], None]
) -> None:
    """With no more than they copy, and nothing of this environment; the system packages are this machine's."""
    home = tmp_path / "opt" / "megalm"
    home.mkdir(parents=True)
    for source in copied():
        ours = ROOT / source
        if ours.is_dir():
            shutil.copytree(ours, home / source, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
        else:
            shutil.copy2(ours, home / source)
    shell = sections(DEFINITION.read_text())["post"].partition("/lists/*\n")[2].replace("/opt/megalm", str(home))
    shell = "set -e\n" + shell.replace("rm -rf /root/.cache", "")
    kept = ("PIP_", "HOME", "SSL_CERT", "https_proxy", "http_proxy")
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment |= {"PYTHON": sys.executable, "PATH": "/usr/local/bin:/usr/bin:/bin"}

    def run(*words: str, seconds: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=home, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )

    done = run("sh", "-c", shell, seconds=1400)
    if done.returncode:
        require("index", not UNREACHABLE.search(done.stderr), "the package index cannot be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    tools = home / ".venv" / "bin"
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    dry_run = ("launch/pretrain.py", "--dry-run", "--deepspeed_config", "zero2.json")
    for words in ((str(tools / "megalm"), "presets"), (str(tools / "python"), *dry_run)):
        done = run(*words, seconds=300)
        assert done.returncode == 0, done.stderr
