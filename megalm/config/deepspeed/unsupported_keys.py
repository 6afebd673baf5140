"""Keys of a DeepSpeed JSON that megalm does not support: the reason for each, and what to use instead.

A key is supported (json_schema.py), an older spelling (translate.py), in the table here, or unknown. An inert key
changes no number of a training run: it is ignored with a note. Any other is refused if its value has an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.config.validation import leaf_fields
from megalm.utils.did_you_mean import did_you_mean

REMOVE = "remove it"
UNKNOWN = "unknown key"
IGNORED = "DeepSpeed 0.19.8 ignores it"


@dataclass(frozen=True)
class UnsupportedKey:
    """A key, or a section with all its keys.

    Attributes:
        why: the reason.
        instead: what to use instead, and in which file.
        inert: it changes no number of a training run.
        no_effect: the value without effect, besides null, {} and `"enabled": false`.
        group: keys of one group are reported in one line.
    """

    why: str
    instead: str = REMOVE
    inert: bool = False
    no_effect: Any = None
    group: str = ""


def _inert(why: str, instead: str = "", no_effect: Any = None) -> UnsupportedKey:
    return UnsupportedKey(why, instead, inert=True, no_effect=no_effect)


def _removed(what: str, instead: str = REMOVE, no_effect: Any = None) -> UnsupportedKey:
    why = f"DeepSpeed 0.19.8 has removed {what} and refuses the file"
    return UnsupportedKey(why, instead, no_effect=no_effect, group=what)


_METRICS = _inert("megalm writes metrics.jsonl and mirrors it to MLflow", "tracking.mlflow in the run YAML")
_CHECKPOINTS = _inert("megalm writes its own checkpoints", "checkpoint.* in the run YAML", no_effect=False)
_MEAN = "megalm averages gradients over the targets of the global batch, which is the same mean"
_GATHER = _inert("it affects only how DeepSpeed saves 16-bit weights", "megalm export", no_effect=False)
_SCALE = _inert("bf16 has no loss scale")
_QUANTIZED = UnsupportedKey(
    "its kernels need GPUs, of several nodes for gradients, so no test here compares it with the one-rank model",
    no_effect=False,
    group="quantized ZeRO++",
)
_MASTERS = "master weights are always fp32"
_MOMENTS = "train.optimizer_state decides how moments are kept"
_UNTESTED = "no test compares it with the one-rank model"
_EXPERTS = UnsupportedKey("mixtures of experts are not available")
_PRINTS = _inert("it only prints", no_effect=False)
_OPTIMIZER_LEVEL = "DeepSpeed 0.19.8 ignores it beside optimizer.params"

UNSUPPORTED: dict[str, UnsupportedKey] = {
    # Inert sections and keys.
    "tensorboard": _inert("megalm writes event files itself", "tracking.tensorboard=true in the run YAML"),
    "wandb": _inert("megalm sends the run itself", "tracking.wandb=true in the run YAML"),
    "csv_monitor": _METRICS,
    "comet": _METRICS,
    "monitor_config": _METRICS,
    "comms_config": _PRINTS,
    "log_level": _PRINTS,
    "activation_checkpointing": _inert(
        "it has an effect only if the model's code calls deepspeed.checkpointing",
        "train.checkpoint_activations_every in the run YAML",
    ),
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "dataloader_drop_last": _inert("megalm has its own data loader", "data.* in the run YAML", no_effect=False),
    "prescale_gradients": _inert(_MEAN, no_effect=False),
    "gradient_predivide_factor": _inert(_MEAN, no_effect=1.0),
    "fp32_allreduce": _inert(IGNORED, 'communication_data_type "fp32" in the JSON', no_effect=False),
    "allgather_size": _inert("DeepSpeed 0.19.8 reads it only with zero_optimization: true"),
    "vocabulary_size": _inert("DeepSpeed 0.19.8 uses it only for a warning", "model.vocab_size in the run YAML"),
    "disable_allgather": _inert("DeepSpeed 0.19.8 does not use it", no_effect=False),
    "disable_python_gc": _inert("it changes only when Python frees memory", no_effect=False),
    "stage3_gather_16bit_weights_on_model_save": _GATHER,
    "zero_optimization.gather_16bit_weights_on_model_save": _GATHER,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _GATHER,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _GATHER,
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.cpu_offload_use_pin_memory": _inert(
        "DeepSpeed 0.19.8 ignores it with a warning", "pin_memory in offload_optimizer or offload_param"
    ),
    **{
        f"bf16.{name}": _SCALE
        for name in (
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        )
    },
    # Sections that belong to the run configuration.
    "pipeline": UnsupportedKey("the run configuration sets pipeline stages", "use parallel.pipeline in the run YAML"),
    "tensor_parallel": UnsupportedKey(
        "the run configuration sets tensor parallelism", "use parallel.tensor in the run YAML"
    ),
    "sequence_parallel_size": UnsupportedKey(
        "the run configuration sets context parallelism", "use parallel.context in the run YAML", no_effect=1
    ),
    "seq_parallel_communication_data_type": UnsupportedKey(
        "the run configuration sets context parallelism", "use parallel.context in the run YAML", no_effect="fp32"
    ),
    "data_parallel_size": UnsupportedKey("it follows from the number of ranks and from parallel.*"),
    "compile": UnsupportedKey("the run configuration sets compilation", "use compile: true in the run YAML"),
    "seed": UnsupportedKey(IGNORED, "use train.seed in the run YAML"),
    "data_efficiency": UnsupportedKey("the run configuration sets the order and length of samples, with data.*"),
    # Sections that change training.
    "expert_parallel": _EXPERTS,
    "use_data_before_expert_parallelism": UnsupportedKey(_EXPERTS.why, no_effect=False),
    "autotuning": UnsupportedKey(
        "DeepSpeed's autotuner ends the run after some steps", 'write train_micro_batch_size_per_gpu "auto" in the JSON'
    ),
    "weight_quantization": UnsupportedKey("quantized weights are not available"),
    "hybrid_engine": UnsupportedKey("it is for reinforcement learning"),
    "torch_autocast": UnsupportedKey("no test compares autocast with the one-rank model", "use bf16 or fp16"),
    "managed_gradient_accumulation": UnsupportedKey("megalm uses DeepSpeed's default", no_effect=True),
    "gradient_allreduce_op": UnsupportedKey(_MEAN.partition(",")[0], no_effect="mean"),
    "nebula": _removed("Nebula checkpoints"),
    "amp": _removed("Apex AMP", "use bf16 or fp16"),
    "elasticity": _removed("elastic batches", "set train_batch_size, which stays the same on any number of ranks"),
    "compression_training": _removed("compression"),
    "quantize_training": _removed("quantized training"),
    "sparse_attention": _removed("sparse attention"),
    "sparse_gradients": _removed("sparse gradients", no_effect=False),
    "eigenvalue": _removed("eigenvalues"),
    "graph_harvesting": _removed("graph harvesting", no_effect=False),
    "progressive_layer_drop": _removed("progressive layer drop"),
    "curriculum_learning": _removed("this curriculum", "use data.stages in the run YAML, with a sequence_length each"),
    # Single keys.
    "max_grad_norm": UnsupportedKey(IGNORED, "use gradient_clipping", no_effect=0),
    "optimizer.legacy_fusion": _inert("megalm chooses the implementation", no_effect=False),
    **{
        f"optimizer.{name}": UnsupportedKey(_OPTIMIZER_LEVEL, "move it into optimizer.params", group="optimizer")
        for name in ("lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam")
    },
    "optimizer.params.max_grad_norm": UnsupportedKey("DeepSpeed 0.19.8 refuses it there", "use gradient_clipping"),
    "optimizer.params.bias_correction": UnsupportedKey("Adam always corrects its bias", no_effect=True),
    "optimizer.params.amsgrad": UnsupportedKey("AMSGrad is not available", no_effect=False),
    "optimizer.params.ns_method": _inert("megalm chooses the implementation"),
    "optimizer.params.fused": _inert("megalm chooses the implementation"),
    "optimizer.params.foreach": _inert("megalm chooses the implementation"),
    "optimizer.params.fp32_optimizer_states": UnsupportedKey(_MOMENTS, no_effect=True),
    "fp16.auto_cast": UnsupportedKey("a cast would corrupt token ids", no_effect=False),
    "fp16.fp16_master_weights_and_grads": UnsupportedKey(_MASTERS, no_effect=False),
    "bf16.bf16_master_weights_and_grads": UnsupportedKey(_MASTERS, no_effect=False),
    "bf16.bf16_optimizer_states": UnsupportedKey(_MOMENTS, no_effect=False),
    "data_types.param_dtype": UnsupportedKey("the precision is bf16.enabled or fp16.enabled"),
    "data_types.buffer_dtype": UnsupportedKey("buffers follow the precision"),
    "data_types.keep_in_fp32_modules": UnsupportedKey("all modules compute in one precision"),
    "zero_optimization.mics_shard_size": _removed("MiCS"),
    "zero_optimization.mics_hierarchical_params_gather": _removed("MiCS"),
    "zero_optimization.zeropp_loco_param": _removed("LoCo"),
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zenflow": UnsupportedKey("no test compares ZenFlow with the one-rank model"),
    "zero_optimization.legacy_stage1": UnsupportedKey(_UNTESTED, no_effect=False),
    "zero_optimization.compute_grad_norm": UnsupportedKey("megalm logs the norm at every step", no_effect=True),
    "zero_optimization.parameter_alignment": UnsupportedKey(_UNTESTED, no_effect=False),
    "zero_optimization.override_module_apply": UnsupportedKey(_UNTESTED, no_effect=True),
    "zero_optimization.save_muon_momentum_buffer_in_memory": _inert(
        "the momentum buffer is in memory, divided like the weights", no_effect=False
    ),
    "zero_optimization.leaf_module": UnsupportedKey(_UNTESTED),
    "zero_optimization.offload_optimizer.ratio": UnsupportedKey("no test covers partial offload", no_effect=1.0),
    "zero_optimization.offload_optimizer.super_offload": UnsupportedKey(_UNTESTED, no_effect=False),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _inert("only super_offload uses it"),
}

# Keys of GPT-NeoX's configuration files, which include a DeepSpeed JSON -> the run configuration's key.
_NEOX_KEYS: dict[str, str] = {
    "attention_config": "",
    "attention_dropout": "model.attention_dropout",
    "bias_gelu_fusion": "",
    "checkpoint_activations": "train.checkpoint_activations_every",
    "checkpoint_factor": "checkpoint.interval_steps",
    "checkpoint_num_layers": "train.checkpoint_activations_every",
    "checkpointing": "checkpoint.*",
    "data_impl": "",
    "data_path": "data.train",
    "deepspeed_slurm": "",
    "distributed_backend": "",
    "backend": "",
    "eval_interval": "evaluate.interval_steps",
    "eval_iters": "evaluate.max_samples",
    "extra_save_iters": "",
    "flash_attention": "",
    "gpt_j_residual": "model.parallel_residual",
    "hidden_dropout": "model.dropout",
    "hidden_size": "model.hidden_size",
    "init_method": "model.initializer_range",
    "keep_last_n_checkpoints": "checkpoint.keep_last",
    "launcher": "",
    "load": "",
    "log_dir": "run.root",
    "log_interval": "train.log_interval_steps",
    "lr_decay_iters": "train.steps",
    "lr_decay_style": "schedule.kind",
    "make_vocab_size_divisible_by": "model.vocab_size",
    "max_position_embeddings": "model.max_position_embeddings",
    "memory_optimization": "",
    "merge_file": "data.tokenizer",
    "min_lr": "schedule.final_learning_rate",
    "mlp_type": "model.gated_mlp",
    "model_parallel_size": "parallel.tensor",
    "no_ssh_check": "",
    "no_weight_tying": "model.tie_word_embeddings",
    "norm": "model.normalization",
    "num_attention_heads": "model.num_attention_heads",
    "num_kv_heads": "model.num_key_value_heads",
    "num_layers": "model.num_hidden_layers",
    "num_unique_layers": "",
    "num_workers": "",
    "output_layer_init_method": "model.initializer_range",
    "output_layer_parallelism": "",
    "param_sharing_style": "",
    "partition_activations": "",
    "pipe_parallel_size": "parallel.pipeline",
    "pos_emb": "model.position_embedding_type",
    "rms_norm_epsilon": "model.norm_epsilon",
    "rotary_emb_base": "model.rope_theta",
    "rotary_pct": "model.partial_rotary_factor",
    "save": "run.root",
    "save_interval": "checkpoint.interval_steps",
    "scaled_masked_softmax_fusion": "",
    "scaled_upper_triang_masked_softmax_fusion": "",
    "seq_length": "data.sequence_length",
    "split": "data.split",
    "synchronize_each_layer": "",
    "tensorboard_dir": "tracking.tensorboard",
    "wandb_project": "tracking.wandb",
    "tokenizer_type": "data.tokenizer",
    "train_data_paths": "data.train",
    "train_iters": "train.steps",
    "valid_data_paths": "data.validation",
    "vocab_file": "data.tokenizer",
    "warmup": "schedule.warmup_steps",
    "weight_decay": "optimizer.params.weight_decay",
}

_LEAVES = leaf_fields(DeepSpeedSettings)
# Sections that are pydantic models in DeepSpeed too, so that it refuses unknown keys in them.
TYPED_SECTIONS = ("fp16", "bf16", "bfloat16", "zero_optimization", "comms_logger", "timers.throughput")
TYPED_PREFIXES = tuple(f"{section}." for section in TYPED_SECTIONS)  # of dotted keys in them
DEEPSPEED_NAMES: frozenset[str] = frozenset(
    part
    for path in (*_LEAVES, *UNSUPPORTED, "scheduler")
    for part in path.split(".")
    if part not in ("type", "params", "checkpoint")
) | {field.alias for field in _LEAVES.values() if field.alias}


def has_no_effect(rule: UnsupportedKey, value: Any) -> bool:
    """Whether this value of an unsupported key has no effect; templates of JSONs have many such values."""
    if value is None or value == "auto":
        return True
    if isinstance(value, Mapping):
        return _is_off(value)
    return bool(value == rule.no_effect) and isinstance(value, bool) == isinstance(rule.no_effect, bool)


def unknown_key(path: str) -> UnsupportedKey:
    """The reason and advice for an unknown key; a claim about DeepSpeed holds for version 0.19.8.

    Args:
        path: dotted, by the names in DeepSpeedSettings.
    """
    section, _, name = path.rpartition(".")
    plain = name.lower().replace("-", "_")
    if not section and (plain in _NEOX_KEYS or "-" in name):
        key = _NEOX_KEYS.get(plain, "")
        instead = f"use {key} {'in the JSON' if key.startswith('optimizer') else 'in the run YAML'}" if key else REMOVE
        return UnsupportedKey("a key of GPT-NeoX, not of DeepSpeed", instead, group="neox")
    hint = did_you_mean(name, _supported_in(section))
    if not hint:
        elsewhere = [leaf for leaf in _LEAVES if leaf.split(".")[-1] == name]
        hint = f", did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
    if section.startswith("optimizer.params"):
        effect = "DeepSpeed passes it to Adam, which refuses it"
    elif path.startswith(TYPED_PREFIXES):
        effect = "DeepSpeed 0.19.8 refuses it too"
    else:
        effect = IGNORED
    return UnsupportedKey(f"{UNKNOWN}{hint}", "" if hint else f"{effect}, remove it")


def _supported_in(section: str) -> set[str]:
    """The supported names in a section, in both spellings."""
    prefix = f"{section}." if section else ""
    names = {path[len(prefix) :].split(".")[0] for path in _LEAVES if path.startswith(prefix)}
    return names | {
        field.alias for path, field in _LEAVES.items() if field.alias and path.rpartition(".")[0] == section
    }


def _is_off(section: Mapping[str, Any]) -> bool:
    """Whether a section is empty, disabled, or has only disabled sections."""
    if not section or section.get("enabled") is False:
        return True
    parts = [value for key, value in section.items() if isinstance(value, Mapping)]
    plain = {key for key, value in section.items() if not isinstance(value, Mapping)}
    return bool(parts) and plain <= {"enabled", "seed"} and all(_is_off(part) for part in parts)
