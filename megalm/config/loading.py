"""The run configuration from its layers, and the source of each value.

Weakest first: schema defaults < preset < the config.yaml of a resumed run < the DeepSpeed JSON's run settings < YAML
file < `key=value`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin

import megalm
from megalm.config.deepspeed.unsupported_keys import DEEPSPEED_NAMES
from megalm.config.schema import DocumentedSection, RunConfig
from megalm.config.validation import (
    flatten,
    leaf_fields,
    members,
    nest,
    parse_yaml,
    section_of,
    shown,
    to_yaml,
    validate,
    validate_valid_values,
)
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean, likeness, nearest

PRESETS_FOLDER = Path(megalm.__file__).parent / "presets"
DEFAULT_PRESET = "quickstart"
# Sources of values, besides "default" and the YAML file's name.
_PRESET = "preset "  # and its name
COMMAND_LINE = "command line"
SAVED_CONFIG = "the run's own"  # the config.yaml of a resumed run

# A resumed run does not inherit these sections: its folder, and the permissions of one resume.
_NOT_INHERITED = ("run", "resume")

# Alternative keys: a layer that sets one of a group replaces the others of weaker layers.
RUN_LENGTH = ("train.steps", "train.tokens", "train.tokens_per_parameter")
_ALTERNATIVES = (
    RUN_LENGTH,
    ("data.train", "data.recipe"),
    ("data.validation", "data.split"),
    ("schedule.initial_learning_rate", "schedule.initial_ratio"),
    ("schedule.final_learning_rate", "schedule.final_ratio"),
)


def preset_paths() -> dict[str, Path]:
    """Name -> file of every shipped preset, sorted by name: the file's name without its suffix, in any subfolder."""
    return {path.stem: path for path in sorted(PRESETS_FOLDER.rglob("*.yaml"), key=lambda path: path.stem)}


def preset_path(name: object, where: str = "presets") -> Path:
    """The file of a preset.

    Args:
        where: the file that names it, for the message.

    Raises:
        ConfigError: no preset has this name; the message lists all presets.
    """
    paths = preset_paths()
    if not isinstance(name, str):
        raise ConfigError(f"{where}: preset={shown(name)}: expected text or null")
    if name not in paths:
        known = ", ".join(paths)
        raise ConfigError(f"{where}: preset {name!r} does not exist{did_you_mean(name, paths)}; presets: {known}")
    return paths[name]


def describe_preset(name: str) -> str:
    """The opening comment of the preset's file: a line or two."""
    lines = []
    for line in preset_path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


_LEAVES = leaf_fields(RunConfig)
# `documented` is no setting, so no suggestion names it.
_SUGGESTED = [key for key in _LEAVES if not key.startswith("documented.")]
_SECTIONS = [name for name, field in RunConfig.model_fields.items() if section_of(field) and name != "documented"]
# `async` is a Python keyword, so its field has another name. Key as users write it -> field.
_SPELLINGS = {f"{path.rpartition('.')[0]}.{field.alias}": path for path, field in _LEAVES.items() if field.alias}

# Names of other toolkits -> the key here.
_OTHER_NAMES = {
    "learning_rate": "schedule.peak_learning_rate",
    "lr": "schedule.peak_learning_rate",  # the JSON has it too, but only JSONs written for other toolkits use it
    "peak_lr": "schedule.peak_learning_rate",
    "max_lr": "schedule.peak_learning_rate",
    "min_lr": "schedule.final_learning_rate",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "max_tokens": "train.tokens",
    "train_tokens": "train.tokens",
    "total_tokens": "train.tokens",
    "rampup_batch_size": "schedule.batch",
    "seq_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "n_layer": "model.num_hidden_layers",
    "n_head": "model.num_attention_heads",
    "n_embd": "model.hidden_size",
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "cp": "parallel.context",
    "ep": "parallel.expert",
    "gc_freq": "train.gc_interval_steps",
    "profile_step": "profile.steps",
    "profile_step_start": "profile.steps",
    "manual_gc_interval": "train.gc_interval_steps",
    "torch_compile": "compile",
}
# Former key -> key, of configurations that runs have saved.
_FORMER_KEYS = {"train.profile_step": "profile.steps"}
_OTHER_NAMES_IN_JSON = ("batch_size", "micro_batch_size", "precision", "dtype", "zero", "zero_stage")


