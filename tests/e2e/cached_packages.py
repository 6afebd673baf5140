"""Packages that only single tests need, in folders of the user's cache: made once, used by processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalm-tests"


def cached_packages(name: str, packages: Sequence[str], require: Callable[[str, object, str], None]) -> Path:
    """A folder for PYTHONPATH with these packages and nothing that they depend on.

    Args:
        name: of the folder; another one for other versions.
        packages: "NAME==VERSION" each.
    """
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            made = subprocess.run([*pip, "--target", temporary, *packages], capture_output=True, text=True, check=False)
            require("index", made.returncode == 0, f"{name} cannot be installed: {made.stderr[-500:]}")
            shutil.copytree(temporary, folder, dirs_exist_ok=True)
    return folder
