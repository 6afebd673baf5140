"""What a run that goes on was configured with: it stands for whatever is not stated anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, named_json, read_deepspeed_json
from megalm.config.loading import SAVED_CONFIG, GivenConfig, LoadedConfig, external_name
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields, shown
from megalm.planning.resolve import ResolvedRun
from megalm.runs.run_folder import RunFolder, newest_run
from megalm.utils.atomic_files import read_json
from megalm.utils.formatting import flatten_mapping

_DEFAULT_DEEPSPEED_CONFIG = "ds_configs/zero2.json"

# Of one start alone; the last step, of which the schedule's note tells; and what describes and does nothing.
_NOT_COMPARED = ("run.", "resume.", "train.steps", "documented.")


@dataclass(frozen=True)
class ConfigFiles:
    """Both files of a run, read once.

    Attributes:
        saved: what the folder of the run that goes on says of its configuration; None: the run starts.
    """

    loaded: LoadedConfig
    deepspeed: DeepSpeedConfig
    saved: RunConfig | None = None


def read_settings(
    config: str | None, overrides: Sequence[str], deepspeed_config: str | None, resume: bool, ranks: int
) -> ConfigFiles:
    """Both files of a run that starts, or with `resume` goes on where there is one.

    Where no DeepSpeed JSON is stated it is that of a recipe that is named now, else the run's own, else the default.
    A checkpoint goes on in any layout: where the run's own does not divide the `ranks` of now, and none is stated, the
    default stands.

    Raises:
        ConfigError: what is stated, or what the run has, is wrong by itself.
    """
    given = GivenConfig(config, overrides)
    loaded = given.alone()
    own = _find_own(loaded) if resume else None
    if own is None:
        default = _recipe_json(loaded) or named_json(_DEFAULT_DEEPSPEED_CONFIG)
        return ConfigFiles(loaded, read_deepspeed_json(deepspeed_config or default))
    # By its name: another job may begin a newer unnamed run at any moment.
    loaded = given.over(own.config_yaml, own.name)
    degrees = loaded.config.parallel
    if ranks % (degrees.tensor * degrees.pipeline) and not any(key.startswith("parallel.") for key in loaded.stated):
        loaded = given.over(own.config_yaml, own.name, not_kept=("parallel",))
    deepspeed = read_deepspeed_json(deepspeed_config or _recipe_json(loaded) or own.deepspeed_json)
    return ConfigFiles(loaded, deepspeed, given.saved(own.config_yaml))


def _recipe_json(loaded: LoadedConfig) -> Path | None:
    """What a recipe names that is not the run's own anyway: that run may have been started with a JSON of its own."""
    named = loaded.config.deepspeed_config
    return None if named is None or loaded.sources["deepspeed_config"] == SAVED_CONFIG else named_json(named)


def _find_own(loaded: LoadedConfig) -> RunFolder | None:
    """The run that is named, or the newest unnamed one; None where none was ever configured there."""
    root = Path(loaded.config.run.root).expanduser()
    name = loaded.config.run.name or newest_run(root, loaded.preset)
    folder = None if name is None else RunFolder(root / name)
    return folder if folder is not None and folder.config_yaml.is_file() else None


def config_changes(folder: RunFolder, run: ResolvedRun, saved: RunConfig) -> list[str]:
    """What of `run` is not as its folder still says, a line each; before `write_facts`.

    Args:
        saved: what the folder says of the configuration.

    Raises:
        ConfigError: a file of the folder that is damaged.
    """
    original = folder.deepspeed_json
    lines = [f"what is not stated now is as in {folder.config_yaml}"]
    before, now = (_values(it) for it in (saved, run.config))
    lines += [
        f"{external_name(key)} was {shown(before[key])}, is {shown(value)} ({run.sources[key]})"
        for key, value in now.items()
        if value != before[key] and not key.startswith(_NOT_COMPARED)
    ]
    if original.is_file():
        there, here = flatten_mapping(read_json(original)), flatten_mapping(read_json(Path(run.deepspeed_source.path)))
        lines += [
            f"{run.deepspeed_source.path}: {key} was {shown(there.get(key))}, is {shown(here.get(key))}"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ]
    return lines


def _values(config: RunConfig) -> dict[str, Any]:
    found = {}
    values = config.model_dump(mode="json")
    for key in leaf_fields(RunConfig):
        value: Any = values
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found
