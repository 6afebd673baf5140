"""The settings of a start: command-line arguments, resume options, and both configuration files.

A resumed run keeps its saved settings unless they are given again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from megalm.checkpoint.copies.fetch import restore_run_files
from megalm.config.deepspeed.json_reader import (
    DeepSpeedConfig,
    DeviceFacts,
    named_json,
    open_deepspeed_json,
    parse_deepspeed_json,
)
from megalm.config.loading import SAVED_CONFIG, ConfigLayers, LoadedConfig, external_name
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields, shown
from megalm.errors import ConfigError
from megalm.planning.resolve import ResolvedRun
from megalm.planning.run_checks import check_run
from megalm.rank_environment import job_and_restarts
from megalm.runs.elastic import fit_to_ranks
from megalm.runs.run_folder import CONFIG_FILE, RunFolder, command_line, newest_run, read_mapping
from megalm.utils.formatting import flatten_mapping
from megalm.utils.remote_files import check_address

_DEFAULT_DEEPSPEED_CONFIG = "ds_configs/zero2.json"
# Of an unknown GPU: it takes any precision, and a plan has room in it.
ANY_DEVICE = DeviceFacts(kind="cuda", bf16=True, memory_bytes=2**40, float8=True)

# Not compared: settings of a single start, the last step (the schedule's note reports it), and pure documentation.
_NOT_COMPARED = ("run.", "resume.", "train.steps", "documented.")


@dataclass(frozen=True)
class Extension:
    """`--extend-steps`: `steps` more steps on a new schedule, or a new run of `steps` steps from the weights alone."""

    steps: int
    strategy: Literal["schedule", "weights"] = "schedule"


@dataclass(frozen=True)
class Arguments:
    """The command-line arguments of launch/pretrain.py.

    Attributes:
        deepspeed_config: None: the resumed run's own; for a new run its recipe's, or zero2.json.
    """

    deepspeed_config: str | None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    extend_steps: int | None = None
    extend_strategy: Literal["schedule", "weights"] = "schedule"
    skip_steps: int = 0

    def read(self, ranks: int, device: DeviceFacts, data_needed: bool = True) -> tuple[ResumeOptions, ConfigFiles]:
        """Return the resume options, and both configurations of a run on `ranks` ranks.

        Args:
            device: of each rank.
            data_needed: whether to refuse a run without data; a plan needs none.

        Raises:
            ConfigError: a flag lacks another that it needs, or a configuration is invalid by itself.
        """
        options = self.resume_options()
        words = (*self.overrides, *options.overrides)
        resume = self.resume is not None
        files = read_settings(self.config, words, self.deepspeed_config, resume, ranks, device, data_needed)
        if options.wanted is None and files.saved is not None:  # a restart of the job that began the run
            options = replace(options, wanted="auto")
        return options, files

    def restore_lost_folder(self, info: Callable[[str], None]) -> None:
        """Before `read`: copy the small files of a named run back whose folder is gone, from checkpoint.copy_to.

        Raises:
            ConfigError: the place of the copies does not answer or refuses; what is wrong with the settings themselves
                is left to `read`.
        """
        if self.resume is None:
            return
        loaded = ConfigLayers(self.config, self.overrides).new_run()
        run, address = loaded.config.run, loaded.config.checkpoint.copy_to
        if loaded.problems or run.name is None or address is None or (Path(run.root) / run.name / CONFIG_FILE).exists():
            return
        check_address(address, "checkpoint.copy_to")
        restore_run_files(Path(run.root) / run.name, address, info)

    def resume_options(self) -> ResumeOptions:
        """Return the resume options of the flags.

        Raises:
            ConfigError: a flag lacks another that it needs.
        """
        if self.extend_steps is None and self.extend_strategy == "weights":
            raise ConfigError("--extend-strategy weights needs the number of steps: add --extend-steps N")
        extension = None if self.extend_steps is None else Extension(self.extend_steps, self.extend_strategy)
        return ResumeOptions(self.resume, extension, self.skip_steps)


@dataclass(frozen=True)
class ResumeOptions:
    """The resume options of a start.

    Attributes:
        wanted: auto, a step or a path; None: a new run.
        skip_steps: the number of steps whose data to skip first.
        allow: items of `resume.allow` in addition to the configuration's.
    """

    wanted: str | None = None
    extension: Extension | None = None
    skip_steps: int = 0
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.wanted is None and (self.extension or self.skip_steps):
            raise ConfigError("--extend-steps and --skip-steps need a checkpoint: add --resume")

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the configuration overrides that they imply: a run from weights alone has its own last step."""
        return (f"train.steps={self.extension.steps}",) if self.extension and self.weights_only else ()

    @property
    def weights_only(self) -> bool:
        return self.extension is not None and self.extension.strategy == "weights"


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

    Without a given DeepSpeed JSON, use that of a recipe named now, else the run's own, else the default. A resumed run
    keeps its global batch; see `fit_to_ranks`.

    Args:
        device, data_needed: of `check_run`, which tells all else that is wrong beside a file; None: of any device.

    Raises:
        ConfigError: the given or the saved configuration is invalid by itself; with it all else that is wrong.
    """
    try:
        given = ConfigLayers(config, overrides)
    except ConfigError as error:
        raise ConfigError(*error.problems, *_problems_of(deepspeed_config)) from None
    loaded, saved = given.new_run(), None
    own = _find_own(loaded)
    if own is not None and not resume and not _began_in_this_job(own):
        own = None
    if own is not None:
        # By its name: another job may begin a newer unnamed run at any moment.
        loaded, saved = given.resumed_run(own.config_yaml, own.name), given.saved_config(own.config_yaml)
    default = named_json(_DEFAULT_DEEPSPEED_CONFIG) if own is None else own.deepspeed_json
    named = named_json(deepspeed_config) if deepspeed_config else _recipe_json(loaded) or default
    try:
        deepspeed = open_deepspeed_json(named)
    except ConfigError as error:
        raise ConfigError(*loaded.problems.values(), *error.problems) from None
    if (
        own is not None and named == own.deepspeed_json
    ):  # saved values, like those of config.yaml: the user's replace them
        implied = {key: value for key, value in deepspeed.run_settings.items() if key not in loaded.explicit_keys}
        deepspeed = replace(deepspeed, run_settings=implied)
    if own is not None and saved is not None and not (loaded.problems or deepspeed.problems):
        earlier = own.earlier_starts(saved)
        loaded, deepspeed = fit_to_ranks(loaded, deepspeed, ranks, device or ANY_DEVICE, earlier)
    if loaded.problems or deepspeed.problems:
        check_run(loaded, deepspeed, ranks, device or ANY_DEVICE, data_needed)
    return ConfigFiles(loaded, deepspeed, saved)


def _problems_of(deepspeed_config: str | None) -> tuple[str, ...]:
    """Return the problems of the JSON that the user names."""
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
    root = Path(loaded.config.run.root)
    name = loaded.config.run.name or newest_run(root, loaded.preset)
    if name is None or not (root / name).is_dir():
        return None
    folder = RunFolder(root / name)
    folder.require_files()
    return folder if folder.config_yaml.is_file() else None


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
    lines = [f"settings that are not given now are those of {folder.config_yaml}"]
    before, now = (_values(it) for it in (saved, run.config))
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
