"""The optimizer that DeepSpeed is given: which parameters decay, and which implementation steps them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megalm.config.schema import OptimizerStateKind
from megalm.engine.cpp_extensions import load_cpu_adam
from megalm.engine.optimizer.low_precision_adam import LowPrecisionAdam
from megalm.model.layer_factory import shard_of
from megalm.planning.resolve import OptimizerFacts


def parameter_groups(model: nn.Module, weight_decay: float, decay_embeddings: bool) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices decay, norms and biases do not, embeddings do if `decay_embeddings`.

    ZeRO 3 has flattened the parameters: their annotations know their shapes.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        embedding = name.startswith("embedding.")
        groups[len(shard_of(parameter).shape) >= 2 and (decay_embeddings or not embedding)].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
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
