"""Rules of the DeepSpeed JSON; see run_checks.py.

DeepSpeed 0.19.8 runs several of the refused combinations without a message and trains something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, choose_precision
from megalm.config.deepspeed.json_schema import DeepSpeedSettings, Precision, ZeroSection
from megalm.config.loading import LoadedConfig, value_of
from megalm.config.schema import Recompute, RunConfig
from megalm.config.validation import leaf_fields, shown
from megalm.errors import ConfigError, MegalmError
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

    def is_given(self, key: str) -> bool:
        """Whether a person set this key of the run configuration, not a preset."""
        return key in self.loaded.explicit_keys

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


# Yields one line for each problem, and may raise another one.
Rule = Callable[[CheckContext], Iterator[str]]
# A key, what it does, the key without which that has no effect, and a value of that.
Need = tuple[str, str, str, str]


def broken_by(rule: Rule, case: CheckContext) -> Iterator[MegalmError]:
    """Yield what breaks a rule."""
    try:
        for line in rule(case):
            yield ConfigError(line)
    except MegalmError as error:
        yield error


def unmet(config: RunConfig, needs: Iterable[Need]) -> Iterator[str]:
    """Yield a line for each key that is set without the key that it needs."""
    for key, does, other, use in needs:
        value, default, there = value_of(config, key), leaf_fields(RunConfig)[key].default, value_of(config, other)
        is_set = value not in (default, ()) and (value is not False or default is True)
        if is_set and there is not True and there in (None, False, 1):
            given = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else shown(value)
            yield f"{key}={given} {does}, but {other}={shown(there)}; use {other}={use}, or remove {key}"


# --- the DeepSpeed JSON -----------------------------------------------------------------------------------------------


def one_learning_rate(case: CheckContext) -> Iterator[str]:
    given, key = case.settings.peak_learning_rate, "schedule.peak_learning_rate"
    if given is not None and case.is_given(key):
        peak, source = case.config.schedule.peak_learning_rate, case.loaded.sources[key]
        yield (f"{given[0]}={given[1]:g} ({case.ds.path}) and {key}={peak:g} ({source}) set the same value; remove one")


def precision_can_be_had(case: CheckContext) -> Iterator[str]:
    settings, device, path, precision = case.settings, case.device, case.ds.path, case.precision
    if settings.fp16.enabled is True and settings.bf16.enabled is True:
        yield f"{path}: fp16.enabled and bf16.enabled are both true; keep one"
    if settings.bf16.enabled is True and device.kind == "cuda" and not device.bf16:
        yield f'{path}: bf16.enabled=true, but this device has no bf16; use "auto", fp16 or fp32'
    if precision == "fp16" and device.kind == "cpu" and os.environ.get(ALLOW_CPU_FP16) != "1":
        yield (
            f"{path}: fp16.enabled=true, but fp16 is a thousand times slower on a CPU; use bf16 or fp32, plan for a "
            f"GPU with --gpu NAME, or set {ALLOW_CPU_FP16}=1 for a test"
        )
    for key, chosen in (
        ("data_types.grad_accum_dtype", settings.data_types.grad_accum_dtype),
        ("communication_data_type", settings.communication_data_type),
    ):
        if chosen is not None and chosen not in (precision, "fp32"):
            yield f"{path}: {key}={chosen} cannot hold gradients of {precision}; use fp32"


_FLOAT8_MULTIPLE = 16  # of both dimensions of a float8 product's factors


def float8_fits(case: CheckContext) -> Iterator[str]:
    """The kernel that scales rows needs a GPU of capability 8.9 and gives bf16; a CPU emulates it in any type."""
    if not case.config.precision.float8:
        return
    on_gpu, key = case.device.kind == "cuda", "precision.float8=true"
    if on_gpu and not case.device.float8:
        yield (
            f"{key} needs a GPU of capability 8.9 or later (L4, L40S, RTX 4090, H100 and newer), but "
            f"{case.device.name or 'this GPU'} multiplies no float8; remove it"
        )
    elif on_gpu and case.precision != "bf16":
        yield (
            f"{key} needs bf16, the result of its products, but the precision is {case.precision} ({case.ds.path}); "
            "set bf16.enabled=true, or remove it"
        )
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
            yield (
                f"{key}: {name} is {size}, not a multiple of {_FLOAT8_MULTIPLE}, as float8 products need; change it or "
                "remove precision.float8"
            )
            return


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


def states_on_nvme(case: CheckContext) -> Iterator[str]:
    """Only the optimizer's states lie on a disk, in ZeRO 3."""
    offload, path = case.zero.offload_optimizer, case.ds.path
    if case.zero.parameter_device == "nvme":
        yield (
            f"{path}: offload_param.device=nvme is not tested; use cpu there, and nvme for offload_optimizer, which is "
            "six times as large"
        )
    if offload is None or offload.device != "nvme":
        return
    here = f"{path}: offload_optimizer"
    if case.zero.stage != 3:
        yield (f"{here}.device=nvme needs zero_optimization.stage 3, but the stage is {case.zero.stage}; use cpu")
    elif offload.nvme_path is None:
        yield f"{here}.device=nvme needs offload_optimizer.nvme_path, a folder on that disk"
    for name in ("pipeline_read", "pipeline_write"):
        if getattr(offload, name):
            yield f"{here}.{name}=true is not tested; remove it"
    if offload.buffer_count < _STATES_AND_GRADIENT:
        yield (
            f"{here}.buffer_count={offload.buffer_count} is too small for a master, its moments and its gradient; use "
            f"{_STATES_AND_GRADIENT} or more"
        )
    if case.config.checkpoint.asynchronous:
        yield (
            f"checkpoint.async=true needs a copy in memory of the state that {path} keeps on disk "
            "(offload_optimizer.device=nvme); remove one of them"
        )
    if (decay := case.config.train.ema_decay) is not None:
        yield (
            f"train.ema_decay={decay:g} averages weights that offload_optimizer.device=nvme ({path}) keeps on the "
            "disk; use offload_optimizer.device=cpu, or remove train.ema_decay"
        )