@dataclass(frozen=True)
class LoadedConfig:
    """A validated run configuration.

    Attributes:
        sources: every dotted key -> "default", "preset NAME", "the run's own", the YAML file's name, or "command line".
        preset: the preset that it starts from.
        explicit_keys: the keys that the user set, in YAML or on the command line.
        documented_by_preset: the `documented` section of the preset itself.
        problems: one line for each refused key and value; `config` has the default instead. By dotted key, or by line.
    """

    config: RunConfig
    sources: dict[str, str]
    preset: str | None
    explicit_keys: frozenset[str] = frozenset()
    documented_by_preset: DocumentedSection = field(default_factory=DocumentedSection)
    problems: dict[str, str] = field(default_factory=dict)

    def checked(self) -> LoadedConfig:
        """This configuration.

        Raises:
            ConfigError: all its problems.
        """
        if self.problems:
            raise ConfigError(*self.problems.values())
        return self

    def with_implied(self, values: Mapping[str, Any], origin: str) -> LoadedConfig:
        """This configuration with the values that a DeepSpeed JSON implies; the user's values stay.

        If the user set another value for the same key, that is a problem.

        Args:
            values: dotted key -> value.
            origin: the JSON's name.
        """
        implied = validate(RunConfig, values, lambda _: origin)
        problems, taken = dict(self.problems), {}
        for key in values:
            value, given = value_of(implied, key), value_of(self.config, key)
            if key not in self.explicit_keys:
                taken[key] = value
            elif given != value and key not in self.problems:
                problems[key] = (
                    f"{key}={shown(given)} ({self.sources[key]}), but {origin} sets {key}={shown(value)}; remove one"
                )
        config = self.config
        for section, leaves in nest(taken).items():
            config = config.model_copy(update={section: getattr(config, section).model_copy(update=leaves)})
        return replace(self, config=config, sources=self.sources | dict.fromkeys(taken, origin), problems=problems)


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class _Layer:
    origin: str
    leaves: dict[str, Any]
    by_user: bool
    problems: tuple[str, ...] = ()


class ConfigLayers:
    """The configuration that a user gives for a run: a preset or a YAML file, and overrides. Each file is read once.

    Args:
        config: a preset's name or a YAML file; None: the preset quickstart.
        overrides: `key=value` with dotted keys and YAML values.

    Raises:
        ConfigError: no such preset or file, a syntax error.
    """

    def __init__(self, config: str | None, overrides: Sequence[str]) -> None:
        self._config = config
        self._raw: dict[Path, Any] = {}  # file -> its content
        self._preset, self._layers = self._file_layers(config or DEFAULT_PRESET)
        self._overrides = _command_line(overrides)

    def new_run(self) -> LoadedConfig:
        """The configuration of a new run."""
        return _combine(self._preset, [*self._layers, self._overrides])

    def resumed_run(self, own: Path, name: str | None = None) -> LoadedConfig:
        """The configuration of a resumed run.

        Args:
            own: its config.yaml, which has the values that the user does not give. If the user names a preset that is
                not the run's, all its keys replace those of `own`.
            name: the run's; None: as configured.

        Raises:
            ConfigError: a file that cannot be read.
        """
        preset, layers = self._file_layers(str(own))
        leaves = {key: value for key, value in layers[-1].leaves.items() if key.partition(".")[0] not in _NOT_INHERITED}
        layers[-1] = replace(layers[-1], origin=SAVED_CONFIG, leaves=leaves, by_user=False)
        if self._config is not None:
            given = self._layers if self._preset != preset else [layer for layer in self._layers if layer.by_user]
            preset, layers = self._preset or preset, [*layers, *given]
        overrides = dict(self._overrides.leaves)
        if name is not None:
            _set(overrides, "run.name", name)
        return _combine(preset, [*layers, replace(self._overrides, leaves=overrides)])

    def saved_config(self, own: Path) -> RunConfig:
        """The configuration in the config.yaml of a run, without the user's changes."""
        return _combine(*self._file_layers(str(own))).checked().config

    def _file_layers(self, name: str) -> tuple[str | None, list[_Layer]]:
        """The preset's name, and the layers of a preset or a YAML file, weakest first."""
        path = Path(name)
        by_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        if not by_path and name in preset_paths():
            return name, self._preset_layers(name, "--config")
        if not path.is_file():
            presets = preset_paths()
            raise ConfigError(
                f"--config {name}: no such file and no such preset{did_you_mean(name, presets)}; "
                f"presets: {', '.join(presets)}"
            )
        layer = self._read(path, name, by_user=True)
        preset = layer.leaves.get("preset")
        return preset, [*(self._preset_layers(preset, name) if preset is not None else []), layer]

    def _preset_layers(self, name: str, where: str) -> list[_Layer]:
        """The layers of a preset, which may start from another."""
        layers: list[_Layer] = []
        names: list[str] = []
        following: Any = name
        while following is not None:
            if following in names:
                chain = " <- ".join([*names, following])
                raise ConfigError(f"preset {names[0]} starts from itself ({chain}); change its 'preset'")
            names.append(following)
            layer = self._read(preset_path(following, where), f"{_PRESET}{following}", by_user=False)
            where, following = layer.origin, layer.leaves.get("preset")
            layers.insert(0, layer)
        layers[-1].leaves["preset"] = name
        return layers

    def _read(self, path: Path, origin: str, by_user: bool) -> _Layer:
        if path not in self._raw:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--config {path}: cannot be read as text ({error})") from None
            self._raw[path] = parse_yaml(text, origin)
        raw, former = _without_former_keys(self._raw[path])
        leaves, problems = flatten(raw, RunConfig, origin, lambda key: _unknown_key(key, origin))
        leaves = former | leaves
        return _Layer(origin, leaves, by_user, tuple(problems))


