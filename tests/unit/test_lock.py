"""requirements.lock and its inputs say the same as setup.py; tests/e2e/test_lock_installs.py asks pip."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def requirements(file: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    names = [canonicalize_name(item.name) for item in parsed]
    assert len(set(names)) == len(names), f"{file} names a package twice"
    return dict(zip(names, parsed, strict=True))


def setup_requirements() -> dict[str, Requirement]:
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
    for name, item in setup_requirements().items():
        assert name in locked, f"setup.py needs {name}, requirements.lock lacks it"
        version = next(iter(locked[name].specifier)).version
        assert version in item.specifier, f"{name}=={version} is not {item}"
    assert {"setuptools", "wheel", "ninja"} <= locked.keys()


def test_the_lock_inputs_are_those_of_setup() -> None:
    required, inputs = setup_requirements(), requirements("requirements.in")
    assert {name: item.specifier for name, item in required.items()}.items() <= {
        name: item.specifier for name, item in inputs.items()
    }.items()
    assert inputs.keys() - required.keys() == {"setuptools", "wheel", "ninja", "python-dateutil"}


def test_the_locks_name_what_their_inputs_name() -> None:
    assert requirements("requirements.in").keys() <= requirements("requirements.lock").keys()
    assert requirements("requirements-dev.in").keys() <= requirements("requirements-dev.lock").keys()
    assert not requirements("requirements.lock").keys() & requirements("requirements-dev.lock").keys()


def test_what_is_locked_needs_nothing_that_is_not() -> None:
    """By the metadata of what is installed here; torch and deepspeed, installed by themselves, may need more."""
    locked = requirements("requirements.lock") | requirements("requirements-dev.lock")
    left = [(name, frozenset(item.extras)) for name, item in setup_requirements().items()]
    left += [(name, frozenset()) for name in locked]
    seen = set()
    while left:
        name, extras = place = left.pop()
        if place in seen or name in {"torch", "deepspeed"}:
            continue
        seen.add(place)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform or Python
        for item in map(Requirement, wanted):
            if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                needed = canonicalize_name(item.name)
                assert needed in locked, f"{name} needs {item}, the lock lacks it"
                version = next(iter(locked[needed].specifier)).version
                assert item.specifier.contains(version, prereleases=True), f"{name} needs {item}, {version} is locked"
                left.append((needed, frozenset(item.extras)))
    assert len(seen) > len(locked) / 2
