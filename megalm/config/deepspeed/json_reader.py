"""A typed, read-only view of the DeepSpeed JSON: a key that is not supported is an error, or ignored with a notice.

DeepSpeed ignores a top-level key that it does not know, and megalm's training loop leaves some known keys without
effect. Neither passes silently here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import megalm
from megalm.config.deepspeed.json_schema import DeepSpeedSettings, Precision
from megalm.config.deepspeed.scheduler import SchedulerTranslation, translate_scheduler
from megalm.config.deepspeed.unsupported_keys import NO_EFFECT, REFUSED
from megalm.config.validation import flatten, leaf_fields, shown, validate
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

DS_CONFIGS_FOLDER = Path(megalm.__file__).parent.parent / "ds_configs"
_AUTO_KEYS = ("train_micro_batch_size_per_gpu", "bf16.enabled", "fp16.enabled")
_LEAVES = leaf_fields(DeepSpeedSettings)
DEEPSPEED_NAMES: frozenset[str] = frozenset(
    part for path in (*_LEAVES, *REFUSED) for part in path.split(".") if part not in ("type", "params", "checkpoint")
) | {field.alias for field in _LEAVES.values() if field.alias}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The contents of a DeepSpeed JSON.

    Attributes:
        path: the file, as the user named it.
        settings: its values, and DeepSpeed's defaults for missing keys.
        explicit_keys: dotted keys that the file has.
        notices: one line for each unsupported key that is ignored, or that is taken as something else.
        run_settings: dotted keys of the run configuration -> the values that the file implies for them.
    """

    path: str
    settings: DeepSpeedSettings
    explicit_keys: frozenset[str]
    notices: tuple[str, ...] = ()
    run_settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Only the keys that the file has, under DeepSpeed's names."""
        return self.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)


@dataclass(frozen=True)
class DeviceFacts:
    """The device of one rank.

    Attributes:
        bf16: the device computes in bf16 natively.
        memory_bytes: memory that this rank may use; on a CPU its share of the machine's.
    """

    kind: Literal["cpu", "cuda"]
    bf16: bool
    memory_bytes: int


def choose_precision(settings: DeepSpeedSettings, device: DeviceFacts) -> tuple[Precision, list[str]]:
    """The precision of a run on this device, and a notice where "auto" decides it.

    "auto" is bf16 where the device has it, else fp32. It never chooses fp16, which needs a loss scale.
    """
    if settings.fp16.enabled is True:
        return "fp16", []
    if settings.bf16.enabled is True:
        return "bf16", []
    if "auto" in (settings.bf16.enabled, settings.fp16.enabled):
        if settings.bf16.enabled == "auto" and device.bf16:
            return "bf16", ['bf16.enabled ("auto"): true']
        reason = "this device does not compute in bf16" if not device.bf16 else '"auto" never chooses fp16'
        return "fp32", [f'precision ("auto"): fp32, {reason}']
    return "fp32", []


def read_deepspeed_json(path: str | Path) -> DeepSpeedConfig:
    """Read and check a DeepSpeed JSON.

    Raises:
        ConfigError: no such file, a syntax error, a repeated, unknown or unsupported key, a bad value.
    """
    where = str(path)
    raw = _parse(_read(Path(path), where), where)
    if not isinstance(raw, dict):
        raise ConfigError(f'{where}: not a JSON object; it should begin with {{ "train_batch_size": ... }}')
    _check_optimizer(raw, where)
    raw, ignored = _without_refused(raw, where)
    scheduler = _translated_scheduler(raw.pop("scheduler", None), where)
    leaves = flatten(raw, DeepSpeedSettings, where, lambda key: _unknown_key(key, where))
    leaves = {key: value for key, value in leaves.items() if value is not None}
    for key, value in leaves.items():
        if value == "auto" and key not in _AUTO_KEYS:
            raise ConfigError(f'{where}: {key}="auto": only {_AUTO_KEYS[0]} and bf16.enabled take "auto"; set a value')
    notices = [*(f"{key} is ignored; this value has no effect" for key in ignored), *scheduler.notes]
    if "schedule.peak_learning_rate" in scheduler.settings and "optimizer.params.lr" in leaves:
        lr = leaves.pop("optimizer.params.lr")
        notices.append(f"optimizer.params.lr={shown(lr)} has no effect: the scheduler sets the rate, as in DeepSpeed")
    settings = validate(DeepSpeedSettings, leaves, lambda _: where)
    lines = tuple(f"{where}: {notice}" for notice in notices)
    return DeepSpeedConfig(where, settings, frozenset(leaves), lines, scheduler.settings)


