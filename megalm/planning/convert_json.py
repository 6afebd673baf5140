"""Conversion of a DeepSpeed JSON of another toolkit to two files that a run accepts, with the fate of each key.

Supported keys stay in the JSON, others move to the run configuration or are left out. The last step checks both files
as a run does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, parse_deepspeed_json, read_deepspeed_json
from megalm.config.deepspeed.translate import Outcome, translate
from megalm.config.loading import load_run_config
from megalm.config.validation import nest, to_yaml
from megalm.errors import ConfigError
from megalm.planning.batch_size import RunBatch, plan_batch, takes_run_batch
from megalm.planning.resolve import resolve
from megalm.topology import Topology
from megalm.utils.atomic_files import write_json

DEEPSPEED_JSON, RUN_YAML = "deepspeed.json", "run.yaml"
CHANGES_TRAINING = "left out: changes training"
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """The fate of one key.

    Attributes:
        key: as the file spells it.
        became: kept, changed, moved or left out.
        why: the reason; "" if it is kept.
    """

    key: str
    value: Any
    became: str
    why: str = ""


@dataclass(frozen=True)
class Converted:
    """Both files, and one row for each key of the original."""

    deepspeed: Settings
    run: Settings
    rows: tuple[Row, ...]

    def write(self, folder: Path, source: Path) -> tuple[Path, Path]:
        """Write deepspeed.json and run.yaml into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        json_file, yaml_file = folder / DEEPSPEED_JSON, folder / RUN_YAML
        write_json(json_file, self.deepspeed)
        yaml_file.write_text(f"# Made by megalm config convert from {source.name}\n{to_yaml(nest(self.run))}")
        return json_file, yaml_file


def convert(path: Path, world_size: int, device: DeviceFacts, preset: str) -> Converted:
    """Convert a DeepSpeed JSON for `world_size` ranks of a device.

    Args:
        preset: the run configuration starts from it, because a DeepSpeed JSON has neither a model nor data.

    Raises:
        ConfigError: the file is not a JSON, or its batch does not fit the ranks, or its precision the device.
    """
    translation = translate(parse_deepspeed_json(path))
    rows = {outcome.key: _row(outcome) for outcome in translation.outcomes}
    config = DeepSpeedConfig.of(str(path), translation)
    settings = {key: value for key, value in config.to_dict().items() if value not in ({}, None)}
    run = {"preset": preset, **translation.run_settings}
    changes = [*_in_run_file(translation.outcomes, run)]
    for repair in _REPAIRS:
        changes += repair(settings)
    changes += _batch(settings, run, config, world_size)
    for key, became, why in changes:
        old = rows.get(key, Row(key, None, became))
        rows[key] = Row(key, old.value, CHANGES_TRAINING if old.became == CHANGES_TRAINING else became, why)
    converted = Converted(settings, run, tuple(rows.values()))
    _check(converted, path, world_size, device)
    return converted


def _row(outcome: Outcome) -> Row:
    instead = "; ".join(part for part in (outcome.why, outcome.instead) if part)
    if outcome.action == "supported":
        return Row(outcome.key, outcome.value, "kept")
    if outcome.action == "refused":
        return Row(outcome.key, outcome.value, "left out: unknown" if outcome.is_ignored else CHANGES_TRAINING, instead)
    became = {"not set": "left out: not set", "no effect": "left out: no effect"}.get(outcome.action, "changed")
    return Row(outcome.key, outcome.value, became, instead)


_Change = tuple[str, str, str]  # key of the file, its fate, the reason


def _in_run_file(outcomes: tuple[Outcome, ...], run: Settings) -> Iterator[_Change]:
    """Add the replacements of sections of the JSON to the run configuration."""
    for outcome in outcomes:
        asked = isinstance(outcome.value, Mapping) and any(
            value not in (None, False, 0) for name, value in outcome.value.items() if name != "profile"
        )
        if outcome.key == "activation_checkpointing" and asked:
            run["train.checkpoint_activations_every"] = 1
            yield outcome.key, f"moved to {RUN_YAML}", "train.checkpoint_activations_every=1; 0 recomputes nothing"
        elif outcome.key in _MONITORS and asked and outcome.value.get("enabled") is not False:
            run["tracking.mlflow"] = True
            yield outcome.key, f"moved to {RUN_YAML}", "tracking.mlflow=true, with metrics.jsonl"
        elif outcome.key == "scheduler" and outcome.action == "translated":
            yield outcome.key, f"moved to {RUN_YAML}", outcome.why
    if (end := run.get("schedule.decay_end_step")) is not None:
        run["train.steps"] = end


# --- repairs of combinations that a rule refuses ----------------------------------------------------------------------


def _take(settings: Settings, key: str) -> Any:
    """Remove a dotted key; return its value, or None without one."""
    *sections, name = key.split(".")
    for section in sections:
        settings = settings.get(section) or {}
    return settings.pop(name, None)


