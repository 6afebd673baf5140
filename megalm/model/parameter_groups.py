"""Which parameters share the optimizer's settings, and which do not train: no torch, so that the plan knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from megalm.config.schema import ParameterGroup
from megalm.model.model_config import ModelConfig, is_stacked

# How a group's parameters are updated, and what the optimizer keeps for each of them beside its fp32 master.
Algorithm = Literal["adam", "muon", "frozen"]
MomentKind = Literal["exp_avg", "exp_avg_sq", "momentum_buffer"]
# (algorithm, hidden) of a group -> the factor of its learning rate to the schedule's.
RateScales = Mapping[tuple[Algorithm, bool], float]
MOMENTS: dict[Algorithm, tuple[MomentKind, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
    "frozen": (),
}


class GroupKey(NamedTuple):
    """Names an optimizer group; the keys' order is that of the groups, on every rank.

    Attributes:
        rule: index in train.parameter_groups; -1: no pattern matches.
        undecayed: the run's weight decay does not act on the group; false where the rule sets its own.
        algorithm: how the group is updated; frozen: not at all, the optimizer does not know its parameters.
        hidden: matrices of the blocks, whose learning rate follows the width.
        experts: of expert groups, whose states fewer ranks divide.
    """

    rule: int
    undecayed: bool
    algorithm: Algorithm = "adam"
    hidden: bool = False
    experts: bool = False

    @property
    def frozen(self) -> bool:
        return self.algorithm == "frozen"


NO_GROUP = GroupKey(-1, undecayed=True)  # of a pipeline stage of which nothing trains


def group_keys(
    dimensions: Mapping[str, int],
    rules: Sequence[ParameterGroup],
    decay_embeddings: bool,
    muon: bool = False,
    width_multiplier: float = 1.0,
    divides_experts: bool = False,
) -> dict[str, GroupKey]:
    """Return canonical name -> the group that the parameter belongs to: that of the first rule that matches.

    Unless the rule sets it, matrices decay, embeddings do if `decay_embeddings`, norms and biases do not.

    Args:
        dimensions: canonical name -> number of dimensions of the whole parameter.
        muon: the matrices of the blocks, each expert's too, are Muon's; embeddings, head, norms and biases stay Adam's.
        width_multiplier: of the model; other than 1, the matrices of the blocks have groups of their own.
        divides_experts: ranks divide the experts of a layer, which have groups of their own.
    """
    keys = {}
    for name, count in dimensions.items():
        rule = next((index for index, rule in enumerate(rules) if fnmatchcase(name, rule.match)), -1)
        decays = count >= 2 and (decay_embeddings or not name.startswith("embedding."))
        sets_its_own = rule >= 0 and rules[rule].weight_decay is not None
        if rule >= 0 and rules[rule].frozen:
            keys[name] = GroupKey(rule, False, "frozen")
            continue
        in_block = count == 2 and name.startswith("layers.")
        algorithm: Algorithm = "muon" if muon and (in_block or is_stacked(name)) else "adam"
        follows_width, is_divided = in_block and width_multiplier != 1, divides_experts and is_stacked(name)
        keys[name] = GroupKey(rule, not (decays or sets_its_own), algorithm, follows_width, is_divided)
    return keys


def optimizer_groups(keys: Mapping[str, GroupKey]) -> dict[GroupKey, list[str]]:
    """Return the groups, the frozen ones too, in their order, each with its names in the given order."""
    found: dict[GroupKey, list[str]] = {}
    for name, key in keys.items():
        found.setdefault(key, []).append(name)
    return dict(sorted(found.items()))


def frozen_parameters(shape: ModelConfig, rules: Sequence[ParameterGroup]) -> frozenset[str]:
    """Return the canonical names of the parameters that do not train."""
    if not any(rule.frozen for rule in rules):
        return frozenset()
    keys = group_keys({name: len(size) for name, size in shape.parameters().items()}, rules, True)
    return frozenset(name for name, key in keys.items() if key.frozen)


def group_settings(
    key: GroupKey, rules: Sequence[ParameterGroup], weight_decay: float, rate_scales: RateScales
) -> dict[str, float]:
    """Return a group's weight decay and the factor of its learning rate.

    Args:
        weight_decay: of the run's optimizer.
        rate_scales: of `planning/resolve.py:OptimizerFacts.rate_scales`.
    """
    rule = rules[key.rule] if key.rule >= 0 else None
    decay = 0.0 if key.undecayed else weight_decay
    scale = 0.0 if key.frozen else rate_scales[key.algorithm, key.hidden]
    if rule is None:
        return {"weight_decay": decay, "learning_rate_scale": scale}
    own = decay if rule.weight_decay is None else rule.weight_decay
    return {"weight_decay": own, "learning_rate_scale": scale * rule.learning_rate_scale}
