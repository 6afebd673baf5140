"""Prints the torch that `make SYSTEM=1` finds in the interpreter's packages; exit code 1 if megalm cannot use it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


def main() -> int:
    match = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', SETUP.read_text())
    assert match, "setup.py has no torch>=A.B,<C.D"
    low, high = tuple(map(int, match.group(1, 2))), tuple(map(int, match.group(3, 4)))
    wanted = f"torch >={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    try:
        import torch
    except (ImportError, OSError) as error:
        print(f"make: SYSTEM=1, but this Python has no usable torch ({error}); leave SYSTEM=1 out", file=sys.stderr)
        return 1
    major, minor = torch.__version__.split(".")[:2]
    if not low <= (int(major), int(minor)) < high:
        print(f"make: SYSTEM=1 found torch {torch.__version__}, megalm needs {wanted}", file=sys.stderr)
        return 1
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    print(f"    torch {torch.__version__} ({cuda}) of {Path(torch.__file__).parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
