"""A typed, read-only view of the DeepSpeed JSON: read strictly, nothing passed over."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megalm
from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.config.deepspeed.scheduler import SchedulerTranslation, translate_scheduler
from megalm.config.deepspeed.unsupported_keys import unknown_deepspeed_key, without_refused
from megalm.config.validation import flatten, shown, validate
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

DS_CONFIGS_FOLDER = Path(megalm.__file__).parent.parent / "ds_configs"
_AUTO_KEYS = ("train_micro_batch_size_per_gpu", "bf16.enabled", "fp16.enabled")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What a DeepSpeed JSON states.

    Attributes:
        path: the file, as it was named.
        settings: its values, with DeepSpeed's defaults for what it does not state.
        stated: dotted keys that it states.
        notices: one line for each key that is left out or taken as something else.
        run_settings: dotted keys of the run configuration -> the values that the file implies for them.
    """

    path: str
    settings: DeepSpeedSettings
    stated: frozenset[str]
    notices: tuple[str, ...] = ()
    run_settings: Mapping[str, Any] = field(default_factory=dict)

    def stated_dict(self) -> dict[str, Any]:
        """Only what the file states, under DeepSpeed's own names."""
        return self.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)


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
    raw, dropped = without_refused(raw, where)
    scheduler = _translated_scheduler(raw.pop("scheduler", None), where)
    leaves = flatten(raw, DeepSpeedSettings, where, lambda key: unknown_deepspeed_key(key, where))
    leaves = {key: value for key, value in leaves.items() if value is not None}
    for key, value in leaves.items():
        if value == "auto" and key not in _AUTO_KEYS:
            raise ConfigError(f'{where}: {key}="auto": "auto" is for {_AUTO_KEYS[0]} and bf16.enabled only; state it')
    notices = [*(f"{key} asks for nothing and is left out" for key in dropped), *scheduler.notes]
    if "schedule.peak_learning_rate" in scheduler.settings and "optimizer.params.lr" in leaves:
        lr = leaves.pop("optimizer.params.lr")
        notices.append(f"optimizer.params.lr={shown(lr)} has no effect: the scheduler sets the rate, as in DeepSpeed")
    settings = validate(DeepSpeedSettings, leaves, lambda _: where)
    lines = tuple(f"{where}: {notice}" for notice in notices)
    return DeepSpeedConfig(where, settings, frozenset(leaves), lines, scheduler.settings)


def shipped_deepspeed_jsons() -> list[Path]:
    """The JSON files of ds_configs/ for any run, sorted; empty where the package is installed without its repository.

    Those of ds_configs/recipes/ are one preset's each, which names it.
    """
    return sorted(DS_CONFIGS_FOLDER.glob("*.json"))


def named_json(named: str) -> Path:
    """The file that a configuration names with `deepspeed_config`: from here, or from where the shipped ones are."""
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
    """Before the keys are read: another optimizer has other parameters, which are not the person's mistake."""
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
        return json.loads(text, object_pairs_hook=_no_key_twice(where), parse_constant=_no_constant(where))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}, line {error.lineno}, column {error.colno}: {error.msg}; mend the JSON") from None


def _no_key_twice(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f"{where}: {key!r} is stated twice in one object; keep one")
            result[key] = value
        return result

    return build


def _no_constant(where: str) -> Callable[[str], Any]:
    def refuse(name: str) -> Any:
        raise ConfigError(f"{where}: {name} is no JSON number; state a finite one")

    return refuse
