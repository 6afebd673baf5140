"""`make lock`: resolves requirements.in and requirements-dev.in again, one set of versions for Python 3.10-3.12.

It needs `uv`. The requirements of a CUDA build of torch (nvidia-*, triton) are not locked: the index decides which
build of torch is installed, and torch pins them itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = re.compile(r"(nvidia-|cuda-|triton|pytorch-triton)")
FIRST = ("torch", "deepspeed")  # installed before the others
LINUX = {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux", "implementation_name": "cpython"}
PLACES = [
    {**LINUX, "python_version": python, "python_full_version": f"{python}.9", "platform_machine": machine}
    for python in ("3.10", "3.11", "3.12")
    for machine in ("x86_64", "aarch64")
]


def resolve(inputs: list[str], constraints: Path | None = None) -> dict[str, str]:
    """Name -> line (`name==version ; marker`) of each package that these inputs need on megalm's platforms."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.10", "--fork-strategy", "fewest"]
    command += ["--no-header", "--no-annotate", "--quiet"]
    if constraints is not None:
        command += ["--constraint", str(constraints)]
    result = subprocess.run([*command, *inputs], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"make lock: uv found no set of versions:\n{result.stderr}")
    lines: dict[str, str] = {}
    for text in (line.strip() for line in result.stdout.splitlines() if "==" in line):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        line = locked_line(requirement)
        if line is None or OF_TORCH.match(name):
            continue
        if lines.setdefault(name, line) != line:
            sys.exit(f"make lock: {name} needs two versions ({lines[name]}; {line}); narrow it in requirements.in")
    return lines


def locked_line(requirement: Requirement) -> str | None:
    """The lock's line of a requirement; None if only other platforms need it.

    A marker that is true on all of megalm's platforms is left out, and so is a version's local part (`+cpu`), which
    names the build of an index.
    """
    version = next(iter(requirement.specifier)).version.split("+")[0]
    line = f"{canonicalize_name(requirement.name)}=={version}"
    if requirement.marker is None or requirement.name == "torch":
        return line
    needed = [requirement.marker.evaluate(place) for place in PLACES]
    if not any(needed):
        return None
    return line if all(needed) else f"{line} ; {requirement.marker}".replace('"', "'")


def rewrite(path: Path, lines: list[str]) -> None:
    """Replace a lock's lines and keep its opening comment."""
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    path.write_text("\n".join([*comment, *lines]) + "\n")


def main() -> int:
    if shutil.which("uv") is None:
        sys.exit("make lock: uv is not on PATH; run pip install uv in a separate environment")
    runtime = resolve(["requirements.in"])
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "runtime.txt"
        constraints.write_text("\n".join(runtime.values()) + "\n")
        both = resolve(["requirements.in", "requirements-dev.in"], constraints)
    first = [runtime[name] for name in FIRST]
    rewrite(ROOT / "requirements.lock", first + sorted(line for name, line in runtime.items() if name not in FIRST))
    rewrite(ROOT / "requirements-dev.lock", sorted(line for name, line in both.items() if name not in runtime))
    return 0


if __name__ == "__main__":
    sys.exit(main())