def _without_former_keys(raw: Any) -> tuple[Any, dict[str, Any]]:
    """Return a file's content without former keys, and their values under the keys of today."""
    leaves: dict[str, Any] = {}
    for former, key in _FORMER_KEYS.items():
        section, _, name = former.partition(".")
        if isinstance(raw, dict) and isinstance(raw.get(section), dict) and name in raw[section]:
            values = dict(raw[section])
            leaves[key] = values.pop(name)
            raw = {**raw, section: values}
    return raw, leaves


def load_run_config(config: str | None, overrides: Sequence[str]) -> LoadedConfig:
    """The configuration of a new run; arguments as of `ConfigLayers`.

    Raises:
        ConfigError: every problem of the configuration.
    """
    return ConfigLayers(config, overrides).new_run().checked()


def _combine(preset: str | None, layers: Sequence[_Layer]) -> LoadedConfig:
    """Join the layers, weakest first."""
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_LEAVES, "default")
    for layer in layers:
        for replaced in _replaced_by(layer):
            values.pop(replaced, None)
            sources[replaced] = "default"
        values |= layer.leaves
        sources |= dict.fromkeys(layer.leaves, layer.origin)
    explicit_keys = frozenset(key for layer in layers if layer.by_user for key in layer.leaves)
    problems = {problem: problem for layer in layers for problem in layer.problems}
    config, bad = validate_valid_values(RunConfig, values, sources.__getitem__)
    documented = _documented_by(config.preset, layers)
    return LoadedConfig(config, sources, preset, explicit_keys, documented, problems | bad)


def _documented_by(preset: str | None, layers: Sequence[_Layer]) -> DocumentedSection:
    """The `documented` section of the preset and of the presets that it starts from."""
    names = [layer.origin for layer in layers]
    end = max((index + 1 for index, name in enumerate(names) if name == f"{_PRESET}{preset}"), default=0)
    start = max((index + 1 for index, name in enumerate(names[:end]) if not name.startswith(_PRESET)), default=0)
    leaves: dict[str, Any] = {}
    for layer in layers[start:end]:
        leaves |= {key: value for key, value in layer.leaves.items() if key.startswith("documented.")}
    return validate_valid_values(RunConfig, leaves, lambda key: f"{_PRESET}{preset}")[0].documented


def external_name(key: str) -> str:
    """A dotted key as users write it."""
    return next((written for written, name in _SPELLINGS.items() if name == key), key)


def config_to_yaml(config: RunConfig, of_preset: DocumentedSection | None = None) -> str:
    """The whole configuration as YAML. Loading it gives the same configuration, even if the preset changes later.

    A `documented` section equal to the preset's is left out, so that the preset's later text applies.

    Args:
        of_preset: the `documented` section of the preset; None: read it.
    """
    if of_preset is None:
        of_preset = load_run_config(config.preset, []).config.documented if config.preset else DocumentedSection()
    exclude = {"documented"} if config.documented == of_preset else None
    values = config.model_dump(mode="json", by_alias=True, exclude=exclude)
    return to_yaml(values)


