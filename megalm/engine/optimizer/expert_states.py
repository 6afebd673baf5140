"""Lets DeepSpeed divide the states of experts over the ranks that hold the same ones, not over data x context.

DeepSpeed knows experts of its own layers. It recognises a parameter by attributes, an optimizer group by keys, and a
model by the type of some module; and it looks process groups up by a name. All of that is set here, so that gradients
of experts are summed over `ParallelGroups.expert_data` and divided by the number of data x context ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

from megalm.model.model_config import is_stacked
from megalm.parallel import collectives
from megalm.parallel.process_groups import AxisGroup, ParallelGroups


class ExpertMarker(AutoEPMoELayer):  # type: ignore[misc]  # DeepSpeed has no types
    """A module without parameters, by whose type DeepSpeed learns that a model has experts."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 0

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """The groups are ours."""


def mark_experts(module: nn.Module, path: str, groups: ParallelGroups) -> None:
    """Mark the experts' parameters of a module, which is at `path` in the model; before ZeRO 3 divides them."""
    name = _group_name(groups)
    for canonical, parameter in module.named_parameters(path):
        if is_stacked(canonical):
            marks: Any = parameter
            marks.allreduce, marks.group_name = False, name
            marks.ds_zero_placement_family, marks.ds_zero_partition_group_name = "autoep_expert", name
            marks.ds_zero_partition_process_group = groups.expert_data.process_group


def register_groups(model: nn.Module, weight_groups: list[dict[str, Any]], groups: ParallelGroups) -> None:
    """Tell DeepSpeed our groups, and mark the model and its optimizer groups; before the engine is built.

    DeepSpeed never forgets groups: those of an earlier engine are removed.
    """
    of_experts = [group for group in weight_groups if group["experts"]]
    for prefix in ("_EXPERT", "_EXPERT_DATA"):
        getattr(deepspeed_groups, f"{prefix}_PARALLEL_GROUP").clear()
        getattr(deepspeed_groups, f"{prefix}_PARALLEL_GROUP_RANKS").clear()
    if groups.expert.size == 1:
        return
    name = _group_name(groups)
    for prefix, group in (
        ("_EXPERT_PARALLEL_GROUP", groups.expert),
        ("_EXPERT_DATA_PARALLEL_GROUP", groups.expert_data),
    ):
        getattr(deepspeed_groups, prefix)[name] = group.process_group
        getattr(deepspeed_groups, f"{prefix}_RANKS")[name] = list(group.ranks)
    for weight_group in of_experts:
        weight_group |= {"moe": True, "name": name}
    if of_experts:  # not where they are frozen, or on another stage of a pipeline
        model.expert_marker = ExpertMarker()


def count_experts_once(optimizer: Any, expert: AxisGroup) -> None:
    """Let DeepSpeed's gradient norms count the experts of all ranks, each once, also where stages have other groups."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.get_grads_for_norm = _with_experts_summed(optimizer.get_grads_for_norm, expert)
        bf16_optimizer.get_norm_with_moe_layers = lambda norm, **_: norm
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        # It would leave out tensor groups, of which each rank has a part of each expert.
        optimizer._grad_norm_counts_every_rank = lambda *_: False
    else:  # ZeRO 1 and 2 have summed over data x context, which counts each expert once: a mean of equal norms
        optimizer._average_expert_grad_norms = lambda *_: None


def _with_experts_summed(gradients_of: Any, expert: AxisGroup) -> Any:
    """The gradients by whose norms BF16_Optimizer finds that of a copy of the model: one number for all experts here.

    It is summed over the stages and tensor groups like any other, in one message.
    """

    def gradients(for_clipping: bool = False) -> Any:
        if for_clipping:
            return gradients_of(for_clipping=True)
        others, of_experts = gradients_of()
        found: list[Tensor] = [gradient for each in of_experts.values() for gradient in each]
        if not found:
            return others, {}
        square = torch.stack([torch.linalg.vector_norm(it, dtype=torch.float32) for it in found]).square().sum()
        return [*others, collectives.sum_over(square, expert).sqrt()], {}

    return gradients


def _group_name(groups: ParallelGroups) -> str:
    return f"ep_size_{groups.expert.size}"  # DeepSpeed reads the number
