"""`make lock`: resolves requirements.in and requirements-dev.in anew, one set of versions for Python 3.10-3.12.

Needs `uv`, which nothing else here needs. What a CUDA build of torch brings (nvidia-*, triton) is not locked:
which build of torch it is depends on the index, and torch pins those packages itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = re.compile(r"(nvidia-|cuda-|triton|pytorch-triton)")
FIRST = ("torch", "deepspeed")  # installed before the others, so they stand first


def resolve(inputs: list[str], constraints: list[Path]) -> dict[str, str]:
    """Name -> line (`name==version ; marker`) of everything that these inputs need."""
    command = ["uv", "pip", "compile", "--universal", "--python-version", "3.10", "--fork-strategy", "fewest"]
    command += ["--no-header", "--no-annotate", "--quiet", "--no-emit-index-url", "--no-emit-find-links"]
    for path in constraints:
        command += ["--constraint", str(path)]
    result = subprocess.run([*command, *inputs], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"make lock: uv found no set of versions:\n{result.stderr}")
    lines = [line.strip() for line in result.stdout.splitlines() if "==" in line]
    return {line.split("==")[0]: line for line in lines if not OF_TORCH.match(line)}


def rewrite(path: Path, lines: list[str]) -> None:
    """Replace a lock's lines and keep the comment it opens with."""
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    path.write_text("\n".join([*comment, *lines]) + "\n")


def main() -> int:
    if shutil.which("uv") is None:
        sys.exit("make lock: needs uv on PATH (pip install uv, in an environment of its own)")
    runtime = resolve(["requirements.in"], [])
    first = [runtime[name] for name in FIRST]
    rewrite(ROOT / "requirements.lock", first + [line for name, line in sorted(runtime.items()) if name not in FIRST])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(runtime.values()) + "\n")
        constraints.flush()
        both = resolve(["requirements.in", "requirements-dev.in"], [Path(constraints.name)])
    rewrite(ROOT / "requirements-dev.lock", [line for name, line in sorted(both.items()) if name not in runtime])
    return 0


if __name__ == "__main__":
    sys.exit(main())
