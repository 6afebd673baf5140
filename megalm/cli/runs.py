"""Finding the run folder that a person means."""

from __future__ import annotations

from pathlib import Path

from megalm.config.schema import RunSection
from megalm.config.suggest import did_you_mean
from megalm.errors import ConfigError


def find_run(name: str) -> Path:
    """A run folder by its path, or by its name under the default run root.

    Raises:
        ConfigError: neither is a folder.
    """
    root = Path(RunSection().root)
    for candidate in (Path(name), root / name):
        if candidate.is_dir():
            return candidate
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    raise ConfigError(f"{name}: no such run folder, nor {root / name}{did_you_mean(name, known)}; give its path")
