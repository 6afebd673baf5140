"""The optimizer that DeepSpeed is given: its groups of parameters, and which implementation steps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megalm.config.schema import OptimizerStateKind, TrainSection
from megalm.engine.cpp_extensions import load_cpu_adam
from megalm.engine.optimizer.low_precision_adam import LowPrecisionAdam
from megalm.model.model_config import ModelConfig
from megalm.model.parameter_groups import MOMENTS, group_keys, group_settings, groups_of
from megalm.planning.resolve import OptimizerFacts


def parameter_groups(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    shape: ModelConfig,
    weight_decay: float,
    train: TrainSection,
) -> list[dict[str, Any]]:
    """Return optimizer groups with their settings and their moments' names; freeze the frozen ones.

    All ranks have the same groups: DeepSpeed sums the gradient norm over the stages of a pipeline group by group. Where
    a stage holds no parameter of a group, `model` gets one of a single element, which nothing computes with.

    Args:
        parameters: of this rank, by canonical name.
    """
    dimensions = {name: len(size) for name, size in shape.parameters().items()}
    keys = group_keys(dimensions, train.parameter_groups, train.embedding_weight_decay)
    groups: list[dict[str, Any]] = []
    for key, names in groups_of(keys).items():
        held = [parameters[name] for name in names if name in parameters]
        if key.frozen:
            for parameter in held:
                parameter.requires_grad_(False)
            continue
        if not held:
            some = next(iter(parameters.values()))
            held = [nn.Parameter(torch.zeros(1, dtype=some.dtype, device=some.device))]
            model.register_parameter(f"in_place_of_group_{len(groups)}", held[0])
        settings = group_settings(key, train.parameter_groups, weight_decay)
        groups.append({"params": held, "moments": MOMENTS[key.algorithm], **settings})
    return groups


def build_optimizer(
    groups: list[dict[str, Any]], facts: OptimizerFacts, states: OptimizerStateKind, offload: bool
) -> torch.optim.Optimizer:
    """Return torch's fused Adam(W), which needs no compiler; with `offload`, DeepSpeed's CPUAdam, built on first use.

    With `states` other than fp32 it is megalm's own. The engine sets the learning rate before every step, so the value
    given here is never used.
    """
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
    if states != "fp32":
        from deepspeed.runtime.zero import utils

        if LowPrecisionAdam not in utils.ZERO_SUPPORTED_OPTIMIZERS:
            utils.ZERO_SUPPORTED_OPTIMIZERS.append(LowPrecisionAdam)
        return LowPrecisionAdam(groups, states, facts.betas, facts.epsilon, decoupled=facts.kind == "adamw")
    optimizer = torch.optim.AdamW if facts.kind == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=0.0, betas=facts.betas, eps=facts.epsilon, fused=True)
