"""Packages that only one test needs, each set in its own folder of the user's cache; made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalm-tests"


def with_packages(name: str, packages: Sequence[str], require: Any) -> dict[str, str]:
    """The environment variables that put exactly these packages before the installed ones."""
    folder = _CACHE / f"{name}-python{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.is_dir():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            made = subprocess.run([*pip, "--target", temporary, *packages], capture_output=True, text=True, check=False)
            require("index", made.returncode == 0, f"{name} cannot be installed: {made.stderr[-500:]}")
            shutil.copytree(temporary, folder, dirs_exist_ok=True)
    return {"PYTHONPATH": str(folder)}