def shipped_deepspeed_jsons() -> list[Path]:
    """The JSON files of ds_configs/ for any run, sorted; empty if the package is installed without its repository.

    Each file of ds_configs/recipes/ belongs to a preset, which names it.
    """
    return sorted(DS_CONFIGS_FOLDER.glob("*.json"))


def named_json(named: str) -> Path:
    """The file that `deepspeed_config` of a configuration names: relative to this folder, or to the repository."""
    candidates = (Path(named), DS_CONFIGS_FOLDER.parent / named)
    return next((path for path in candidates if path.is_file()), candidates[0])


def _translated_scheduler(section: Any, where: str) -> SchedulerTranslation:
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{where}: scheduler={shown(section)}: expected a section with type and params")
    translated = translate_scheduler(section or {})
    if translated.problems:
        raise ConfigError(f"{where}: {'; '.join(translated.problems)}")
    return translated


def _check_optimizer(raw: dict[str, Any], where: str) -> None:
    """Refuse another optimizer by its name, before its parameters are refused as unknown keys."""
    section = raw.get("optimizer")
    kind = section.get("type") if isinstance(section, dict) else None
    if kind is not None and str(kind).lower() not in ("adam", "adamw"):
        raise ConfigError(f'{where}: optimizer.type={shown(kind)} is not available; use "AdamW" or "Adam"')


def _read(path: Path, where: str) -> str:
    if not path.is_file():
        names = [shipped.name for shipped in shipped_deepspeed_jsons()]
        hint = did_you_mean(path.name, names)
        raise ConfigError(f"--deepspeed_config {where}: no such file{hint}; shipped in ds_configs: {', '.join(names)}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {where}: cannot be read as text ({error})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=partial(_unique_keys, where), parse_constant=partial(_refuse_constant, where)
        )
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}, line {error.lineno}, column {error.colno}: {error.msg}; fix the JSON") from None


def _unique_keys(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"{where}: one object has {key!r} twice; keep one")
        result[key] = value
    return result


def _refuse_constant(where: str, name: str) -> Any:
    raise ConfigError(f"{where}: {name} is not a JSON number; use a finite number")


def _without_refused(raw: Any, where: str, prefix: str = "") -> tuple[Any, list[str]]:
    """The JSON without unsupported keys whose values have no effect, and the names of those keys.

    Raises:
        ConfigError: an unsupported key whose value has an effect.
    """
    if not isinstance(raw, dict):
        return raw, []
    kept: dict[str, Any] = {}
    ignored: list[str] = []
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if path not in REFUSED:
            kept[key], below = _without_refused(value, where, f"{path}.")
            ignored += below
        elif _has_no_effect(path, value):
            ignored.append(path)
        else:
            text = "" if isinstance(value, (dict, list)) else f"={shown(value)}"
            raise ConfigError(f"{where}: megalm does not support {path}{text}: {REFUSED[path]}")
    return kept, ignored


def _has_no_effect(path: str, value: Any) -> bool:
    if value is None or (isinstance(value, dict) and value.get("enabled") is False):
        return True
    missing = object()
    harmless = NO_EFFECT.get(path, missing)
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)


def _unknown_key(key: str, where: str) -> ConfigError:
    """The error for a key that neither megalm nor DeepSpeed knows."""
    section, _, name = key.rpartition(".")
    hint = did_you_mean(name, _siblings(section))
    if not hint:
        others = [path for path in (*_LEAVES, *REFUSED) if path.split(".")[-1] == name]
        hint = f", did you mean {' or '.join(map(repr, others))}?" if others else ""
    return ConfigError(f"{where}: unknown key {key}{hint or '; remove it, DeepSpeed would ignore it'}")


def _siblings(section: str) -> Iterator[str]:
    prefix = f"{section}." if section else ""
    for path in (*_LEAVES, *REFUSED):
        if path.startswith(prefix):
            yield path[len(prefix) :].split(".")[0]
    for path, leaf in _LEAVES.items():
        if leaf.alias and path.rpartition(".")[0] == section:
            yield leaf.alias
