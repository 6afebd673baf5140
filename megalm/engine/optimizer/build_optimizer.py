"""The optimizer that DeepSpeed is given: its groups of parameters, which implementation steps them, and how DeepSpeed
reads the norm of its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import pg_utils
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megalm.engine.cpp_extensions import load_cpu_adam
from megalm.engine.optimizer.low_precision_adam import LowPrecisionAdam
from megalm.engine.optimizer.muon import Muon
from megalm.model.layer_factory import shard_of
from megalm.model.parameter_groups import MOMENTS, NO_GROUP, group_keys, group_settings, optimizer_groups
from megalm.planning.resolve import ResolvedRun


def parameter_groups(model: nn.Module, run: ResolvedRun, width_multiplier: float) -> list[dict[str, Any]]:
    """Return optimizer groups with their weight decay, the factor of their learning rate, and their moments' names.

    Takes the gradient from parameters that are frozen: they are in no group. ZeRO 3 has flattened the parameters: their
    annotations know their shapes.
    """
    train, optimizer = run.config.train, run.optimizer
    rules = train.parameter_groups
    scales = optimizer.rate_scales(run.schedule.peak_learning_rate, width_multiplier)
    parameters = dict(model.named_parameters())
    dimensions = {name: len(shard_of(parameter).shape) for name, parameter in parameters.items()}
    uses_muon = optimizer.muon is not None
    divides_experts = run.topology.expert > 1
    keys = group_keys(dimensions, rules, train.embedding_weight_decay, uses_muon, width_multiplier, divides_experts)
    for name, key in keys.items():
        parameters[name].requires_grad_(not key.frozen)
    return [
        {
            "params": [parameters[name] for name in names],
            "moments": MOMENTS[key.algorithm],
            "experts": key.experts,
            **group_settings(key, rules, optimizer.weight_decay, scales),
        }
        for key, names in optimizer_groups(keys).items()
        if not key.frozen
    ]


def group_without_parameters(model: nn.Module) -> dict[str, Any]:
    """Return a group for a pipeline stage of which nothing trains: one element of `model` that nothing computes with.

    Neither torch nor DeepSpeed has an optimizer without parameters.
    """
    some = next(model.parameters())
    model.no_parameter = nn.Parameter(torch.zeros(1, dtype=some.dtype, device=some.device))
    settings = group_settings(NO_GROUP, (), 0.0, {(NO_GROUP.algorithm, NO_GROUP.hidden): 1.0})
    return {"params": [model.no_parameter], "moments": MOMENTS[NO_GROUP.algorithm], "experts": False, **settings}


def build_optimizer(groups: list[dict[str, Any]], run: ResolvedRun, offload: bool) -> torch.optim.Optimizer:
    """Return torch's fused Adam(W), which needs no compiler; with `offload`, DeepSpeed's CPUAdam, built on first use.

    Muon, and Adam with states other than fp32, are megalm's own. The engine sets the learning rate before every step,
    so the value given here is never used.
    """
    facts, states = run.optimizer, run.config.train.optimizer_state
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_cpu_adam()
        return DeepSpeedCPUAdam(
            groups,
            lr=0.0,
            betas=facts.betas,
            eps=facts.epsilon,
            adamw_mode=facts.kind == "adamw",
            fp32_optimizer_states=True,
        )
    if facts.muon is not None:
        _allow_under_zero(Muon)
        return Muon(groups, facts, torch.float32 if run.precision == "fp32" else torch.bfloat16)
    if states != "fp32":
        _allow_under_zero(LowPrecisionAdam)
        return LowPrecisionAdam(groups, states, facts.betas, facts.epsilon, decoupled=facts.kind == "adamw")
    optimizer = torch.optim.AdamW if facts.kind == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=0.0, betas=facts.betas, eps=facts.epsilon, fused=True)


def _allow_under_zero(kind: type[torch.optim.Optimizer]) -> None:
    from deepspeed.runtime.zero import utils

    if kind not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)


class _FillOnDevice(TorchFunctionMode):
    """Fills the tensor of `torch.tensor(number, device=...)` there: a copy from the host would wait for the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tensor and isinstance(args[0], float):
            return torch.full((), args[0], **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@functools.cache
def read_norm_once() -> None:
    """Let DeepSpeed's optimizers read the global gradient norm from the device once a step.

    They read it again wherever they compare it: is it valid, does it clip, for each parameter group. From here on they
    compare a copy on the host. A norm that is not finite says that gradients overflowed; DeepSpeed's own search for
    such gradients, with a reading of its own, comes to the same result and is left out.
    """
    DeepSpeedZeroOptimizer.scaled_global_norm = _summed_once(DeepSpeedZeroOptimizer.scaled_global_norm)
    for owner, name in (
        (DeepSpeedZeroOptimizer, "scaled_global_norm"),
        (DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups"),
        (bf16_optimizer, "get_global_norm_of_tensors"),
    ):
        setattr(owner, name, _norm_on_host(getattr(owner, name)))
    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.check_overflow = functools.wraps(optimizer.check_overflow)(lambda *_, **__: None)


def _summed_once(norm_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DeepSpeed's norm of ZeRO 1 and 2 with one sum over the ranks of a model's copy, not one for each parameter group.

    Stages of a pipeline may have other groups, and would wait for each other for ever.
    """

    @functools.wraps(norm_of)
    def norm(optimizer: Any, *args: Any, **options: Any) -> Tensor:
        if not pg_utils.is_parallel(optimizer.model_parallel_group):
            return norm_of(optimizer, *args, **options)
        reduce = optimizer._model_parallel_all_reduce
        optimizer._model_parallel_all_reduce = lambda **_: None
        try:
            square = norm_of(optimizer, *args, **options).square()  # infinite if a gradient is not finite
        finally:
            del optimizer._model_parallel_all_reduce
        reduce(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()

    return norm


def _norm_on_host(norm_of: Callable[..., Tensor | list[Tensor]]) -> Callable[..., Tensor]:
    @functools.wraps(norm_of)
    def read(*args: Any, **options: Any) -> Tensor:
        if options.get("input_tensors") == []:  # of a rank whose parameters are frozen, or other ranks' as well
            options["input_tensors"] = [torch.zeros(1)]
        with _FillOnDevice():
            norm = norm_of(*args, **options)
        return (torch.stack(norm) if isinstance(norm, list) else norm).cpu()

    return read
