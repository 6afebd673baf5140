"""The configuration of a resumed run: its saved settings apply unless they are given again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, named_json, read_deepspeed_json
from megalm.config.loading import SAVED_CONFIG, GivenConfig, LoadedConfig, external_name
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields, shown
from megalm.planning.resolve import ResolvedRun
from megalm.rank_environment import job_and_restarts
from megalm.runs.run_folder import RunFolder, command_line, newest_run, read_mapping
from megalm.utils.atomic_files import read_json
from megalm.utils.formatting import flatten_mapping

_DEFAULT_DEEPSPEED_CONFIG = "ds_configs/zero2.json"

# Not compared: settings of a single start, the last step (the schedule's note reports it), and pure documentation.
_NOT_COMPARED = ("run.", "resume.", "train.steps", "documented.")


@dataclass(frozen=True)
class ConfigFiles:
    """Both configuration files of a run, read once.

    Attributes:
        saved: the configuration in the resumed run's folder; None for a new run.
    """

    loaded: LoadedConfig
    deepspeed: DeepSpeedConfig
    saved: RunConfig | None = None


def read_settings(
    config: str | None, overrides: Sequence[str], deepspeed_config: str | None, resume: bool, ranks: int
) -> ConfigFiles:
    """Read both configuration files of a new run, or of an existing one with `resume` or in a restart of its job.

    Without a given DeepSpeed JSON, use that of a recipe named now, else the run's own, else the default. A checkpoint
    can be resumed in any parallel layout: if the run's own does not divide `ranks`, and none is given, use the default.

    Raises:
        ConfigError: the given or the saved configuration is invalid by itself.
    """
    given = GivenConfig(config, overrides)
    loaded = given.alone()
    own = _find_own(loaded)
    if own is not None and not resume and not _began_in_this_job(own):
        own = None
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
    """Return the DeepSpeed JSON of a recipe given now, not of a saved one: that run may have started with another."""
    named = loaded.config.deepspeed_config
    return None if named is None or loaded.sources["deepspeed_config"] == SAVED_CONFIG else named_json(named)


def _find_own(loaded: LoadedConfig) -> RunFolder | None:
    """Return the named run, or the newest unnamed one; None if it has no saved configuration."""
    root = Path(loaded.config.run.root).expanduser()
    name = loaded.config.run.name or newest_run(root, loaded.preset)
    folder = None if name is None else RunFolder(root / name)
    if folder is not None:
        folder.require_files()
    return folder if folder is not None and folder.config_yaml.is_file() else None


def _began_in_this_job(folder: RunFolder) -> bool:
    """Return whether an earlier start of this job wrote the folder: a restarted job resumes its run unasked.

    The command must be the same, because one job can start several runs.
    """
    job, restarts = job_and_restarts()
    if job is None or restarts == 0:
        return False
    before = read_mapping(folder.environment_json)
    return before.get("job") == job and before.get("command") == command_line()


def config_changes(folder: RunFolder, run: ResolvedRun, saved: RunConfig) -> list[str]:
    """Return how `run` differs from the files in its folder, one line each; call before `write_facts`.

    Args:
        saved: the configuration in the folder.

    Raises:
        ConfigError: a file in the folder is damaged.
    """
    original = folder.deepspeed_json
    lines = [f"other settings come from {folder.config_yaml}"]
    before, now = (_values(config) for config in (saved, run.config))
    lines += [
        f"{external_name(key)} was {shown(before[key])}, is {shown(value)} ({run.sources[key]})"
        for key, value in now.items()
        if not key.startswith(_NOT_COMPARED) and value != before[key]
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
    values = config.model_dump(mode="json")
    return {key: reduce(lambda section, name: section[name], key.split("."), values) for key in leaf_fields(RunConfig)}
