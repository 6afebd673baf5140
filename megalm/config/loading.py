"""The run configuration from its layers, and where each value came from.

Weakest first: schema defaults < preset < what the run that goes on was configured with < YAML file < `key=value`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin

import megalm
from megalm.config.schema import DocumentedSection, RunConfig
from megalm.config.unknown_keys import unknown_run_key
from megalm.config.validation import flatten, leaf_fields, members, shown, validate
from megalm.config.yaml_reader import parse_yaml, to_yaml
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

# The run presets shipped with megalm: YAML files of megalm/presets, one a run, any depth of folders.

PRESETS_FOLDER = Path(megalm.__file__).parent / "presets"
DEFAULT_PRESET = "quickstart"
_PRESET = "preset "  # before its name: where a value came from


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


COMMAND_LINE = "command line"
SAVED_CONFIG = "the run's own"  # of a run that goes on: what its config.yaml says, where nothing is stated now

# Of one start alone: where the run lies, and what one resume allows.
_NOT_INHERITED = ("run", "resume")

# The keys of a group set the same thing: a layer that sets one of them replaces what weaker layers say of the others.
RUN_LENGTH = ("train.steps", "train.tokens", "train.tokens_per_parameter")
_ALTERNATIVES = (("data.train", "data.recipe"), ("data.validation", "data.split"), RUN_LENGTH)
_LEAVES = leaf_fields(RunConfig)
# `async` is a word of Python's own, so its field has another name.
_SPELLINGS = {f"{path.rpartition('.')[0]}.{field.alias}": path for path, field in _LEAVES.items() if field.alias}


@dataclass(frozen=True)
class LoadedConfig:
    """A validated run configuration.

    Attributes:
        sources: every dotted key -> "default", "preset NAME", "the run's own", the YAML file's name, or "command line".
        preset: the preset that it starts from.
        stated: the keys that a person stated, in YAML or on the command line.
        documented_by_preset: what the preset itself has in `documented`.
    """

    config: RunConfig
    sources: dict[str, str]
    preset: str | None
    stated: frozenset[str] = frozenset()
    documented_by_preset: DocumentedSection = field(default_factory=DocumentedSection)


@dataclass(frozen=True)
class _Layer:
    origin: str
    leaves: dict[str, Any]
    by_person: bool


class GivenConfig:
    """What a person gives for a run: a preset or a YAML file, and the words of a command line. Each file is read once.

    Args:
        config: a preset's name or a YAML file; None is the preset quickstart.
        overrides: `key=value` with dotted keys; values are read as YAML.

    Raises:
        ConfigError: no such preset or file, a syntax error, an unknown or repeated key.
    """

    def __init__(self, config: str | None, overrides: Sequence[str]) -> None:
        self._config = config
        self._raw: dict[Path, Any] = {}  # file -> its content
        self._preset, self._layers = self._file_layers(config or DEFAULT_PRESET)
        self._words = _command_line(overrides)

    def alone(self) -> LoadedConfig:
        """Of a run that starts.

        Raises:
            ConfigError: a bad value.
        """
        return _combine(self._preset, [*self._layers, self._words])

    def over(self, own: Path, name: str | None = None, not_kept: Sequence[str] = ()) -> LoadedConfig:
        """Of a run that goes on.

        Args:
            own: its config.yaml. It stands for all that is not stated now; a preset that is named now and is not the
                run's own is a statement of all its keys.
            name: the run's; None: as stated.
            not_kept: sections of `own` that do not stand.

        Raises:
            ConfigError: a file that cannot be read, a bad value.
        """
        preset, layers = self._file_layers(str(own))
        dropped = (*_NOT_INHERITED, *not_kept)
        leaves = {key: value for key, value in layers[-1].leaves.items() if key.partition(".")[0] not in dropped}
        layers[-1] = _Layer(SAVED_CONFIG, leaves, by_person=False)
        if self._config is not None:
            given = self._layers if self._preset != preset else [layer for layer in self._layers if layer.by_person]
            preset, layers = self._preset or preset, [*layers, *given]
        words = dict(self._words.leaves)
        if name is not None:
            _state(words, "run.name", name)
        return _combine(preset, [*layers, replace(self._words, leaves=words)])

    def saved(self, own: Path) -> RunConfig:
        """What config.yaml of a run says, without anything that is stated now."""
        return _combine(*self._file_layers(str(own))).config

    def _file_layers(self, name: str) -> tuple[str | None, list[_Layer]]:
        """The preset's name and the layers of a preset or a YAML file with all that it starts from, weakest first."""
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
        layer = self._read(path, name, by_person=True)
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
                raise ConfigError(f"preset {names[0]} starts from itself ({chain}); mend its 'preset'")
            names.append(following)
            layer = self._read(preset_path(following, where), f"{_PRESET}{following}", by_person=False)
            where, following = layer.origin, layer.leaves.get("preset")
            layers.insert(0, layer)
        layers[-1].leaves["preset"] = name
        return layers

    def _read(self, path: Path, origin: str, by_person: bool) -> _Layer:
        if path not in self._raw:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--config {path}: cannot be read as text ({error})") from None
            self._raw[path] = parse_yaml(text, origin)
        leaves = flatten(self._raw[path], RunConfig, origin, lambda key: unknown_run_key(key, origin))
        return _Layer(origin, leaves, by_person)


