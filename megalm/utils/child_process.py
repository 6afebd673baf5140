"""Start Python processes that run this checkout's code, and nothing from the working directory.

`python -m` and `python -c` import from the working directory first, where a person's `random.py` may lie, and an
installed megalm may be another checkout's. As a script, `child_process.py MODULE WORD...` runs `main` of a module of
the megalm around it. multiprocessing reads it as the main program of data workers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_IN_WORKERS = "__mp_main__"  # as multiprocessing names it
# Keeps the working directory out of the import path of `python -c` and `python -m`, from Python 3.11 on.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}


def child_command(module: str, words: Sequence[str]) -> list[str]:
    """Return the command that runs `main` of `module` in a new process; start it with `child_environment`."""
    return [sys.executable, os.path.abspath(__file__), module, *words]


def child_environment() -> dict[str, str]:
    """Return this process's environment for its children, with its import path but for the working directory."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, **SAFE_PATH}


def _pin_package() -> None:
    """Load the megalm package of this file, wherever another one may be installed."""
    if "megalm" not in sys.modules:
        spec = importlib.util.spec_from_file_location("megalm", os.path.join(_PACKAGE, "__init__.py"))
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["megalm"] = package
        spec.loader.exec_module(package)


if __name__ in ("__main__", _IN_WORKERS):
    if sys.path and os.path.abspath(sys.path[0] or os.curdir) == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # this folder, which holds parts of a package
    _pin_package()
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.exit(importlib.import_module(sys.argv[0]).main())
