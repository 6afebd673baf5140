"""requirements.lock: complete, and installable on every Python that is promised.

torch and deepspeed are left out where pip is asked: which build of torch an index gives is its own affair, and
deepspeed exists as source only.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12")
OWN_STEP = {"torch", "deepspeed"}
# What pip writes when it is the network, not the lock.
UNREACHABLE = re.compile(r"connection broken|Could not fetch URL|Failed to establish|name resolution|timed out", re.I)


def requirements(file: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    names = [canonicalize_name(item.name) for item in parsed]
    assert len(set(names)) == len(names), f"{file} names a package twice"
    return dict(zip(names, parsed, strict=True))


def stated_in_setup() -> dict[str, Requirement]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    value = next(
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    return {canonicalize_name(item.name): item for item in map(Requirement, ast.literal_eval(value))}


def test_every_lock_line_is_one_version() -> None:
    for file in ("requirements.lock", "requirements-dev.lock"):
        for name, item in requirements(file).items():
            assert [part.operator for part in item.specifier] == ["=="], f"{file}: {name}"


def test_the_lock_meets_setup_and_comes_with_the_build_tools() -> None:
    locked = requirements("requirements.lock")
    for name, item in stated_in_setup().items():
        assert name in locked, f"setup.py needs {name}, requirements.lock lacks it"
        version = next(iter(locked[name].specifier)).version
        assert version in item.specifier, f"{name}=={version} is not {item}"
    assert {"setuptools", "wheel", "ninja"} <= locked.keys()


def test_the_lock_inputs_are_those_of_setup() -> None:
    stated, inputs = stated_in_setup(), requirements("requirements.in")
    assert {name: item.specifier for name, item in stated.items()}.items() <= {
        name: item.specifier for name, item in inputs.items()
    }.items()
    assert inputs.keys() - stated.keys() == {"setuptools", "wheel", "ninja"}


def test_the_locks_name_what_their_inputs_name() -> None:
    assert requirements("requirements.in").keys() <= requirements("requirements.lock").keys()
    assert requirements("requirements-dev.in").keys() <= requirements("requirements-dev.lock").keys()
    assert not requirements("requirements.lock").keys() & requirements("requirements-dev.lock").keys()


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_pip_finds_a_wheel_of_everything(
    python: str, tmp_path: Path, require: Callable[[str, object, str], None]
) -> None:
    locked = requirements("requirements.lock") | requirements("requirements-dev.lock")
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    wanted = {
        name: item
        for name, item in locked.items()
        if name not in OWN_STEP and (item.marker is None or item.marker.evaluate(environment))
    }
    (tmp_path / "wanted.txt").write_text("".join(f"{item.name}{item.specifier}\n" for item in wanted.values()))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--retries", "2"]
    command += ["--only-binary=:all:", "--python-version", python, "--target", str(tmp_path / "target")]
    command += ["--report", str(tmp_path / "report.json"), "--requirement", str(tmp_path / "wanted.txt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)
    if result.returncode:
        require("index", not UNREACHABLE.search(result.stderr), "the package index cannot be reached")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    found = {canonicalize_name(item["metadata"]["name"]) for item in report["install"]}
    assert wanted.keys() <= found
    # pip reads the markers of dependencies for the Python it runs on: only there is more than the lock a gap in it.
    if python == f"{sys.version_info[0]}.{sys.version_info[1]}":
        assert found <= wanted.keys(), "the lock is incomplete"
