"""What is said about a key that the run configuration does not have: the nearest one, or where it belongs."""

from __future__ import annotations

from megalm.config.deepspeed.unsupported_keys import DEEPSPEED_NAMES
from megalm.config.schema import RunConfig
from megalm.config.validation import leaf_fields, section_of
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import likeness, nearest

# What only describes is no setting that somebody may have meant.
_LEAVES = [key for key in leaf_fields(RunConfig) if not key.startswith("documented.")]
_SECTIONS = [name for name, field in RunConfig.model_fields.items() if section_of(field) and name != "documented"]

# Names that other toolkits use for what has another name here.
_OTHER_NAMES = {
    "learning_rate": "schedule.peak_learning_rate",
    "lr": "schedule.peak_learning_rate",  # in the JSON too, but only those that people bring along state it there
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
    "seq_length": "data.sequence_length",
    "block_size": "data.sequence_length",
    "n_layer": "model.num_hidden_layers",
    "n_head": "model.num_attention_heads",
    "n_embd": "model.hidden_size",
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
}
_OTHER_NAMES_IN_JSON = ("batch_size", "micro_batch_size", "precision", "dtype", "zero", "zero_stage")


def unknown_run_key(key: str, where: str) -> ConfigError:
    """The error for an unknown dotted key.

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
    same_name = [leaf for leaf in _LEAVES if leaf.split(".")[-1] == name]
    if same_name:
        return f", did you mean {' or '.join(same_name)}?"
    if name in _OTHER_NAMES:
        return f", did you mean {_OTHER_NAMES[name]}?"
    if not DEEPSPEED_NAMES.isdisjoint(parts) or name in _OTHER_NAMES_IN_JSON:
        return "; it belongs to the DeepSpeed JSON, the file of --deepspeed_config"
    match = nearest(key, [*_LEAVES, *_SECTIONS]) or _nearest_by_name(name)
    elsewhere = nearest(name, DEEPSPEED_NAMES)
    # Keys of one section look alike for its name alone: the last names decide.
    if match and (elsewhere is None or likeness(name, match.split(".")[-1]) >= likeness(name, elsewhere)):
        return f", did you mean {match}?"
    if elsewhere:
        return f"; if {elsewhere} is meant, it belongs to the DeepSpeed JSON, the file of --deepspeed_config"
    return f"; sections: {', '.join(_SECTIONS)}"


def _nearest_by_name(name: str) -> str | None:
    by_name = {leaf.split(".")[-1]: leaf for leaf in _LEAVES}
    match = nearest(name, by_name)
    return by_name[match] if match else None