def zero_sizes_can_be_had(case: CheckContext) -> Iterator[str]:
    size, path = case.zero.allgather_bucket_size, case.ds.path
    if case.settings.aio is not None and case.settings.aio.use_gds and case.device.kind == "cpu":
        yield f"{path}: aio.use_gds=true needs a GPU, but this device is a CPU; remove it"
    if case.zero.stage in (1, 2) and size % 2:
        yield f"{path}: zero_optimization.allgather_bucket_size={size} is odd; use {size + 1}"


def gradients_are_reduced_as_the_stage_can(case: CheckContext) -> Iterator[str]:
    wanted, stage = case.config.train.reduce_gradients, case.zero.stage
    why = ""
    if wanted == "step" and stage == 3:
        why = "ZeRO 3 keeps no whole gradients; use stage 2"
    elif wanted == "step" and stage == 2 and case.zero.optimizer_device != "none":
        why = "offload_optimizer keeps no whole gradients on the device; remove one of them"
    elif wanted == "micro_batch" and stage < 2:
        why = f"stage {stage} reduces gradients once a step; remove the key, or use stage 2"
    if why:
        yield f"train.reduce_gradients={wanted} with zero_optimization.stage={stage} ({case.ds.path}): {why}"


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


def recomputation_is_one(case: CheckContext) -> Iterator[str]:
    config, train, zero = case.config, case.config.train, case.zero
    kind, every, chunk = train.recompute, train.checkpoint_activations_every, train.mlp_chunk_tokens
    if kind != "none" and every:
        yield (
            f"train.recompute={kind} and train.checkpoint_activations_every={every} both choose what the backward pass "
            "recomputes; remove one of them (train.recompute=full is every block)"
        )
    elif kind != "auto" and (why := no_recomputation(kind, config, case.device, zero)):
        yield f"train.recompute={kind} with {why}"
    if chunk is not None and is_divided(config, zero) and runs_compiled(config, case.device, zero):
        yield f"train.mlp_chunk_tokens={chunk} with compiled blocks: {_HALVES}; set compile=false"
    if train.offload_activations and kind != "full" and not every:
        yield (
            f"train.offload_activations=true with train.recompute={kind}: inputs of blocks that are recomputed whole "
            "are offloaded, and here none is; set train.recompute=full"
        )


def states_are_those_of_the_optimizer(case: CheckContext) -> Iterator[str]:
    states, path, muon = case.config.train.optimizer_state, case.ds.path, 'optimizer.type="Muon"'
    if states != "fp32" and case.zero.optimizer_device != "none":
        yield (
            f"train.optimizer_state={states} with offload_optimizer ({path}): DeepSpeed's CPU Adam keeps its moments "
            "in fp32; remove one of them"
        )
    if case.settings.uses_muon and states != "fp32":
        yield (
            f"train.optimizer_state={states} with {muon} ({path}): it shortens Adam's moments only, and Muon has half "
            "of them; remove train.optimizer_state"
        )
    elif case.settings.uses_muon and case.zero.optimizer_device != "none":
        yield (
            f"{path}: offload_optimizer with {muon}: DeepSpeed's CPU Adam updates offloaded states, and the CPU is too "
            "slow to orthogonalise matrices; remove offload_optimizer, or use AdamW"
        )


DEEPSPEED_RULES: tuple[Rule, ...] = (
    one_learning_rate,
    precision_can_be_had,
    float8_fits,
    states_on_nvme,
    zero_sizes_can_be_had,
    gradients_are_reduced_as_the_stage_can,
    recomputation_is_one,
    states_are_those_of_the_optimizer,
)
