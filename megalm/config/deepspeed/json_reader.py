"""A typed, read-only view of the DeepSpeed JSON, which is read as DeepSpeed reads it; no key passes silently."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hjson

import megalm
from megalm.config.deepspeed.json_schema import DeepSpeedSettings, Precision
from megalm.config.deepspeed.translate import Translation, translate
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

DS_CONFIGS_FOLDER = Path(megalm.__file__).parent.parent / "ds_configs"


@dataclass(frozen=True)
class DeepSpeedConfig(Translation):
    """The contents of a DeepSpeed JSON; a run starts only without problems.

    Attributes:
        path: the file, as the user named it.
        largest_micro_batch: that a resumed run takes where the device's memory decides; None: any.
    """

    path: str = ""
    largest_micro_batch: int | None = None

    @staticmethod
    def of(path: str, translation: Translation) -> DeepSpeedConfig:
        """The view of a translated file."""
        return DeepSpeedConfig(**vars(translation), path=path)

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"{self.path}: {line}" for line in super().problems)

    @property
    def notices(self) -> tuple[str, ...]:
        return tuple(f"{self.path}: {line}" for line in super().notices)

    def to_dict(self) -> dict[str, Any]:
        """Only the keys that the file has, under DeepSpeed's names."""
        return self.settings.model_dump(mode="json", by_alias=True, exclude_unset=True)


@dataclass(frozen=True)
class DeviceFacts:
    """The device of one rank.

    Attributes:
        bf16: the device computes in bf16 natively.
        memory_bytes: memory that this rank may use; on a CPU its share of the machine's.
        host_memory_bytes: of a GPU's rank, its share of the node's CPU memory; None: unknown.
        name: the GPU's, as CUDA or a data sheet names it; None: unknown.
        compiles: torch.compile finds all that it needs; matters on a GPU only.
        float8: a GPU multiplies float8 with a scale for each row (capability 8.9).
    """

    kind: Literal["cpu", "cuda"]
    bf16: bool
    memory_bytes: int
    host_memory_bytes: int | None = None
    name: str | None = None
    compiles: bool = True
    float8: bool = False


def choose_precision(settings: DeepSpeedSettings, device: DeviceFacts) -> tuple[Precision, list[str]]:
    """The precision of a run on this device, and a notice where "auto" decides it or a CPU emulates it.

    "auto" is bf16 where the device has it, else fp32. It never chooses fp16, which needs a loss scale.
    """
    if settings.fp16.enabled is True:
        return "fp16", []
    if settings.bf16.enabled is True:
        emulated = 'bf16.enabled=true: this CPU emulates bf16, many times slower than fp32; "auto" chooses fp32 here'
        return "bf16", [] if device.bf16 else [emulated]
    if "auto" in (settings.bf16.enabled, settings.fp16.enabled):
        if settings.bf16.enabled == "auto" and device.bf16:
            return "bf16", ['bf16.enabled ("auto"): true']
        reason = "this device does not compute in bf16" if not device.bf16 else '"auto" never chooses fp16'
        if device.kind == "cuda" and not device.bf16:
            reason += "; fp16.enabled=true is faster on it"
        return "fp32", [f'precision ("auto"): fp32, {reason}']
    return "fp32", []


def read_deepspeed_json(path: str | Path) -> DeepSpeedConfig:
    """Read and check a DeepSpeed JSON.

    Raises:
        ConfigError: no such file, a syntax error, or all refused keys and values.
    """
    config = open_deepspeed_json(path)
    if config.problems:
        raise ConfigError(*config.problems)
    return config


def open_deepspeed_json(path: str | Path) -> DeepSpeedConfig:
    """Read a DeepSpeed JSON, with its refused keys and values in `problems`.

    Raises:
        ConfigError: no such file, a syntax error.
    """
    return DeepSpeedConfig.of(str(path), translate(parse_deepspeed_json(path)))


def parse_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """The file's object, unchanged. Comments and trailing commas are allowed, as in DeepSpeed.

    Raises:
        ConfigError: no such file, a syntax error, a repeated key.
    """
    where = str(path)
    text = _read(Path(path), where)
    if not text.strip():
        raise ConfigError(f"{where}: the file is empty; write an object, such as {{}}")
    raw = _parse(text, where)
    if not isinstance(raw, dict):
        raise ConfigError(f'{where}: not a JSON object; it should begin with {{ "train_batch_size": ... }}')
    return raw


def shipped_deepspeed_jsons() -> list[Path]:
    """The JSON files of ds_configs/ for any run, sorted; empty where the package is installed without its repository.

    Those of ds_configs/recipes/ are one preset's each, which names it.
    """
    return sorted(DS_CONFIGS_FOLDER.glob("*.json"))


def named_json(named: str | Path) -> Path:
    """The file that a user or a configuration names: relative to this folder, or a shipped one by its name."""
    path = Path(named).expanduser()
    folders = (DS_CONFIGS_FOLDER.parent, DS_CONFIGS_FOLDER, DS_CONFIGS_FOLDER / "recipes")
    candidates = (path, *(folder / path for folder in folders))
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _read(path: Path, where: str) -> str:
    if not path.is_file():
        shipped = {it.name: it for it in shipped_deepspeed_jsons()}
        near = did_you_mean(path.name, shipped)
        known = f"shipped, by name from any folder: {', '.join(shipped)}" if shipped else "give the path of a file"
        raise ConfigError(f"--deepspeed_config {where}: no such file{near}; {known}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {where}: cannot be read as text ({error})") from None


def _parse(text: str, where: str) -> Any:
    """Parse as JSON, whose errors are exact, or else as Hjson, as DeepSpeed does."""
    build = _no_key_twice(where)
    try:
        return json.loads(text, object_pairs_hook=build, parse_constant=_no_constant(where))
    except json.JSONDecodeError as error:
        strict = error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not a DeepSpeed JSON ({error}); fix it") from None
    try:
        return hjson.loads(text, object_pairs_hook=build)
    except hjson.HjsonDecodeError as error:
        # Hjson reads an unknown word as text to the end of the line, so its errors come late.
        is_json = re.match(r"[^#/}\]]", text[strict.pos :]) or strict.pos == len(text)
        place = strict if is_json else error
        message = f"{where}, line {place.lineno}, column {place.colno}: {place.msg}; fix the JSON"
    except (OverflowError, RecursionError, ValueError) as error:
        message = f"{where}: not a DeepSpeed JSON ({error}); fix it"
    raise ConfigError(message)


def _no_key_twice(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f"{where}: one object has {key!r} twice; keep one")
            result[key] = value
        return result

    return build


def _no_constant(where: str) -> Callable[[str], Any]:
    def refuse(name: str) -> Any:
        raise ConfigError(f"{where}: {name} is not a JSON number; use a finite number")

    return refuse
