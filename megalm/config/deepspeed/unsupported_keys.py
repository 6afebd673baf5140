"""Keys of a DeepSpeed JSON that megalm does not honour, and what to use instead.

DeepSpeed ignores a top-level key that it does not know, and megalm's training loop leaves some that it does
know without effect; both would be wrong in silence. So a key is honoured (json_schema.py), refused here,
or unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.config.validation import leaf_fields, shown
from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

_METRICS = "megalm writes metrics.jsonl and mirrors it to MLflow; use tracking.mlflow in the run YAML"
_REMOVED = "DeepSpeed 0.19.8 no longer has it"
_ZEROPP = "ZeRO++ and its relatives are not proven equal to the one-rank model here; remove it"
_OWN_CHECKPOINTS = "megalm has checkpoints of its own; use checkpoint.* in the run YAML"
_NOT_HERE = "megalm's training does not use it; remove it"

# Section or key -> what to use instead.
REFUSED: dict[str, str] = {
    "tensorboard": _METRICS,
    "wandb": _METRICS,
    "csv_monitor": _METRICS,
    "comet": _METRICS,
    "activation_checkpointing": "use train.checkpoint_activations_every in the run YAML",
    "checkpoint": _OWN_CHECKPOINTS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "nebula": _OWN_CHECKPOINTS,
    "pipeline": "use parallel.pipeline in the run YAML",
    "tensor_parallel": "use parallel.tensor in the run YAML",
    "sequence_parallel_size": "use parallel.sequence in the run YAML",
    "data_parallel_size": "it follows from the number of ranks and parallel.* in the run YAML; remove it",
    "seq_parallel_communication_data_type": "use parallel.sequence in the run YAML",
    "expert_parallel": "mixtures of experts are not available",
    "use_data_before_expert_parallelism": "mixtures of experts are not available",
    "compile": "use compile in the run YAML",
    "seed": "use train.seed in the run YAML",
    "vocabulary_size": "use model.vocab_size in the run YAML",
    "data_efficiency": "the order of the data is data.* in the run YAML",
    "curriculum_learning": f"{_REMOVED}; the order of the data is data.* in the run YAML",
    "dataloader_drop_last": "megalm has a loader of its own; see data.* in the run YAML",
    "autotuning": "use \"auto\" for train_micro_batch_size_per_gpu, and 'megalm plan'",
    "elasticity": f"{_REMOVED}; a shipped JSON keeps its batch on any number of ranks",
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "weight_quantization": _NOT_HERE,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "graph_harvesting": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "amp": f"{_REMOVED}; use bf16 or fp16",
    "torch_autocast": "use bf16 or fp16",
    "bfloat16": "write bf16",
    "hybrid_engine": "it serves reinforcement learning; remove it",
    "managed_gradient_accumulation": "megalm's engine keeps to DeepSpeed's default; remove it",
    "prescale_gradients": "gradients are averaged over the global batch's target count; remove it",
    "gradient_predivide_factor": "gradients are averaged over the global batch's target count; remove it",
    "gradient_allreduce_op": "gradients are averaged over the global batch's target count; remove it",
    "disable_allgather": _NOT_HERE,
    "disable_python_gc": _NOT_HERE,
    "log_level": _NOT_HERE,
    "optimizer.legacy_fusion": _NOT_HERE,
    "optimizer.params.max_grad_norm": "write gradient_clipping at the top of the JSON",
    "optimizer.params.bias_correction": "Adam is always corrected for bias; remove it",
    "optimizer.params.amsgrad": "AMSGrad is not available; remove it",
    "optimizer.params.fused": "megalm chooses the implementation; remove it",
    "optimizer.params.foreach": "megalm chooses the implementation; remove it",
    "optimizer.params.fp32_optimizer_states": "moments are always kept in fp32; remove it",
    "fp16.auto_cast": "token ids must not be cast; remove it",
    "fp16.fp16_master_weights_and_grads": "master weights are always kept in fp32; remove it",
    "bf16.bf16_master_weights_and_grads": "master weights are always kept in fp32; remove it",
    "bf16.bf16_optimizer_states": "moments are always kept in fp32; remove it",
    "data_types.param_dtype": "the precision is bf16.enabled or fp16.enabled; remove it",
    "data_types.buffer_dtype": _NOT_HERE,
    "data_types.keep_in_fp32_modules": _NOT_HERE,
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in offload_optimizer or offload_param",
    "zero_optimization.mics_shard_size": f"MiCS: {_REMOVED}",
    "zero_optimization.mics_hierarchical_params_gather": f"MiCS: {_REMOVED}",
    "zero_optimization.zero_hpz_partition_size": _ZEROPP,
    "zero_optimization.zero_quantized_weights": _ZEROPP,
    "zero_optimization.zero_quantized_nontrainable_weights": _ZEROPP,
    "zero_optimization.zero_quantized_gradients": _ZEROPP,
    "zero_optimization.zeropp_loco_param": _ZEROPP,
    "zero_optimization.zenflow": "ZenFlow is not proven equal to the one-rank model here; remove it",
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.compute_grad_norm": "the gradient norm is logged at every step; remove it",
    "zero_optimization.parameter_alignment": _NOT_HERE,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.override_module_apply": _NOT_HERE,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Muon is not available",
    "zero_optimization.leaf_module": _NOT_HERE,
    "zero_optimization.gather_16bit_weights_on_model_save": "'megalm export' gathers the weights; remove it",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "'megalm export' gathers the weights; remove it",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "'megalm export' gathers the weights; remove it",
    "zero_optimization.offload_optimizer.ratio": "partial offload is not proven here; remove it",
    "zero_optimization.offload_optimizer.super_offload": "it is not proven here; remove it",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload; remove it",
}

# Values that ask for nothing: JSONs made from templates are full of them. `"enabled": false` is another.
_ASKS_NOTHING: dict[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "disable_allgather": False,
    "disable_python_gc": False,
    "sparse_gradients": False,
    "seq_parallel_communication_data_type": "fp32",
    "optimizer.params.bias_correction": True,
    "optimizer.params.amsgrad": False,
    "optimizer.params.fp32_optimizer_states": True,
    "fp16.auto_cast": False,
    "fp16.fp16_master_weights_and_grads": False,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "zero_optimization.cpu_offload": False,
    "zero_optimization.cpu_offload_param": False,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.zero_quantized_weights": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.elastic_checkpoint": False,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.parameter_alignment": False,
    "zero_optimization.override_module_apply": True,
    "zero_optimization.gather_16bit_weights_on_model_save": False,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": False,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}

_LEAVES = leaf_fields(DeepSpeedSettings)
DEEPSPEED_NAMES: frozenset[str] = frozenset(
    part for path in (*_LEAVES, *REFUSED) for part in path.split(".") if part not in ("type", "params", "checkpoint")
) | {field.alias for field in _LEAVES.values() if field.alias}


def without_refused(raw: Any, where: str, prefix: str = "") -> tuple[Any, list[str]]:
    """The JSON without keys that megalm does not honour but that ask for nothing, and the names of those.

    Raises:
        ConfigError: a key that megalm does not honour and that asks for something.
    """
    if not isinstance(raw, dict):
        return raw, []
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if path not in REFUSED:
            kept[key], below = without_refused(value, where, f"{path}.")
            dropped += below
        elif _asks_nothing(path, value):
            dropped.append(path)
        else:
            said = "" if isinstance(value, (dict, list)) else f"={shown(value)}"
            raise ConfigError(f"{where}: {path}{said} is not honoured by megalm: {REFUSED[path]}")
    return kept, dropped


def unknown_deepspeed_key(key: str, where: str) -> ConfigError:
    """The error for a key that neither megalm nor DeepSpeed knows."""
    section, _, name = key.rpartition(".")
    siblings = list(_siblings(section))
    hint = did_you_mean(name, siblings)
    if not hint:
        others = [path for path in (*_LEAVES, *REFUSED) if path.split(".")[-1] == name]
        hint = f", did you mean {' or '.join(map(repr, others))}?" if others else ""
    return ConfigError(f"{where}: unknown key {key}{hint or '; DeepSpeed would ignore it, remove it'}")


def _siblings(section: str) -> Iterator[str]:
    prefix = f"{section}." if section else ""
    for path in (*_LEAVES, *REFUSED):
        if path.startswith(prefix):
            yield path[len(prefix) :].split(".")[0]
    for path, field in _LEAVES.items():
        if field.alias and path.rpartition(".")[0] == section:
            yield field.alias


def _asks_nothing(path: str, value: Any) -> bool:
    if value is None or (isinstance(value, dict) and value.get("enabled") is False):
        return True
    missing = object()
    harmless = _ASKS_NOTHING.get(path, missing)
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