def _replaced_by(layer: _Layer) -> Iterator[str]:
    for group in _ALTERNATIVES:
        if any(layer.leaves.get(key) is not None for key in group):
            yield from (other for other in group if other not in layer.leaves)


def _command_line(overrides: Sequence[str]) -> _Layer:
    leaves: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        try:
            for key, value in parse_override(override):
                _set(leaves, key, value)
        except ConfigError as error:
            problems += error.problems
    return _Layer(COMMAND_LINE, leaves, by_user=True, problems=tuple(problems))


def _set(leaves: dict[str, Any], key: str, value: Any) -> None:
    if key in leaves and leaves[key] != value:
        raise ConfigError(f"{COMMAND_LINE}: {key} has two values, {shown(leaves[key])} and {shown(value)}; keep one")
    leaves[key] = value


def parse_override(override: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of one `key=value`; a whole section has several.

    Raises:
        ConfigError: it is not key=value, the key is unknown, or the value is not YAML.
    """
    if any("\ud800" <= character <= "\udfff" for character in override):
        raise ConfigError(f"{COMMAND_LINE}: {override!a} is not UTF-8; write it in UTF-8")
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not key=value, for example train.steps=1000")
    key = _SPELLINGS.get(key, key)
    if key == "preset":
        raise ConfigError(f"{COMMAND_LINE}: use --config {text} for a preset; only a YAML file takes 'preset'")
    if key in _LEAVES:
        yield key, _parse_value(key, text)
        return
    if key not in RunConfig.model_fields:  # a whole section may be set: data={split: "95,5"}
        raise _unknown_key(key, COMMAND_LINE)
    section = {key: parse_yaml(text, COMMAND_LINE)}
    leaves, problems = flatten(section, RunConfig, COMMAND_LINE, lambda path: _unknown_key(path, COMMAND_LINE))
    yield from leaves.items()
    if problems:
        raise ConfigError(*problems)


def _parse_value(key: str, text: str) -> Any:
    """The value as YAML; but a key that takes text takes it unchanged: run.name=001 is text."""
    kinds = list(members(_LEAVES[key].annotation))
    takes_text, takes_several = str in kinds, any(get_origin(kind) in (tuple, dict) for kind in kinds)
    try:
        value = parse_yaml(text, f"{COMMAND_LINE}, {key}")
    except ConfigError:
        if takes_text:
            return text
        raise
    if not takes_text or value is None or isinstance(value, str) or (takes_several and isinstance(value, (list, dict))):
        return value
    return text


def _unknown_key(key: str, where: str) -> ConfigError:
    """The error for an unknown dotted key: it names the nearest key, or the file that the key belongs in.

    Args:
        where: the file's name or "command line".
    """
    parts = key.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if prefix in _LEAVES:
            return ConfigError(f"{where}: unknown key {key}; {prefix} is a value, not a section")
    return ConfigError(f"{where}: unknown key {key}{_hint(key)}")


def _hint(key: str) -> str:
    *_, name = parts = key.split(".")
    same_name = [leaf for leaf in _SUGGESTED if leaf.split(".")[-1] == name]
    if same_name:
        return f", did you mean {' or '.join(same_name)}?"
    if name in _OTHER_NAMES:
        return f", did you mean {_OTHER_NAMES[name]}?"
    if not DEEPSPEED_NAMES.isdisjoint(parts) or name in _OTHER_NAMES_IN_JSON:
        return "; it belongs in the DeepSpeed JSON, the file of --deepspeed_config"
    match = nearest(key, [*_SUGGESTED, *_SECTIONS]) or _nearest_by_name(name)
    elsewhere = nearest(name, DEEPSPEED_NAMES)
    # Keys of one section resemble each other through its name, so compare the last parts.
    if match and (elsewhere is None or likeness(name, match.split(".")[-1]) >= likeness(name, elsewhere)):
        return f", did you mean {match}?"
    if elsewhere:
        return f", did you mean {elsewhere}? It belongs in the DeepSpeed JSON, the file of --deepspeed_config"
    return f"; sections: {', '.join(_SECTIONS)}"


def _nearest_by_name(name: str) -> str | None:
    by_name = {leaf.split(".")[-1]: leaf for leaf in _SUGGESTED}
    match = nearest(name, by_name)
    return by_name[match] if match else None
