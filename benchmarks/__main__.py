"""Runs a benchmark: `python -m benchmarks NAME [OPTIONS]`, or as a job's ranks by `torchrun -m benchmarks NAME`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from megalm.engine.deepspeed_patches import decompose_tanh, limit_openmp_spin, silence

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if "\ndef main()" in path.read_text())


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m benchmarks NAME [--help]; NAME is one of {', '.join(NAMES)}")
    limit_openmp_spin()  # before torch is imported, as a run does
    decompose_tanh()
    silence()
    importlib.import_module(f"benchmarks.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    main()
