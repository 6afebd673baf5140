"""Rules of the DeepSpeed JSON; see run_checks.py.

DeepSpeed 0.19.8 runs several of the refused combinations without a message and trains something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, choose_precision
from megalm.config.deepspeed.json_schema import (
    DeepSpeedSettings,
    OffloadOptimizerSection,
    OffloadParamSection,
    Precision,
    ZeroSection,
)
from megalm.config.loading import LoadedConfig
from megalm.config.schema import Recompute, RunConfig
from megalm.errors import ConfigError
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.parameter_groups import GroupKey, frozen_parameters, group_keys
from megalm.topology import Topology

ALLOW_CPU_FP16 = "MEGALM_ALLOW_CPU_FP16"

_STATES_AND_GRADIENT = 4
_TABLE = "embedding.tokens.weight"


@dataclass(frozen=True)
class CheckContext:
    """A run configuration with its DeepSpeed JSON, the number of ranks and the device."""

    loaded: LoadedConfig
    ds: DeepSpeedConfig
    world_size: int
    device: DeviceFacts

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @property
    def settings(self) -> DeepSpeedSettings:
        return self.ds.settings

    @property
    def zero(self) -> ZeroSection:
        return self.ds.settings.zero_optimization

    @property
    def precision(self) -> Precision:
        return choose_precision(self.settings, self.device)[0]

    @property
    def knows_steps(self) -> bool:
        """Whether train.steps is the length of the run; tokens turn into steps once the batch is known."""
        return self.config.train.tokens is None and self.config.train.tokens_per_parameter is None

    @property
    def topology(self) -> Topology:
        parallel = self.config.parallel
        return Topology(self.world_size, parallel.tensor, parallel.pipeline, parallel.context, parallel.expert)

    @property
    def shape(self) -> ModelConfig:
        """The model, except for its vocabulary: no rule needs that."""
        return build_model_config(self.config.model, 1, self.config.data.sample_length)

    @property
    def group_keys(self) -> dict[str, GroupKey]:
        """Canonical name -> optimizer group."""
        train = self.config.train
        dimensions = {name: len(size) for name, size in self.shape.parameters().items()}
        return group_keys(dimensions, train.parameter_groups, train.embedding_weight_decay, self.settings.uses_muon)

    @property
    def offloads(self) -> Iterator[tuple[str, OffloadOptimizerSection | OffloadParamSection]]:
        """Name and section of each offload to a device."""
        for name in ("offload_optimizer", "offload_param"):
            offload = getattr(self.zero, name)
            if offload is not None and offload.device != "none":
                yield name, offload


Rule = Callable[[CheckContext], None]


# --- the DeepSpeed JSON -----------------------------------------------------------------------------------------------


def one_learning_rate(case: CheckContext) -> None:
    given = case.settings.peak_learning_rate
    if given is not None and "schedule.peak_learning_rate" in case.loaded.explicit_keys:
        peak = case.config.schedule.peak_learning_rate
        source = case.loaded.sources["schedule.peak_learning_rate"]
        raise ConfigError(
            f"{given[0]}={given[1]:g} ({case.ds.path}) and schedule.peak_learning_rate={peak:g} ({source}) "
            "set the same value; remove one"
        )


def one_low_precision(case: CheckContext) -> None:
    if case.settings.fp16.enabled is True and case.settings.bf16.enabled is True:
        raise ConfigError(f"{case.ds.path}: fp16.enabled and bf16.enabled are both true; keep one")


def device_has_bf16(case: CheckContext) -> None:
    if case.settings.bf16.enabled is True and case.device.kind == "cuda" and not case.device.bf16:
        raise ConfigError(f'{case.ds.path}: bf16.enabled=true, but this device has no bf16; use "auto", fp16 or fp32')


def fp16_needs_a_gpu(case: CheckContext) -> None:
    if case.precision == "fp16" and case.device.kind == "cpu" and os.environ.get(ALLOW_CPU_FP16) != "1":
        raise ConfigError(
            f"{case.ds.path}: fp16.enabled=true, but fp16 is a thousand times slower on a CPU; use bf16 or fp32, "
            f"plan for a GPU with --gpu NAME, or set {ALLOW_CPU_FP16}=1 for a test"
        )


_FLOAT8_MULTIPLE = 16  # of both dimensions of a float8 product's factors


def float8_has_its_kernel(case: CheckContext) -> None:
    """The kernel that scales rows needs a GPU of capability 8.9 and gives bf16; a CPU emulates it in any type."""
    if not case.config.precision.float8 or case.device.kind == "cpu":
        return
    if not case.device.float8:
        raise ConfigError(
            f"precision.float8=true needs a GPU of capability 8.9 or later (L4, L40S, RTX 4090, H100 and newer), but "
            f"{case.device.name or 'this GPU'} multiplies no float8; remove it"
        )
    if case.precision != "bf16":
        raise ConfigError(
            f"precision.float8=true needs bf16, the result of its products, but the precision is {case.precision} "
            f"({case.ds.path}); set bf16.enabled=true, or remove it"
        )


def float8_divides_the_model(case: CheckContext) -> None:
    if not case.config.precision.float8:
        return
    shape, degree, context = case.shape, case.config.parallel.tensor, case.config.parallel.context
    heads, key_heads = shape.num_attention_heads // degree, max(1, shape.num_key_value_heads // degree)
    for name, size in (
        ("model.hidden_size", shape.hidden_size),
        ("the width of a rank's heads (model.num_attention_heads)", heads * shape.head_dim),
        ("the width of a rank's key/value heads (model.num_key_value_heads)", key_heads * shape.head_dim),
        ("a rank's part of model.intermediate_size", shape.intermediate_size // degree),
        *((f"a rank's part of data.sequence_length={it}", it // context) for it in case.config.data.sequence_lengths),
    ):
        if size % _FLOAT8_MULTIPLE:
            raise ConfigError(
                f"precision.float8=true: {name} is {size}, not a multiple of {_FLOAT8_MULTIPLE}, as float8 products "
                "need; change it or remove precision.float8"
            )


def engine_notices(config: RunConfig, device: DeviceFacts, shape: ModelConfig) -> Iterator[str]:
    """Yield a notice of each setting that does less on this device or model than it says."""
    if config.precision.float8 and device.kind == "cpu":
        yield "precision.float8=true: this CPU emulates float8 products, slower than without"
    if config.train.offload_activations and device.kind == "cpu":
        yield (
            "train.offload_activations=true on a CPU: block inputs are copied within its memory, and nothing is saved"
        )
    if config.compile == "auto" and device.kind == "cuda" and not device.compiles:
        yield (
            'compile ("auto"): false; torch.compile needs Triton, a C compiler, Python.h and compute capability 7.0 '
            "here"
        )
    if shape.tie_word_embeddings and _TABLE in frozen_parameters(shape, config.train.parameter_groups):
        yield f"train.parameter_groups freezes {_TABLE}, which is the head as well: model.tie_word_embeddings=true"


def gradient_precision(case: CheckContext) -> None:
    for key, chosen in (
        ("data_types.grad_accum_dtype", case.settings.data_types.grad_accum_dtype),
        ("communication_data_type", case.settings.communication_data_type),
    ):
        if chosen is not None and chosen not in (case.precision, "fp32"):
            raise ConfigError(f"{case.ds.path}: {key}={chosen} cannot hold gradients of {case.precision}; use fp32")


def nvme_needs_stage_3_and_path(case: CheckContext) -> None:
    offload = case.zero.offload_optimizer
    if offload is None or offload.device != "nvme":
        return
    if case.zero.stage != 3:
        raise ConfigError(
            f"{case.ds.path}: offload_optimizer.device=nvme needs zero_optimization.stage 3, but the stage is "
            f"{case.zero.stage}; use cpu"
        )
    if offload.nvme_path is None:
        raise ConfigError(
            f"{case.ds.path}: offload_optimizer.device=nvme needs offload_optimizer.nvme_path, a folder on that disk"
        )


def gds_needs_a_gpu(case: CheckContext) -> None:
    if case.settings.aio is not None and case.settings.aio.use_gds and case.device.kind == "cpu":
        raise ConfigError(f"{case.ds.path}: aio.use_gds=true needs a GPU, but this device is a CPU; remove it")


def buckets_are_even(case: CheckContext) -> None:
    size = case.zero.allgather_bucket_size
    if case.zero.stage in (1, 2) and size % 2:
        raise ConfigError(f"{case.ds.path}: zero_optimization.allgather_bucket_size={size} is odd; use {size + 1}")


def nvme_keeps_optimizer_states_only(case: CheckContext) -> None:
    optimizer, parameters = case.zero.offload_optimizer, case.zero.offload_param
    if parameters is not None and parameters.device == "nvme":
        raise ConfigError(
            f"{case.ds.path}: offload_param.device=nvme is not tested; use cpu there, and nvme for offload_optimizer, "
            "which is six times as large"
        )
    if optimizer is None or optimizer.device != "nvme":
        return
    for name in ("pipeline_read", "pipeline_write"):
        if getattr(optimizer, name):
            raise ConfigError(f"{case.ds.path}: offload_optimizer.{name}=true is not tested; remove it")
    if optimizer.buffer_count < _STATES_AND_GRADIENT:
        raise ConfigError(
            f"{case.ds.path}: offload_optimizer.buffer_count={optimizer.buffer_count} is too small for a master, its "
            f"moments and its gradient; use {_STATES_AND_GRADIENT} or more"
        )
    if case.config.checkpoint.asynchronous:
        raise ConfigError(
            f"checkpoint.async=true needs a copy in memory of the state that {case.ds.path} keeps on disk "
            "(offload_optimizer.device=nvme); remove one of them"
        )


def gradients_are_reduced_as_the_stage_can(case: CheckContext) -> None:
    wanted, stage = case.config.train.reduce_gradients, case.zero.stage
    why = ""
    if wanted == "step" and stage == 3:
        why = "ZeRO 3 keeps no whole gradients; use stage 2"
    elif wanted == "step" and stage == 2 and any(name == "offload_optimizer" for name, _ in case.offloads):
        why = "offload_optimizer keeps no whole gradients on the device; remove one of them"
    elif wanted == "micro_batch" and stage < 2:
        why = f"stage {stage} reduces gradients once a step; remove the key, or use stage 2"
    if why:
        raise ConfigError(
            f"train.reduce_gradients={wanted} with zero_optimization.stage={stage} ({case.ds.path}): {why}"
        )


def runs_compiled(config: RunConfig, device: DeviceFacts, zero: ZeroSection) -> bool:
    """Return whether blocks and loss run compiled; "auto" leaves out what no test compares with one plain rank.

    A schedule that divides backward passes has no compiled ones.
    """
    if config.compile != "auto":
        return config.compile
    is_proven = config.model.num_experts is None or not is_divided(config, zero)
    return device.kind == "cuda" and device.compiles and is_proven and config.parallel.schedule_name != "zb_v"


def no_recomputation(kind: Recompute, config: RunConfig, device: DeviceFacts, zero: ZeroSection) -> str:
    """Return with what blocks cannot be recomputed so, why, and what to do; empty: they can."""
    chunk = config.train.mlp_chunk_tokens
    if kind == "mlp" and chunk is not None:
        return f"train.mlp_chunk_tokens={chunk}: tiles already compute the MLP again; remove one of them"
    if not runs_compiled(config, device, zero):
        return ""
    instead = "set compile=false, or use train.recompute=full"
    if kind == "norms":
        return f"compiled blocks: their graphs already recompute norms where that is cheaper; {instead}"
    if kind in ("attention", "mlp") and is_divided(config, zero):
        return f"compiled blocks: {_HALVES}; {instead}"
    return ""


_HALVES = "each half of a block is a graph of its own, not proven with ZeRO 3, tensor or context groups and pipelines"


def is_divided(config: RunConfig, zero: ZeroSection) -> bool:
    parallel = config.parallel
    return zero.stage == 3 or max(parallel.tensor, parallel.context, parallel.pipeline, parallel.expert) > 1


def recomputation_is_one(case: CheckContext) -> None:
    train = case.config.train
    if train.recompute == "none":
        return
    if train.checkpoint_activations_every:
        raise ConfigError(
            f"train.recompute={train.recompute} and train.checkpoint_activations_every="
            f"{train.checkpoint_activations_every} both choose what the backward pass recomputes; remove one of them "
            "(train.recompute=full is every block)"
        )
    why = "" if train.recompute == "auto" else no_recomputation(train.recompute, case.config, case.device, case.zero)
    if why:
        raise ConfigError(f"train.recompute={train.recompute} with {why}")


def tiles_run_as_blocks_do(case: CheckContext) -> None:
    chunk = case.config.train.mlp_chunk_tokens
    if chunk is not None and runs_compiled(case.config, case.device, case.zero) and is_divided(case.config, case.zero):
        raise ConfigError(f"train.mlp_chunk_tokens={chunk} with compiled blocks: {_HALVES}; set compile=false")


def offloaded_inputs_are_recomputed_from(case: CheckContext) -> None:
    train = case.config.train
    if train.offload_activations and train.recompute != "full" and not train.checkpoint_activations_every:
        raise ConfigError(
            f"train.offload_activations=true with train.recompute={train.recompute}: inputs of blocks that are "
            "recomputed whole are offloaded, and here none is; set train.recompute=full"
        )


def offloaded_states_are_fp32(case: CheckContext) -> None:
    states = case.config.train.optimizer_state
    if states != "fp32" and any(name == "offload_optimizer" for name, _ in case.offloads):
        raise ConfigError(
            f"train.optimizer_state={states} with offload_optimizer ({case.ds.path}): DeepSpeed's CPU Adam keeps its "
            "moments in fp32; remove one of them"
        )


def ema_is_in_memory(case: CheckContext) -> None:
    offload, decay = case.zero.offload_optimizer, case.config.train.ema_decay
    if decay is not None and offload is not None and offload.device == "nvme":
        raise ConfigError(
            f"train.ema_decay={decay:g} averages weights that offload_optimizer.device=nvme ({case.ds.path}) keeps on "
            "the disk; use offload_optimizer.device=cpu, or remove train.ema_decay"
        )


def muon_keeps_its_states(case: CheckContext) -> None:
    if not case.settings.uses_muon:
        return
    states = case.config.train.optimizer_state
    if states != "fp32":
        raise ConfigError(
            f'train.optimizer_state={states} with optimizer.type="Muon" ({case.ds.path}): it shortens Adam\'s moments '
            "only, and Muon has half of them; remove train.optimizer_state"
        )
    if any(name == "offload_optimizer" for name, _ in case.offloads):
        raise ConfigError(
            f'{case.ds.path}: offload_optimizer with optimizer.type="Muon": DeepSpeed\'s CPU Adam updates offloaded '
            "states, and the CPU is too slow to orthogonalise matrices; remove offload_optimizer, or use AdamW"
        )


DEEPSPEED_RULES: tuple[Rule, ...] = (
    one_learning_rate,
    one_low_precision,
    device_has_bf16,
    fp16_needs_a_gpu,
    float8_has_its_kernel,
    float8_divides_the_model,
    gradient_precision,
    nvme_needs_stage_3_and_path,
    gds_needs_a_gpu,
    buckets_are_even,
    nvme_keeps_optimizer_states_only,
    gradients_are_reduced_as_the_stage_can,
    recomputation_is_one,
    tiles_run_as_blocks_do,
    offloaded_inputs_are_recomputed_from,
    offloaded_states_are_fp32,
    muon_keeps_its_states,
    ema_is_in_memory,
)
