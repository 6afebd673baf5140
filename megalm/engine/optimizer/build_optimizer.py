"""The optimizer that DeepSpeed is given: its groups of parameters, and which implementation steps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
