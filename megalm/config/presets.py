"""The run presets shipped with megalm: YAML files of megalm/presets, one a run, any depth of folders."""

from __future__ import annotations

from pathlib import Path

import megalm
from megalm.config.strict import shown
from megalm.config.suggest import did_you_mean
from megalm.errors import ConfigError

PRESETS_FOLDER = Path(megalm.__file__).parent / "presets"
DEFAULT_PRESET = "quickstart"


def preset_paths() -> dict[str, Path]:
    """Name -> file of every shipped preset, sorted by name; the name is the file's, without its suffix."""
    return {path.stem: path for path in sorted(PRESETS_FOLDER.rglob("*.yaml"), key=lambda path: path.stem)}


def preset_path(name: object, where: str = "presets") -> Path:
    """The file of a preset.

    Args:
        where: the file that names it, for the message.

    Raises:
        ConfigError: no preset of this name; lists those that there are.
    """
    paths = preset_paths()
    if not isinstance(name, str):
        raise ConfigError(f"{where}: preset={shown(name)}: expected text or null")
    if name not in paths:
        known = ", ".join(paths)
        raise ConfigError(f"{where}: preset {name!r} does not exist{did_you_mean(name, paths)}; presets: {known}")
    return paths[name]


def describe_preset(name: str) -> str:
    """What the preset is, in a line or two: the comment that its file opens with."""
    lines = []
    for line in preset_path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)
