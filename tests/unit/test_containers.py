"""The container files are well-formed, name what exists, and install the same things as each other and as CI."""

from __future__ import annotations

import json
import re

from tests.container_files import DEFINITION, DOCKERFILE, ROOT, apt_packages, copied, instructions, sections

KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
SYSTEM = "ca-certificates"  # beside what CI needs: for the package index


def test_the_dockerfile_keeps_the_rules_of_its_linter() -> None:
    found = instructions(DOCKERFILE.read_text())
    names = [name for name, _ in found]
    assert set(names) <= KNOWN
    assert names.index("FROM") <= 1
    arguments = dict(words.split("=", 1) for name, words in found if name == "ARG")
    (base,) = (re.sub(r"\$\{(\w+)\}", lambda it: arguments[it[1]], words) for name, words in found if name == "FROM")
    assert re.fullmatch(r"[a-z/]+:(?!latest)[\w.-]+", base), "a stated version of the base image"
    assert all(words.startswith("/") for name, words in found if name == "WORKDIR")
    (install,) = (words for name, words in found if name == "RUN" and "apt-get" in words)
    assert re.match(r"apt-get update *&& *apt-get install -y --no-install-recommends ", install)
    assert install.endswith("rm -rf /var/lib/apt/lists/*")
    (command,) = (json.loads(words) for name, words in found if name == "CMD")
    assert command[0] == "megalm"
    assert "sudo" not in DOCKERFILE.read_text()


def test_the_lock_is_installed_before_the_code_is_copied() -> None:
    found = instructions(DOCKERFILE.read_text())
    packages = next(i for i, (name, words) in enumerate(found) if name == "RUN" and ".stamps/deepspeed" in words)
    assert (
        next(i for i, (name, words) in enumerate(found) if name == "COPY" and "requirements.lock" in words) < packages
    )
    assert next(i for i, it in enumerate(found) if it == ("COPY", "megalm megalm")) > packages
    assert "$(STAMPS)/deepspeed:" in (ROOT / "Makefile").read_text()


def test_the_definition_has_what_the_dockerfile_has() -> None:
    parts = sections(DEFINITION.read_text())
    assert parts.keys() == {"", "files", "post", "environment", "runscript"}
    header = dict(line.split(": ") for line in parts[""].splitlines() if line and not line.startswith("#"))
    arguments = dict(words.split("=", 1) for name, words in instructions(DOCKERFILE.read_text()) if name == "ARG")
    assert header == {"Bootstrap": "docker", "From": arguments["BASE"]}
    files = [line.split() for line in parts["files"].splitlines() if line.strip()]
    assert [target for _, target in files] == [f"/opt/megalm/{source}" for source, _ in files]
    assert sorted(source for source, _ in files) == sorted(copied())
    assert apt_packages(parts["post"]) == apt_packages(DOCKERFILE.read_text().split("WORKDIR")[0])
    assert "make -C /opt/megalm install" in parts["post"]


def test_they_copy_what_exists_and_install_what_ci_does() -> None:
    assert copied()
    assert all((ROOT / source).exists() for source in copied())
    ci = set(re.findall(r"^ *need \S+ (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    packages = set(apt_packages(sections(DEFINITION.read_text())["post"]))
    assert packages - {SYSTEM} <= ci | {"python3-venv", "python3-dev"}
    assert {"g++", "make", "python3"} <= packages
