"""The optimizer that DeepSpeed is given: which parameters decay, and which implementation steps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megalm.config.schema import OptimizerStateKind, ParameterGroup
from megalm.engine.cpp_extensions import load_cpu_adam
from megalm.engine.optimizer.low_precision_adam import LowPrecisionAdam
from megalm.model.layer_factory import shard_of
from megalm.model.parameter_groups import MOMENTS, group_keys, group_settings, optimizer_groups
from megalm.planning.resolve import OptimizerFacts


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_embeddings: bool, rules: Sequence[ParameterGroup] = ()
) -> list[dict[str, Any]]:
    """Return optimizer groups with their weight decay, the factor of their learning rate, and their moments' names.

    ZeRO 3 has flattened the parameters: their annotations know their shapes.

    Args:
        rules: train.parameter_groups.
    """
    parameters = dict(model.named_parameters())
    dimensions = {name: len(shard_of(parameter).shape) for name, parameter in parameters.items()}
    groups = optimizer_groups(group_keys(dimensions, rules, decay_embeddings))
    return [
        {
            "params": [parameters[name] for name in names],
            "moments": MOMENTS[key.algorithm],
            **group_settings(key, rules, weight_decay),
        }
        for key, names in groups.items()
    ]


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