def load_run_config(config: str | None, overrides: Sequence[str]) -> LoadedConfig:
    """The configuration of a run that starts; arguments and errors as of `GivenConfig`."""
    return GivenConfig(config, overrides).alone()


def _combine(preset: str | None, layers: Sequence[_Layer]) -> LoadedConfig:
    """Weakest layer first."""
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_LEAVES, "default")
    for layer in layers:
        for replaced in _replaced_by(layer):
            values.pop(replaced, None)
            sources[replaced] = "default"
        values |= layer.leaves
        sources |= dict.fromkeys(layer.leaves, layer.origin)
    stated = frozenset(key for layer in layers if layer.by_person for key in layer.leaves)
    config = validate(RunConfig, values, sources.__getitem__)
    return LoadedConfig(config, sources, preset, stated, _documented_by(config.preset, layers))


def _documented_by(preset: str | None, layers: Sequence[_Layer]) -> DocumentedSection:
    """What the preset itself, with the presets that it starts from, has in `documented`."""
    names = [layer.origin for layer in layers]
    end = max((index + 1 for index, name in enumerate(names) if name == f"{_PRESET}{preset}"), default=0)
    start = max((index + 1 for index, name in enumerate(names[:end]) if not name.startswith(_PRESET)), default=0)
    leaves: dict[str, Any] = {}
    for layer in layers[start:end]:
        leaves |= {key: value for key, value in layer.leaves.items() if key.startswith("documented.")}
    return validate(RunConfig, leaves, lambda key: f"{_PRESET}{preset}").documented


def external_name(key: str) -> str:
    """A dotted key as people write it."""
    return next((written for written, name in _SPELLINGS.items() if name == key), key)


def config_to_yaml(config: RunConfig, of_preset: DocumentedSection | None = None) -> str:
    """The whole configuration as YAML; loading it gives the same configuration, also under a later preset.

    But for what the preset's document says of the run: that stays the preset's. What a person wrote down is kept.

    Args:
        of_preset: what the preset has in `documented`; None: it is looked up.
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
    for override in overrides:
        for key, value in _parse_override(override):
            _state(leaves, key, value)
    return _Layer(COMMAND_LINE, leaves, by_person=True)


def _state(leaves: dict[str, Any], key: str, value: Any) -> None:
    if key in leaves and leaves[key] != value:
        raise ConfigError(
            f"{COMMAND_LINE}: {key} is stated twice ({shown(leaves[key])}, then {shown(value)}); keep one"
        )
    leaves[key] = value


def _parse_override(override: str) -> Iterator[tuple[str, Any]]:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not key=value, for example train.steps=1000")
    key = _SPELLINGS.get(key, key)
    if key == "preset":
        raise ConfigError(f"{COMMAND_LINE}: write --config {text} for a preset; 'preset' belongs in a YAML file")
    if key in _LEAVES:
        yield key, _parse_value(key, text)
        return
    if key not in RunConfig.model_fields:  # a whole section may be stated: data={split: "95,5"}
        raise unknown_run_key(key, COMMAND_LINE)
    section = {key: parse_yaml(text, COMMAND_LINE)}
    yield from flatten(section, RunConfig, COMMAND_LINE, lambda path: unknown_run_key(path, COMMAND_LINE)).items()


def _parse_value(key: str, text: str) -> Any:
    """The value as YAML; but a key that takes text takes it as it stands: run.name=001 is no number."""
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
