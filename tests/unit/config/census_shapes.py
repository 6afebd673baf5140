"""Shapes of DeepSpeed JSONs that people have, each with what becomes of it: our own files, after a census of theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
Json = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A JSON and its answer.

    Attributes:
        refused: keys as the file spells them that are refused; empty: it trains as it is.
        noted: keys that a note names.
        ranks: the number of ranks that it is for.
    """

    json: Json
    refused: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


def adamw(**params: Any) -> Json:
    return {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1} | params}


AUTO_ADAMW = {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}}


def warmup(kind: str, **params: Any) -> Json:
    return {"type": kind, "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1000, **params}}


AUTO_BATCH = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
}
AUTO_WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO},
}
AUTO_FP16 = {
    "enabled": AUTO,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
FP16 = {**AUTO_FP16, "enabled": True}
STAGE_2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
CPU = {"device": "cpu", "pin_memory": True}
RECOMPUTATION = {"partition_activations": True, "cpu_checkpointing": False, "number_checkpoints": None}
PLAIN = {"train_batch_size": 16, "bf16": {"enabled": True}, "zero_optimization": STAGE_2}
RANDOM_LTD = {
    "enabled": True,
    "seed": 1234,
    "data_routing": {"enabled": True, "random_ltd": {"enabled": True, "total_layer_num": 24}},
    "data_sampling": {"enabled": False, "curriculum_learning": {"enabled": False}},
}


def plain(**more: Any) -> Json:
    return {**PLAIN, **more}


def zero(stage: int = 2, **more: Any) -> Json:
    return plain(zero_optimization={"stage": stage, **more})


_GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
SHAPES: dict[str, Shape] = {
    # Templates for a trainer that fills in "auto".
    "auto-zero2": Shape(
        {
            **AUTO_BATCH,
            "fp16": AUTO_FP16,
            "bf16": {"enabled": AUTO},
            "optimizer": AUTO_ADAMW,
            "scheduler": AUTO_WARMUP,
            "zero_optimization": {**STAGE_2, "offload_optimizer": CPU},
            "gradient_clipping": AUTO,
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
        },
        noted=("train_batch_size", "optimizer.params.lr", "scheduler", "gradient_clipping"),
    ),
    "auto-zero3": Shape(
        {
            **AUTO_BATCH,
            "bf16": {"enabled": AUTO},
            "zero_optimization": {**STAGE_3, "offload_optimizer": CPU, "offload_param": CPU},
            "gradient_clipping": AUTO,
            "steps_per_print": AUTO,
        },
        noted=(_GATHER, "zero_optimization.reduce_bucket_size", "steps_per_print"),
    ),
    "auto-zero3-off": Shape(
        {
            **AUTO_BATCH,
            "bf16": {"enabled": True},
            "zero_optimization": {
                **STAGE_3,
                "offload_optimizer": {"device": "none"},
                "offload_param": {"device": "none"},
            },
        }
    ),
    "auto-buffer": Shape(zero(3, offload_param={**CPU, "buffer_size": AUTO, "buffer_count": 5, "max_in_cpu": 1e9})),
    "auto-scheduler-decay": Shape(
        plain(scheduler={"type": "WarmupDecayLR", "params": {**AUTO_WARMUP["params"], "total_num_steps": AUTO}}),
        noted=("scheduler",),
    ),
    "warmup-numbers": Shape(
        plain(scheduler=warmup("WarmupLR"), optimizer=adamw()), noted=("scheduler", "optimizer.params.lr")
    ),
    "warmup-decay-numbers": Shape(
        plain(scheduler=warmup("WarmupDecayLR", total_num_steps=10000)), noted=("scheduler", "schedule.decay_end_step")
    ),
    "warmup-cosine-numbers": Shape(
        plain(
            scheduler={
                "type": "WarmupCosineLR",
                "params": {"warmup_min_ratio": 0.03, "warmup_num_steps": 10, "total_num_steps": 200},
            }
        ),
        noted=("scheduler",),
    ),
    "one-cycle": Shape(
        plain(scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}),
        refused=("scheduler.type", "OneCycle", "cycle_max_lr=0.001"),
    ),
    "auto-sections": Shape(plain(fp16=AUTO, optimizer=AUTO), noted=("fp16", "optimizer")),
    "micro-and-auto": Shape({**PLAIN, "train_batch_size": AUTO, "train_micro_batch_size_per_gpu": 4}),
    # Batches.
    "no-batch": Shape({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, noted=("train_batch_size",)),
    "only-micro": Shape({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}),
    "only-accumulation": Shape({"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}),
    "three-sizes": Shape(plain(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=8)),
    "for-eight-ranks": Shape(
        plain(train_batch_size=64, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2), ranks=8
    ),
    "on-the-wrong-ranks": Shape(
        plain(train_batch_size=64, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2),
        refused=("train_batch_size", "8 ranks"),
    ),
    "no-divisor": Shape(plain(train_micro_batch_size_per_gpu=3), refused=("train_micro_batch_size_per_gpu",)),
    # Precision.
    "fp16": Shape({"train_batch_size": 16, "fp16": FP16, "zero_optimization": STAGE_2, "gradient_clipping": 1.0}),
    "fp16-static": Shape(
        plain(bf16=None, fp16={**FP16, "loss_scale": 512, "min_loss_scale": 0}), noted=("fp16.min_loss_scale",)
    ),
    "fp16-off-zeros": Shape(
        plain(fp16={**FP16, "enabled": False, "min_loss_scale": 0, "hysteresis": 0}),
        noted=("fp16.min_loss_scale", "fp16.hysteresis"),
    ),
    "fp16-min-scale-0": Shape(plain(bf16=None, fp16={**FP16, "min_loss_scale": 0}), refused=("fp16.min_loss_scale",)),
    "fp16-min-scale-tiny": Shape(
        plain(fp16={"enabled": False, "min_loss_scale": 1e-10}), refused=("fp16.min_loss_scale",)
    ),
    "fp16-of-another-tool": Shape(
        plain(fp16={"enabled": False, "fp16": True, "opt_level": "O2"}), refused=("fp16.fp16", "fp16.opt_level")
    ),
    "fp16-auto-cast-off": Shape(plain(fp16={"enabled": False, "auto_cast": False}), noted=("fp16.auto_cast",)),
    "fp16-auto-cast": Shape(plain(bf16=None, fp16={**FP16, "auto_cast": True}), refused=("fp16.auto_cast",)),
    "fp16-and-bf16": Shape(plain(fp16=FP16), refused=("fp16.enabled", "bf16.enabled")),
    "bfloat16": Shape(
        {"train_batch_size": 16, "bfloat16": {"enabled": True}, "zero_optimization": STAGE_2}, noted=("bfloat16",)
    ),
    "bf16-scale": Shape(
        plain(bf16={"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}),
        noted=("bf16.loss_scale", "bf16.hysteresis"),
    ),
    "bf16-enable": Shape(plain(bf16={"enable": True}), refused=("bf16.enable",)),
    "bf16-masters": Shape(
        plain(bf16={"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}),
        refused=("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"),
    ),
    "gradients-in-fp32": Shape(plain(data_types={"grad_accum_dtype": "fp32"}, communication_data_type="fp32")),
    "gradients-in-fp16": Shape(plain(communication_data_type="fp16"), refused=("communication_data_type",)),
    "amp-off": Shape(plain(amp={"enabled": False, "opt_level": "O2"}), noted=("amp",)),
    "autocast": Shape(plain(torch_autocast={"enabled": True, "dtype": "torch.bfloat16"}), refused=("torch_autocast",)),
    # ZeRO.
    "stage-0-fp16": Shape(
        plain(bf16=None, fp16=FP16, zero_optimization={"stage": 0}), noted=("zero_optimization.stage",)
    ),
    "stage-0-bf16": Shape(zero(0), noted=("zero_optimization.stage",)),
    "stage-0-offload": Shape(zero(0, offload_optimizer=CPU), noted=("zero_optimization.offload_optimizer.device",)),
    "no-zero": Shape({"train_batch_size": 16, "bf16": {"enabled": True}}),
    "zero-false": Shape({"train_batch_size": 16, "zero_optimization": False}, noted=("zero_optimization",)),
    "zero-true": Shape(plain(zero_optimization=True), noted=("zero_optimization",)),
    "cpu-offload": Shape(
        zero(2, cpu_offload=True, contiguous_gradients=True), noted=("zero_optimization.cpu_offload",)
    ),
    "cpu-offload-off": Shape(zero(2, cpu_offload=False), noted=("zero_optimization.cpu_offload",)),
    "cpu-offload-params": Shape(
        zero(3, cpu_offload=True, cpu_offload_params=True), refused=("zero_optimization.cpu_offload_params",)
    ),
    "offload-twice": Shape(
        zero(2, cpu_offload=True, offload_optimizer={"device": "none"}), refused=("zero_optimization.cpu_offload",)
    ),
    "offload-param-in-stage-2": Shape(zero(2, offload_param=CPU), noted=("zero_optimization.offload_param.device",)),
    "sub-group-0": Shape(
        zero(3, sub_group_size=0, stage3_max_live_parameters=0, stage3_prefetch_bucket_size="0"),
        noted=("zero_optimization.stage3_prefetch_bucket_size",),
    ),
    "text-numbers": Shape(
        zero("2", reduce_bucket_size="500000000", overlap_comm="true"),  # type: ignore[arg-type]
        noted=("zero_optimization.reduce_bucket_size", "zero_optimization.overlap_comm"),
    ),
    "short-names": Shape(
        zero(3, prefetch_bucket_size=1e7, max_live_parameters=1e9, gather_16bit_weights_on_model_save=True),
        noted=("zero_optimization.gather_16bit_weights_on_model_save",),
    ),
    "elastic-checkpoint": Shape(zero(1, elastic_checkpoint=True), noted=("zero_optimization.elastic_checkpoint",)),
    "zero-plus-plus": Shape(
        zero(3, zero_hpz_partition_size=8, zero_quantized_weights=True, zero_quantized_gradients=True),
        refused=("zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients"),
        ranks=8,
    ),
    "mics": Shape(
        zero(3, mics_shard_size=4, mics_hierarchical_params_gather=True),
        refused=("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
    ),
    "zenflow": Shape(
        zero(2, offload_optimizer=CPU, zenflow={"topk_ratio": 0.1}), refused=("zero_optimization.zenflow",)
    ),
    "partial-offload": Shape(
        zero(3, offload_optimizer={**CPU, "ratio": 0.8}), refused=("zero_optimization.offload_optimizer.ratio",)
    ),
    "nvme-parameters": Shape(
        zero(3, offload_param={"device": "nvme", "nvme_path": "/tmp"}), refused=("offload_param.device=nvme",)
    ),
    "aio": Shape(plain(aio={"block_size": 1048576, "queue_depth": 8, "thread_count": 2}), noted=("aio.thread_count",)),
    # Optimizers.
    "adamw": Shape(plain(optimizer=adamw())),
    "adam-w-mode": Shape(
        plain(optimizer={"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": True, "torch_adam": True}})
    ),
    "torch-adam-offload": Shape(
        zero(2, offload_optimizer=CPU) | {"optimizer": adamw(torch_adam=True), "zero_allow_untested_optimizer": True},
        noted=("optimizer.params.torch_adam",),
    ),
    "no-bias-correction": Shape(
        plain(optimizer=adamw(bias_correction=False)), refused=("optimizer.params.bias_correction",)
    ),
    "beside-params": Shape(
        plain(optimizer={"type": "AdamW", "params": {"lr": 1e-4}, "eps": 1e-8, "weight_decay": 0.01}),
        refused=("optimizer.eps", "optimizer.weight_decay"),
    ),
    "lamb": Shape(
        plain(optimizer={"type": "Lamb", "params": {"lr": 11e-3, "max_coeff": 0.3, "min_coeff": 0.01}}),
        refused=("optimizer", "optimizer.type"),
    ),
    "one-bit-adam": Shape(
        plain(
            optimizer={"type": "OneBitAdam", "params": {"lr": 4e-4, "freeze_step": 23000, "comm_backend_name": "nccl"}}
        ),
        refused=("optimizer", "optimizer.type"),
    ),
    "max-grad-norm": Shape(plain(max_grad_norm=0.5), refused=("max_grad_norm",)),
    # Sections.
    "recomputation": Shape(plain(activation_checkpointing=RECOMPUTATION), noted=("activation_checkpointing",)),
    "monitors": Shape(
        plain(
            tensorboard={"enabled": True, "output_path": "logs", "job_name": "x"},
            wandb={"enabled": True, "project": "x"},
            csv_monitor={"enabled": False},
        ),
        noted=("tensorboard", "wandb", "csv_monitor"),
    ),
    "profilers": Shape(
        plain(
            flops_profiler={"enabled": True, "profile_step": 30, "module_depth": -1, "detailed": True},
            comms_logger={"enabled": True, "verbose": False, "prof_all": True, "debug": False},
            wall_clock_breakdown=True,
        ),
        noted=("comms_logger.verbose", "flops_profiler.module_depth"),
    ),
    "profilers-off": Shape(
        plain(flops_profiler={"enabled": False, "profile_step": 1}, comms_logger={"enabled": False, "verbose": False})
    ),
    "checkpoint": Shape(
        plain(checkpoint={"tag_validation": "Warn", "use_node_local_storage": True}, dataloader_drop_last=True),
        noted=("checkpoint", "dataloader_drop_last"),
    ),
    "prescale": Shape(
        plain(prescale_gradients=True, gradient_predivide_factor=8.0, fp32_allreduce=True),
        noted=("prescale_gradients", "gradient_predivide_factor", "fp32_allreduce"),
    ),
    "empty-sections": Shape(plain(checkpoint={}, aio={}, fp16={}, data_efficiency={}, pipeline={})),
    "comments": Shape(
        {"_comment": "x", "//": "y", "comment": "z", **zero(2, _note="why"), "fp16": {"//": "off", "enabled": False}},
        noted=("_comment", "zero_optimization._note"),
    ),
    "logs": Shape(plain(dump_state=True, wall_clock_breakdown=True, memory_breakdown=True, steps_per_print=100)),
    "data-efficiency": Shape(plain(data_efficiency=RANDOM_LTD), refused=("data_efficiency",)),
    "data-efficiency-off": Shape(
        plain(data_efficiency={**RANDOM_LTD, "data_routing": {"enabled": False}}), noted=("data_efficiency",)
    ),
    "curriculum": Shape(
        plain(curriculum_learning={"enabled": True, "curriculum_type": "seqlen"}), refused=("curriculum_learning",)
    ),
    "sparse-attention": Shape(plain(sparse_attention={"mode": "fixed", "block": 16}), refused=("sparse_attention",)),
    "elasticity": Shape(plain(elasticity={"enabled": True, "max_gpus": 2}), refused=("elasticity",)),
    "layer-drop": Shape(
        plain(progressive_layer_drop={"enabled": True, "theta": 0.5}), refused=("progressive_layer_drop",)
    ),
    "autotuning": Shape(plain(autotuning={"enabled": True, "fast": True}), refused=("autotuning",)),
    "compile": Shape(plain(compile={"disable": False, "backend": "inductor"}), refused=("compile",)),
    "pipeline": Shape(
        plain(pipeline={"chunks": 2}, tensor_parallel={"autotp_size": 2}), refused=("pipeline", "tensor_parallel")
    ),
    "unknown": Shape(plain(autotuning_config={"enabled": True}), refused=("autotuning_config",)),
    "model-file": Shape(
        {
            **plain(optimizer=adamw()),
            "num-layers": 12,
            "hidden-size": 768,
            "seq-length": 2048,
            "pipe-parallel-size": 1,
            "attention_config": [[["flash"], 12]],
            "launcher": "slurm",
        },
        refused=("num-layers", "hidden-size", "attention_config", "launcher"),
    ),
    "bad-value-by-its-spelling": Shape(
        zero(3, stage3_param_persistence_threshold="many", prefetch_bucket_size=-1),
        refused=("zero_optimization.stage3_param_persistence_threshold", "zero_optimization.prefetch_bucket_size=-1"),
    ),
    "bad-values": Shape(
        plain(gradient_clipping=-1, train_batch_size=0, zero_optimization={"stage": 4, "overlap_comm": "maybe"}),
        refused=(
            "gradient_clipping=-1",
            "train_batch_size=0",
            "zero_optimization.stage=4",
            'zero_optimization.overlap_comm="maybe"',
        ),
    ),
}
for _shape in SHAPES.values():
    for _key in [key for key, value in _shape.json.items() if value is None]:
        del _shape.json[_key]