def _get(settings: Settings, key: str, default: Any = None) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return default if value is None else value


def _one_precision(settings: Settings) -> Iterator[_Change]:
    if _get(settings, "fp16.enabled") is True and _get(settings, "bf16.enabled") is True:
        settings["fp16"] = {"enabled": False}
        yield "fp16.enabled", CHANGES_TRAINING, "bf16.enabled is true too, and is kept"


def _precision_of_gradients(settings: Settings) -> Iterator[_Change]:
    precision = next((name for name in ("fp16", "bf16") if _get(settings, f"{name}.enabled") is True), None)
    if precision is None:
        precision = "bf16" if _get(settings, "bf16.enabled") == "auto" else "fp32"
    for key in ("data_types.grad_accum_dtype", "communication_data_type"):
        value = _get(settings, key)
        if value not in (None, precision, "fp32"):
            _take(settings, key)
            yield key, CHANGES_TRAINING, f"{value} cannot hold gradients of {precision}"


def _offload(settings: Settings) -> Iterator[_Change]:
    zero = "zero_optimization"
    if _get(settings, f"{zero}.offload_param.device") == "nvme":
        settings[zero]["offload_param"]["device"] = "cpu"
        yield f"{zero}.offload_param.device", "changed", "read as cpu: no test covers parameters on nvme"
    key = f"{zero}.offload_optimizer"
    if _get(settings, f"{key}.device") != "nvme":
        return
    if _get(settings, f"{zero}.stage") != 3 or _get(settings, f"{key}.nvme_path") is None:
        settings[zero]["offload_optimizer"]["device"] = "cpu"
        yield f"{key}.device", "changed", "read as cpu: nvme needs stage 3 and nvme_path"
        return
    for name in ("pipeline_read", "pipeline_write"):
        if _get(settings, f"{key}.{name}") is True:
            _take(settings, f"{key}.{name}")
            yield f"{key}.{name}", "left out: no effect", "no test covers it, and it changes no number"
    if _get(settings, f"{key}.buffer_count", 4) < 4:
        _take(settings, f"{key}.buffer_count")
        yield f"{key}.buffer_count", "left out: no effect", "it must be 4 or more, which changes no number"


def _even_buckets(settings: Settings) -> Iterator[_Change]:
    key = "zero_optimization.allgather_bucket_size"
    size = _get(settings, key, 0)
    if _get(settings, "zero_optimization.stage") in (1, 2) and size % 2:
        settings["zero_optimization"]["allgather_bucket_size"] = size + 1
        yield key, "changed", f"read as {size + 1}, because it must be even; it changes no number"


_REPAIRS: tuple[Callable[[Settings], Iterator[_Change]], ...] = (
    _one_precision,
    _precision_of_gradients,
    _offload,
    _even_buckets,
)


def _batch(settings: Settings, run: Settings, theirs: DeepSpeedConfig, world_size: int) -> Iterator[_Change]:
    """Keep the global batch, and the other sizes if they fit the ranks."""
    loaded = load_run_config(run["preset"], [])
    batch = RunBatch.of(loaded, theirs)
    if theirs.settings.train_batch_size is None and takes_run_batch(theirs.settings, world_size, batch):
        run["batch.global_sequences"] = batch.sequences
        why = f"batch.global_sequences={batch.sequences} of {batch.source}: the file has no number"
        yield "train_batch_size", f"moved to {RUN_YAML}", why
    why = f"it follows from the global batch on {world_size} ranks"
    fitting = replace(batch, by_user="batch.global_sequences" in run)
    if not _batch_fits(settings, world_size, fitting) and _take(settings, "gradient_accumulation_steps") is not None:
        yield "gradient_accumulation_steps", "left out: follows from the batch", why
    if not _batch_fits(settings, world_size, fitting) and "train_micro_batch_size_per_gpu" in settings:
        settings["train_micro_batch_size_per_gpu"] = "auto"
        yield "train_micro_batch_size_per_gpu", "changed", f'read as "auto": {why}'


def _batch_fits(settings: Settings, world_size: int, batch: RunBatch) -> bool:
    try:
        plan_batch(translate(settings).settings, Topology(world_size), "the JSON", lambda _: True, batch)
    except ConfigError:
        return False
    return True


def _check(converted: Converted, source: Path, world_size: int, device: DeviceFacts) -> None:
    """Resolve both files as a run does; messages name the file that the user has."""
    with tempfile.TemporaryDirectory() as folder:
        json_file, yaml_file = converted.write(Path(folder), source)
        loaded = load_run_config(str(yaml_file), [])
        ds = replace(read_deepspeed_json(json_file), path=str(source))
        resolve(loaded, ds, world_size, device, data_needed=False)
