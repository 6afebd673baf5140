"""The configuration of a resumed run: its saved settings apply unless they are given again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, named_json, open_deepspeed_json, parse_deepspeed_json
from megalm.config.loading import SAVED_CONFIG, GivenConfig, LoadedConfig, external_name
from megalm.config.precision import DeviceFacts
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields, shown
from megalm.errors import ConfigError
from megalm.planning.checks.run_checks import check_run
from megalm.planning.resolve import ResolvedRun
from megalm.rank_environment import job_and_restarts
from megalm.runs.run_folder import RunFolder, command_line, newest_run, read_mapping
from megalm.utils.formatting import flatten_mapping

_DEFAULT_DEEPSPEED_CONFIG = "ds_configs/zero2.json"
_ANY_DEVICE = DeviceFacts(kind="cuda", bf16=True, memory_bytes=2**40)

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
    config: str | None,
    overrides: Sequence[str],
    deepspeed_config: str | None,
    resume: bool,
    ranks: int,
    device: DeviceFacts | None = None,
    data_needed: bool = False,
) -> ConfigFiles:
    """Read both configuration files of a new run, or of an existing one with `resume` or in a restart of its job.

    Without a given DeepSpeed JSON, use that of a recipe named now, else the run's own, else the default. A checkpoint
    can be resumed in any parallel layout: if the run's own does not divide `ranks`, and none is given, use the default.

    Args:
        device, data_needed: of `check_run`, which tells all else that is wrong beside a file; None: of any device.

    Raises:
        ConfigError: the given or the saved configuration is invalid by itself; with it all else that is wrong.
    """
    try:
        given = GivenConfig(config, overrides)
    except ConfigError as error:
        raise ConfigError(*error.problems, *_problems_of(deepspeed_config)) from None
    loaded, saved = given.alone(), None
    own = _find_own(loaded)
    if own is not None and not resume and not _began_in_this_job(own):
        own = None
    if own is not None:
        # By its name: another job may begin a newer unnamed run at any moment.
        loaded, saved = given.over(own.config_yaml, own.name), given.saved(own.config_yaml)
        degrees = loaded.config.parallel
        if ranks % (degrees.tensor * degrees.pipeline) and not any(
            key.startswith("parallel.") for key in loaded.stated
        ):
            loaded = given.over(own.config_yaml, own.name, not_kept=("parallel",))
    default = named_json(_DEFAULT_DEEPSPEED_CONFIG) if own is None else own.deepspeed_json
    try:
        deepspeed = open_deepspeed_json(
            named_json(deepspeed_config) if deepspeed_config else _recipe_json(loaded) or default
        )
    except ConfigError as error:
        raise ConfigError(*loaded.problems.values(), *error.problems) from None
    if own is not None and Path(deepspeed.path) == own.deepspeed_json:  # its values are saved ones: a person's win
        implied = {key: value for key, value in deepspeed.run_settings.items() if key not in loaded.stated}
        deepspeed = replace(deepspeed, run_settings=implied)
    if loaded.problems or deepspeed.problems:
        check_run(loaded, deepspeed, ranks, device or _ANY_DEVICE, data_needed)
    return ConfigFiles(loaded, deepspeed, saved)


def _problems_of(deepspeed_config: str | None) -> tuple[str, ...]:
    """What is wrong with the named JSON by itself."""
    try:
        return () if deepspeed_config is None else open_deepspeed_json(named_json(deepspeed_config)).problems
    except ConfigError as error:
        return error.problems


def _recipe_json(loaded: LoadedConfig) -> Path | None:
    """Return the DeepSpeed JSON of a recipe given now, not of a saved one: that run may have started with another."""
    named = loaded.config.deepspeed_config
    return None if named is None or loaded.sources["deepspeed_config"] == SAVED_CONFIG else named_json(named)


def _find_own(loaded: LoadedConfig) -> RunFolder | None:
    """Return the named run, or the newest unnamed one; None if it has no saved configuration."""
    root = Path(loaded.config.run.root).expanduser()
    name = loaded.config.run.name or newest_run(root, loaded.preset)
    folder = None if name is None else RunFolder(root / name)
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
        there, here = (flatten_mapping(parse_deepspeed_json(path)) for path in (original, run.deepspeed_source.path))
        lines += [
            f"{run.deepspeed_source.path}: {key} was {shown(there.get(key))}, is {shown(here.get(key))}"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ]
    return lines


def _values(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {key: reduce(lambda section, name: section[name], key.split("."), values) for key in leaf_fields(RunConfig)}
