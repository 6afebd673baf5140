"""Keys of a DeepSpeed JSON that megalm does not support: what to use instead, and the values that have no effect."""

from __future__ import annotations

from typing import Any

_REMOVED = "DeepSpeed 0.19.8 no longer has it"
_UNUSED = "megalm's training does not use it; remove it"
_AVERAGED = "gradients are averaged over the global batch's target count; remove it"
_CHECKPOINTS = "megalm has its own checkpoints; use checkpoint.* in the run YAML"
_FP32_MASTER = "master weights are always fp32; remove it"
_FP32_MOMENTS = "moments are always fp32; remove it"
_GATHERED = "'megalm export' gathers the weights; remove it"
_IMPLEMENTATION = "megalm chooses the implementation; remove it"
_UNTESTED = "no test compares it with the one-rank model; remove it"


def _of(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


# Section or key -> what to use instead.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("tensorboard", "wandb", "csv_monitor", "comet"),
        "megalm writes metrics.jsonl and mirrors it to MLflow; use tracking.mlflow in the run YAML",
    ),
    **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), _CHECKPOINTS),
    **dict.fromkeys(("weight_quantization", "disable_allgather", "disable_python_gc", "log_level"), _UNUSED),
    **dict.fromkeys(("compression_training", "quantize_training", "sparse_attention", "sparse_gradients"), _REMOVED),
    **dict.fromkeys(("eigenvalue", "graph_harvesting", "progressive_layer_drop"), _REMOVED),
    **dict.fromkeys(("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"), _AVERAGED),
    **dict.fromkeys(
        ("expert_parallel", "use_data_before_expert_parallelism"), "mixtures of experts are not available; remove it"
    ),
    "activation_checkpointing": "use train.checkpoint_activations_every in the run YAML",
    "pipeline": "use parallel.pipeline in the run YAML",
    "tensor_parallel": "use parallel.tensor in the run YAML",
    "sequence_parallel_size": "use parallel.sequence in the run YAML",
    "seq_parallel_communication_data_type": "use parallel.sequence in the run YAML",
    "data_parallel_size": "it follows from the number of ranks and parallel.* in the run YAML; remove it",
    "compile": "use compile in the run YAML",
    "seed": "use train.seed in the run YAML",
    "vocabulary_size": "use model.vocab_size in the run YAML",
    "data_efficiency": "set the order of the data with data.* in the run YAML",
    "curriculum_learning": f"{_REMOVED}; set the order of the data with data.* in the run YAML",
    "dataloader_drop_last": "megalm has its own data loader; see data.* in the run YAML",
    "autotuning": "use \"auto\" for train_micro_batch_size_per_gpu, and 'megalm plan'",
    "elasticity": f"{_REMOVED}; a shipped JSON keeps its batch on any number of ranks",
    "amp": f"{_REMOVED}; use bf16 or fp16",
    "torch_autocast": "use bf16 or fp16",
    "bfloat16": "write bf16",
    "hybrid_engine": "it is for reinforcement learning; remove it",
    "managed_gradient_accumulation": "megalm uses DeepSpeed's default; remove it",
    "optimizer.legacy_fusion": _UNUSED,
    "optimizer.params.max_grad_norm": "write gradient_clipping at the top of the JSON",
    "optimizer.params.bias_correction": "Adam always corrects its bias; remove it",
    "optimizer.params.amsgrad": "AMSGrad is not available; remove it",
    **dict.fromkeys(_of("optimizer.params", "fused", "foreach"), _IMPLEMENTATION),
    "optimizer.params.fp32_optimizer_states": _FP32_MOMENTS,
    "fp16.auto_cast": "a cast would corrupt token ids; remove it",
    "fp16.fp16_master_weights_and_grads": _FP32_MASTER,
    "bf16.bf16_master_weights_and_grads": _FP32_MASTER,
    "bf16.bf16_optimizer_states": _FP32_MOMENTS,
    "data_types.param_dtype": "set the precision with bf16.enabled or fp16.enabled; remove it",
    **dict.fromkeys(_of("data_types", "buffer_dtype", "keep_in_fp32_modules"), _UNUSED),
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in offload_optimizer or offload_param",
    **dict.fromkeys(
        _of("zero_optimization", "mics_shard_size", "mics_hierarchical_params_gather"), f"MiCS: {_REMOVED}"
    ),
    **dict.fromkeys(
        _of(
            "zero_optimization",
            *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
            *("zero_quantized_gradients", "zeropp_loco_param"),
        ),
        f"ZeRO++: {_UNTESTED}",
    ),
    "zero_optimization.zenflow": f"ZenFlow: {_UNTESTED}",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.compute_grad_norm": "megalm logs the gradient norm at every step; remove it",
    **dict.fromkeys(_of("zero_optimization", "elastic_checkpoint", "pipeline_loading_checkpoint"), _CHECKPOINTS),
    **dict.fromkeys(_of("zero_optimization", "parameter_alignment", "override_module_apply", "leaf_module"), _UNUSED),
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Muon is not available; remove it",
    "zero_optimization.gather_16bit_weights_on_model_save": _GATHERED,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _GATHERED,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _GATHERED,
    "zero_optimization.offload_optimizer.ratio": f"partial offload: {_UNTESTED}",
    "zero_optimization.offload_optimizer.super_offload": _UNTESTED,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload; remove it",
}

# Values without effect, which templates of JSONs often have: such a key is ignored, as is one with "enabled": false.
NO_EFFECT: dict[str, Any] = {
    **dict.fromkeys(("prescale_gradients", "disable_allgather", "disable_python_gc", "sparse_gradients"), False),
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "seq_parallel_communication_data_type": "fp32",
    "optimizer.params.bias_correction": True,
    "optimizer.params.amsgrad": False,
    "optimizer.params.fp32_optimizer_states": True,
    **dict.fromkeys(_of("fp16", "auto_cast", "fp16_master_weights_and_grads"), False),
    **dict.fromkeys(_of("bf16", "bf16_master_weights_and_grads", "bf16_optimizer_states"), False),
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.override_module_apply": True,
    **dict.fromkeys(
        _of(
            "zero_optimization",
            *("cpu_offload", "cpu_offload_param", "elastic_checkpoint", "legacy_stage1", "parameter_alignment"),
            *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
            *("gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
        ),
        False,
    ),
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}
