"""Prints the lines of requirements.lock that one step of the installation passes to pip.

    python tools/locked.py torch | deepspeed      its line
    python tools/locked.py rest [--system]        all other lines

With --system, torch and its requirements come from the interpreter's own packages. `rest` leaves the requirements out,
because another version in the virtual environment would shadow those that torch was built with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
OWN_STEP = ("torch", "deepspeed")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_lines(text: str) -> dict[str, str]:
    """Canonical name -> its line, markers included."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {canonical(line.split("==")[0]): line for line in lines}


def requirements_of(package: str) -> set[str]:
    """Names of all installed packages that an installed one needs, directly or not; without extras."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        try:
            needs = importlib.metadata.requires(waiting.pop()) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # only other platforms or extras need it
        for need in needs:
            match = re.match(r"[A-Za-z0-9._-]+", need)
            if match is None or "extra ==" in need:
                continue
            name = canonical(match.group())
            if name not in found and _installed(name):
                found.add(name)
                waiting.append(name)
    return found


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Lines of requirements.lock for one step of the installation.")
    parser.add_argument("part", choices=[*OWN_STEP, "rest"])
    parser.add_argument("--system", action="store_true")
    options = parser.parse_args()
    lines = locked_lines(LOCK.read_text())
    if options.part in OWN_STEP:
        print(lines[options.part])
        return 0
    left_out = {*OWN_STEP, *(requirements_of("torch") if options.system else ())}
    print("\n".join(line for name, line in lines.items() if name not in left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
