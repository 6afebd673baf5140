"""Keys of a DeepSpeed JSON that megalm does not honour: what each would do, and what to write instead.

A key is honoured (json_schema.py), an older spelling (translate.py), in the table here, or unknown. An inert key
changes no number of a training run, here or in DeepSpeed: it is left out with a note. Any other is refused where it
asks for something.
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
    """A key, or a section with all that is in it.

    Attributes:
        why: the reason, as a clause of its own.
        instead: what to write instead, and in which file.
        inert: it changes no number of a training run.
        asks_nothing: the value with which it asks for nothing, beside null, {} and `"enabled": false`.
        group: keys of one group are reported together.
    """

    why: str
    instead: str = REMOVE
    inert: bool = False
    asks_nothing: Any = None
    group: str = ""


def _inert(why: str, instead: str = "", asks_nothing: Any = None) -> UnsupportedKey:
    return UnsupportedKey(why, instead, inert=True, asks_nothing=asks_nothing)


def _removed(what: str, instead: str = REMOVE, asks_nothing: Any = None) -> UnsupportedKey:
    why = f"DeepSpeed 0.19.8 no longer has {what} and refuses the file"
    return UnsupportedKey(why, instead, asks_nothing=asks_nothing, group=what)


def _zeropp(asks_nothing: Any = False) -> UnsupportedKey:
    why = "ZeRO++ is not proven equal to the one-rank model"
    return UnsupportedKey(why, "remove it", asks_nothing=asks_nothing, group="ZeRO++")


_METRICS = _inert("megalm writes metrics.jsonl and mirrors it to MLflow", "tracking.mlflow in the run YAML")
_CHECKPOINTS = _inert("megalm writes checkpoints of its own", "checkpoint.* in the run YAML", asks_nothing=False)
_MEAN = "megalm averages gradients over the targets of the global batch, which is the same mean"
_GATHER = _inert("it acts only where DeepSpeed saves 16-bit weights", "megalm export", asks_nothing=False)
_SCALE = _inert("bf16 has no loss scale")
_MASTERS = "megalm keeps master weights in fp32"
_MOMENTS = "megalm keeps moments in fp32"
_EXPERTS = UnsupportedKey("mixtures of experts are not available")
_PRINTS = _inert("it only prints", asks_nothing=False)
_OPTIMIZER_LEVEL = "DeepSpeed 0.19.8 ignores it beside optimizer.params"

UNSUPPORTED: dict[str, UnsupportedKey] = {
    # Sections and keys that are inert.
    "tensorboard": _METRICS,
    "wandb": _METRICS,
    "csv_monitor": _METRICS,
    "comet": _METRICS,
    "monitor_config": _METRICS,
    "flops_profiler": _inert("megalm counts FLOPs itself", "megalm plan, and mfu in metrics.jsonl"),
    "comms_logger": _PRINTS,
    "comms_config": _PRINTS,
    "timers": _PRINTS,
    "log_level": _PRINTS,
    "activation_checkpointing": _inert(
        "DeepSpeed acts on it only where the model's code calls deepspeed.checkpointing",
        "train.checkpoint_activations_every in the run YAML",
    ),
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "dataloader_drop_last": _inert("megalm has a loader of its own", "data.* in the run YAML", asks_nothing=False),
    "prescale_gradients": _inert(_MEAN, asks_nothing=False),
    "gradient_predivide_factor": _inert(_MEAN, asks_nothing=1.0),
    "fp32_allreduce": _inert(IGNORED, 'communication_data_type "fp32" in the JSON', asks_nothing=False),
    "allgather_size": _inert("DeepSpeed 0.19.8 reads it only beside a plain zero_optimization: true"),
    "vocabulary_size": _inert("DeepSpeed 0.19.8 only warns by it", "model.vocab_size in the run YAML"),
    "disable_allgather": _inert("DeepSpeed 0.19.8 does nothing with it", asks_nothing=False),
    "disable_python_gc": _inert("it changes when Python frees memory, and no number", asks_nothing=False),
    "stage3_gather_16bit_weights_on_model_save": _GATHER,
    "zero_optimization.gather_16bit_weights_on_model_save": _GATHER,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _GATHER,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _GATHER,
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.cpu_offload_use_pin_memory": _inert(
        "DeepSpeed 0.19.8 warns of it and ignores it", "pin_memory in offload_optimizer or offload_param"
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
    # Sections that are the run configuration's.
    "pipeline": UnsupportedKey("pipeline stages are the run configuration's", "state parallel.pipeline there"),
    "tensor_parallel": UnsupportedKey("tensor ranks are the run configuration's", "state parallel.tensor there"),
    "sequence_parallel_size": UnsupportedKey(
        "sequence ranks are the run configuration's", "state parallel.sequence there", asks_nothing=1
    ),
    "seq_parallel_communication_data_type": UnsupportedKey(
        "sequence ranks are the run configuration's", "state parallel.sequence there", asks_nothing="fp32"
    ),
    "data_parallel_size": UnsupportedKey("it follows from the number of ranks and from parallel.*"),
    "compile": UnsupportedKey("compiling is the run configuration's", "state compile=true there"),
    "seed": UnsupportedKey(IGNORED, "state train.seed in the run YAML"),
    "data_efficiency": UnsupportedKey("the order and length of samples are the run configuration's, data.*"),
    # Sections that change the training.
    "expert_parallel": _EXPERTS,
    "use_data_before_expert_parallelism": UnsupportedKey(_EXPERTS.why, asks_nothing=False),
    "autotuning": UnsupportedKey(
        "DeepSpeed's autotuner ends a run after some steps", 'write train_micro_batch_size_per_gpu "auto" in the JSON'
    ),
    "weight_quantization": UnsupportedKey("quantized weights are not available"),
    "hybrid_engine": UnsupportedKey("it serves reinforcement learning"),
    "torch_autocast": UnsupportedKey("autocast is not proven equal to the one-rank model", "write bf16 or fp16"),
    "managed_gradient_accumulation": UnsupportedKey("megalm keeps to DeepSpeed's default", asks_nothing=True),
    "gradient_allreduce_op": UnsupportedKey(_MEAN.partition(",")[0], asks_nothing="mean"),
    "nebula": _removed("Nebula checkpoints"),
    "amp": _removed("Apex AMP", "write bf16 or fp16"),
    "elasticity": _removed("elastic batches", "state train_batch_size, which is kept on any number of ranks"),
    "compression_training": _removed("compression"),
    "quantize_training": _removed("quantized training"),
    "sparse_attention": _removed("sparse attention"),
    "sparse_gradients": _removed("sparse gradients", asks_nothing=False),
    "eigenvalue": _removed("eigenvalues"),
    "graph_harvesting": _removed("graph harvesting", asks_nothing=False),
    "progressive_layer_drop": _removed("progressive layer drop"),
    "curriculum_learning": _removed("this curriculum"),
    # Single keys.
    "max_grad_norm": UnsupportedKey(IGNORED, "write gradient_clipping", asks_nothing=0),
    "optimizer.legacy_fusion": _inert("it chooses an implementation", asks_nothing=False),
    **{
        f"optimizer.{name}": UnsupportedKey(_OPTIMIZER_LEVEL, "move it into optimizer.params", group="optimizer")
        for name in ("lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam")
    },
    "optimizer.params.max_grad_norm": UnsupportedKey("DeepSpeed 0.19.8 refuses it there", "write gradient_clipping"),
    "optimizer.params.bias_correction": UnsupportedKey("Adam is corrected for bias here", asks_nothing=True),
    "optimizer.params.amsgrad": UnsupportedKey("AMSGrad is not available", asks_nothing=False),
    "optimizer.params.fused": _inert("megalm chooses the implementation"),
    "optimizer.params.foreach": _inert("megalm chooses the implementation"),
    "optimizer.params.fp32_optimizer_states": UnsupportedKey(_MOMENTS, asks_nothing=True),
    "fp16.auto_cast": UnsupportedKey("token ids must not be cast", asks_nothing=False),
    "fp16.fp16_master_weights_and_grads": UnsupportedKey(_MASTERS, asks_nothing=False),
    "bf16.bf16_master_weights_and_grads": UnsupportedKey(_MASTERS, asks_nothing=False),
    "bf16.bf16_optimizer_states": UnsupportedKey(_MOMENTS, asks_nothing=False),
    "data_types.param_dtype": UnsupportedKey("the precision is bf16.enabled or fp16.enabled"),
    "data_types.buffer_dtype": UnsupportedKey("buffers follow the precision"),
    "data_types.keep_in_fp32_modules": UnsupportedKey("all modules compute in one precision"),
    "zero_optimization.mics_shard_size": _removed("MiCS"),
    "zero_optimization.mics_hierarchical_params_gather": _removed("MiCS"),
    "zero_optimization.zeropp_loco_param": _removed("LoCo"),
    "zero_optimization.zero_hpz_partition_size": _zeropp(asks_nothing=1),
    "zero_optimization.zero_quantized_weights": _zeropp(),
    "zero_optimization.zero_quantized_nontrainable_weights": _zeropp(),
    "zero_optimization.zero_quantized_gradients": _zeropp(),
    "zero_optimization.zenflow": UnsupportedKey("ZenFlow is not proven equal to the one-rank model"),
    "zero_optimization.legacy_stage1": UnsupportedKey("it is not proven here", asks_nothing=False),
    "zero_optimization.compute_grad_norm": UnsupportedKey("megalm logs the norm at every step", asks_nothing=True),
    "zero_optimization.parameter_alignment": UnsupportedKey("it is not proven here", asks_nothing=False),
    "zero_optimization.override_module_apply": UnsupportedKey("it is not proven here", asks_nothing=True),
    "zero_optimization.save_muon_momentum_buffer_in_memory": _inert("Muon is not available", asks_nothing=False),
    "zero_optimization.leaf_module": UnsupportedKey("it is not proven here"),
    "zero_optimization.offload_optimizer.ratio": UnsupportedKey("partial offload is not proven here", asks_nothing=1.0),
    "zero_optimization.offload_optimizer.super_offload": UnsupportedKey("it is not proven here", asks_nothing=False),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _inert("it acts only with super_offload"),
}

# Keys of the configuration files of GPT-NeoX, which hold a DeepSpeed JSON and much else -> the run configuration's key.
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
    "gpt_j_residual": "",
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
    "mlp_type": "",
    "model_parallel_size": "parallel.tensor",
    "no_ssh_check": "",
    "no_weight_tying": "model.tie_word_embeddings",
    "norm": "model.style",
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
    "pos_emb": "model.style",
    "rms_norm_epsilon": "model.norm_epsilon",
    "rotary_emb_base": "model.rope_theta",
    "rotary_pct": "",
    "save": "run.root",
    "save_interval": "checkpoint.interval_steps",
    "scaled_masked_softmax_fusion": "",
    "scaled_upper_triang_masked_softmax_fusion": "",
    "seq_length": "data.sequence_length",
    "split": "data.split",
    "synchronize_each_layer": "",
    "tensorboard_dir": "tracking.mlflow",
    "tokenizer_type": "data.tokenizer",
    "train_data_paths": "data.train",
    "train_iters": "train.steps",
    "valid_data_paths": "data.validation",
    "vocab_file": "data.tokenizer",
    "warmup": "schedule.warmup_steps",
    "weight_decay": "optimizer.params.weight_decay",
}

_LEAVES = leaf_fields(DeepSpeedSettings)
# Sections that are pydantic models in DeepSpeed too: it refuses what it does not know in them.
TYPED_SECTIONS = ("fp16", "bf16", "bfloat16", "zero_optimization")
DEEPSPEED_NAMES: frozenset[str] = frozenset(
    part
    for path in (*_LEAVES, *UNSUPPORTED, "scheduler")
    for part in path.split(".")
    if part not in ("type", "params", "checkpoint")
) | {field.alias for field in _LEAVES.values() if field.alias}


def is_comment(key: str) -> bool:
    """Whether a key is what people write where JSON has no comments: "_note", "//", "#", "comment"."""
    return key.startswith(("_", "//", "#")) or key.lower() in ("comment", "comments")


def asks_nothing(rule: UnsupportedKey, value: Any) -> bool:
    """Whether this value of an unsupported key asks for nothing: JSONs made from templates are full of them."""
    if value is None or value == "auto":
        return True
    if isinstance(value, Mapping):
        return _is_off(value)
    return bool(value == rule.asks_nothing) and isinstance(value, bool) == isinstance(rule.asks_nothing, bool)


def unknown_key(path: str, spelled: str) -> UnsupportedKey:
    """The account of a key that megalm does not know; what it says of DeepSpeed holds for version 0.19.8.

    Args:
        path: with the names of sections as in DeepSpeedSettings.
        spelled: as the file has it.
    """
    section, _, name = path.rpartition(".")
    plain = name.lower().replace("-", "_")
    if not section and (plain in _NEOX_KEYS or "-" in name):
        key = _NEOX_KEYS.get(plain, "")
        instead = (
            f"state {key} {'in the JSON' if key.startswith('optimizer') else 'in the run YAML'}" if key else REMOVE
        )
        return UnsupportedKey("it is a key of GPT-NeoX, not of DeepSpeed", instead, group="neox")
    hint = did_you_mean(name, _honoured_in(section))
    if not hint:
        elsewhere = [leaf for leaf in _LEAVES if leaf.split(".")[-1] == name]
        hint = f", did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
    if section.startswith("optimizer.params"):
        effect = "DeepSpeed hands it to Adam, which does not know it"
    elif section.split(".")[0] in TYPED_SECTIONS:
        effect = "DeepSpeed 0.19.8 refuses it too"
    else:
        effect = IGNORED
    return UnsupportedKey(f"{UNKNOWN}{hint}", "" if hint else f"{effect}, remove it")


def _honoured_in(section: str) -> set[str]:
    """The names that are honoured in a section, under both spellings."""
    prefix = f"{section}." if section else ""
    names = {path[len(prefix) :].split(".")[0] for path in _LEAVES if path.startswith(prefix)}
    return names | {
        field.alias for path, field in _LEAVES.items() if field.alias and path.rpartition(".")[0] == section
    }


def _is_off(section: Mapping[str, Any]) -> bool:
    """Whether a section is empty, switched off, or made of sections that are all switched off."""
    if not section or section.get("enabled") is False:
        return True
    parts = [value for key, value in section.items() if isinstance(value, Mapping)]
    plain = {key for key, value in section.items() if not isinstance(value, Mapping)}
    return bool(parts) and plain <= {"enabled", "seed"} and all(_is_off(part) for part in parts)
