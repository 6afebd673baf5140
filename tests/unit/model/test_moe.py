"""Layers with experts compute what those of transformers and a plain loop over experts do. Tolerance: 1e-5 in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megalm.config.schema import ModelSection, Recompute
from megalm.engine.expert_loads import ExpertBiases
from megalm.engine.interface import RoutingStatistics
from megalm.model.layer_factory import LayerFactory, RouterLosses
from megalm.model.model_config import ModelConfig, build_model_config, flops_per_token
from megalm.model.modules import DropoutClock
from megalm.model.moe import STATISTICS, MixtureOfExperts
from megalm.model.recomputation import Recomputation
from megalm.model.transformer import MLP, LanguageModel, initial_weight, initialize
from megalm.train.console import ExpertWatch

VOCAB, LENGTH, BATCH = 61, 20, 3
BALANCE, Z = 0.5, 0.25
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_token": 2, "moe_intermediate_size": 12}
NAMES = {
    "embedding.tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "head.weight": "lm_head.weight",
    "layers.": "model.layers.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate.": "mlp.gate_proj.",
    "mlp.up.": "mlp.up_proj.",
    "mlp.down.": "mlp.down_proj.",
    "mlp.experts.down": "mlp.experts.down_proj",
    "mlp.router": "mlp.gate",
}


def build(section: ModelSection, recompute: Recompute = "none") -> tuple[ModelConfig, LanguageModel]:
    shape = build_model_config(section, VOCAB, LENGTH)
    layers = LayerFactory(DropoutClock(seed=0))
    layers.router_losses = RouterLosses(BALANCE, Z)
    model = LanguageModel(shape, layers, chunk_tokens=7, recomputation=Recomputation(recompute))
    initialize(model, shape, seed=3)
    for module in experts_of(model):
        module.losses_factor = 1.0
        module.statistics = torch.zeros(shape.num_experts + len(STATISTICS), dtype=torch.float64)
    return shape, model


def experts_of(model: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def theirs_of(weights: Callable[[str], Tensor], name: str) -> tuple[str, Tensor] | None:
    """The name and value in transformers of our parameter; None of a gate, which lies beside its up projection."""
    if name.endswith("experts.gate"):
        return None
    value = weights(name)
    if name.endswith("experts.up"):
        name, value = name.replace(".up", ".gate_up_proj"), torch.cat([weights(name.replace(".up", ".gate")), value], 1)
    for ours, other in NAMES.items():
        name = name.replace(ours, other)
    return name, value


def configurations() -> dict[str, tuple[ModelSection, Callable[[Any], nn.Module]]]:
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"max_position_embeddings": LENGTH, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    common["pad_token_id"] = None  # its embedding would not train
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "mixtral": (
            ModelSection(num_key_value_heads=2, **SIZES, **EXPERTS),
            lambda library: library.MixtralForCausalLM(
                library.MixtralConfig(num_key_value_heads=2, intermediate_size=12, num_local_experts=6, **common)
            ),
        ),
        "qwen3_moe": (
            ModelSection(
                num_key_value_heads=2, qk_norm=True, num_dense_layers=1, intermediate_size=24, **SIZES, **EXPERTS
            ),
            lambda library: library.Qwen3MoeForCausalLM(
                library.Qwen3MoeConfig(
                    num_key_value_heads=2,
                    intermediate_size=24,
                    moe_intermediate_size=12,
                    num_experts=6,
                    norm_topk_prob=True,
                    mlp_only_layers=[0],
                    head_dim=8,
                    **common,
                )
            ),
        ),
        "olmoe": (
            ModelSection(qk_norm="whole", norm_topk_prob=False, **SIZES, **EXPERTS),
            lambda library: library.OlmoeForCausalLM(
                library.OlmoeConfig(num_key_value_heads=4, intermediate_size=12, num_experts=6, **common)
            ),
        ),
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_logits_losses_and_gradients_are_those_of_transformers(family: str) -> None:
    library = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    section, make = configurations()[family]
    shape, model = build(section)
    theirs = make(library).eval()
    with torch.no_grad():
        found = dict(filter(None, (theirs_of(model.get_parameter, name) for name in shape.parameters())))
        assert found.keys() == dict(theirs.named_parameters()).keys()
        for name, value in found.items():
            theirs.get_parameter(name).copy_(value)
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    expected = theirs(tokens, output_router_logits=True)
    torch.testing.assert_close(model(tokens), expected.logits, rtol=0, atol=1e-5)
    cross_entropy = functional.cross_entropy(expected.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    routers = [logits.view(BATCH, LENGTH, -1) for logits in expected.router_logits if logits is not None]
    balance = [[load_balancing_loss_func((row,), 6, 2) for row in logits] for logits in routers]
    z = [logits.logsumexp(-1).square().mean(1).sum() for logits in routers]
    (cross_entropy + BALANCE * sum(map(sum, balance)) + Z * sum(z)).backward()
    for module in experts_of(model):
        module.statistics.zero_()
    loss, _ = model(tokens, labels)
    loss.backward()
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    for module, own_balance, own_z in zip(experts_of(model), balance, z, strict=True):
        assert module.statistics[-2:].tolist() == pytest.approx([sum(own_balance).item(), own_z.item()], rel=1e-5)
        assert module.statistics[:6].sum() == BATCH * LENGTH * 2
    for name in shape.parameters():
        pair = theirs_of(lambda ours: model.get_parameter(ours).grad, name)
        if pair is not None:
            gradient = theirs.get_parameter(pair[0]).grad
            assert (pair[1] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1), name


class Looped(nn.Module):
    """The same experts in a loop, each on the tokens that choose it."""

    def __init__(self, layer: MixtureOfExperts) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        experts, tokens = self.layer.experts, hidden.flatten(0, 1)
        routing = self.layer.router(hidden)
        chosen, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)
        result = torch.zeros_like(tokens)
        for number in range(len(experts.up)):
            for place in range(chosen.shape[1]):
                mine = (chosen[:, place] == number).nonzero().flatten()
                inner = tokens[mine] @ experts.up[number].t()
                inner = (
                    experts.activation(inner)
                    if experts.gate is None
                    else inner * experts.activation(tokens[mine] @ experts.gate[number].t())
                )
                output = inner @ experts.down[number].t() * weights[mine, place, None]
                result = result.index_add(0, mine, output)
        result = result.view_as(hidden)
        return result if self.layer.shared is None else result + self.layer.shared(hidden)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"router_scores": "sigmoid", "routed_scaling_factor": 2.5, "num_shared_experts": 2},
        {"gated_mlp": False, "hidden_act": "relu2", "norm_topk_prob": False},
    ],
    ids=["softmax", "as DeepSeek-V3", "not gated"],
)
@pytest.mark.parametrize("skewed", [False, True])
def test_the_grouped_product_is_a_loop_over_experts(choices: dict[str, Any], skewed: bool) -> None:
    shape = build_model_config(ModelSection(**SIZES, **EXPERTS | choices), VOCAB, LENGTH)
    layers = LayerFactory(DropoutClock(seed=0))
    shared = MLP(shape, layers, 24) if shape.num_shared_experts else None
    layer = MixtureOfExperts(shape, layers, shared)
    initialize(layer, shape, seed=2)
    hidden = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    if skewed:  # all tokens are sent to the same two experts, and none to the others
        with torch.no_grad():
            layer.router.weight.copy_(torch.linspace(-1, 1, 6)[:, None] * hidden.abs().mean(0).sign()[:1])
        hidden = hidden.detach().abs().requires_grad_()
    outer = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    results = []
    for module in (layer, Looped(layer)):
        output = module(hidden)
        layer.zero_grad()
        gradients = torch.autograd.grad(output, [hidden, *layer.parameters()], outer, materialize_grads=True)
        results.append([output, *gradients])
    if skewed:
        assert layer.router(hidden).counts().sum(0).count_nonzero() == 2
    for found, expected in zip(*results, strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def trained(model: LanguageModel) -> list[Tensor]:
    """The gradients of a micro-batch, and what its tokens were counted as."""
    tokens, labels = torch.randint(0, VOCAB, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    model(tokens, labels)[0].backward()
    counted = [module.statistics for module in experts_of(model)]
    return [*(parameter.grad for parameter in model.parameters()), *counted]


@pytest.mark.parametrize("recompute", [*get_args(Recompute), "compiled"])
def test_recomputation_changes_no_bit_and_counts_no_token_twice(recompute: Any) -> None:
    section = ModelSection(num_dense_layers=1, num_shared_experts=1, **SIZES, **EXPERTS)
    _, plain = build(section)
    _, other = build(section, "full" if recompute == "compiled" else recompute)
    if recompute == "compiled":
        torch._dynamo.reset()
        other.compile_blocks(backend="aot_eager")
    for found, expected in zip(trained(other), trained(plain), strict=True):
        assert torch.equal(found, expected)


def test_a_bias_chooses_experts_and_weighs_none_as_in_deepseek_v3() -> None:
    library = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    choices = {"router_scores": "sigmoid", "routed_scaling_factor": 2.5, "expert_bias": True}
    layer = MixtureOfExperts(
        build_model_config(ModelSection(**SIZES, **EXPERTS | choices), VOCAB, LENGTH),
        LayerFactory(DropoutClock(seed=0)),
        None,
    )
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1, norm_topk_prob=True
    )
    theirs = library.DeepseekV3TopkRouter(config)
    bias = torch.tensor([0.0, 0.9, -0.3, 0.2, 0.0, -2.0])
    with torch.no_grad():
        layer.router.weight.normal_(generator=torch.Generator().manual_seed(2))
        theirs.weight.copy_(layer.router.weight)
        theirs.e_score_correction_bias.copy_(bias)
    layer.router.expert_bias = bias
    hidden = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    routing = layer.router(hidden)
    _, weights, experts = theirs(hidden)

    def by_expert(experts: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(BATCH * LENGTH, 6).scatter(1, experts, weights)

    found = by_expert(routing.experts.flatten(0, 1), routing.weights.flatten(0, 1))
    torch.testing.assert_close(found, by_expert(experts, weights))
    assert not (found[:, 5] > 0).any(), "its bias is below all scores"
    layer.router.expert_bias = None
    assert (layer.router(hidden).experts != routing.experts).any()


def test_biases_that_follow_the_load_balance_it() -> None:
    shape, model = build(ModelSection(**SIZES, **EXPERTS, router_scores="sigmoid", expert_bias=True))
    biases = ExpertBiases(model, shape, torch.device("cpu"), rate=0.01, saves=True)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 64, 32, generator=generator) + torch.randn(32, generator=generator)
    fullest = []
    for _ in range(100):
        counts = [module.router(hidden).counts().sum(0) for module in experts_of(model)]
        fullest.append(max(float(load.max() / load.mean()) for load in counts))
        biases.follow(
            RoutingStatistics(shape.moe_layers, tuple(tuple(map(int, load)) for load in counts), 1.0, 2.0, 0.0)
        )
    assert fullest[0] > 2
    assert max(fullest[-10:]) < 1.2
    assert [fragment.key.name for fragment in biases.fragments()] == list(shape.expert_biases())


@pytest.mark.parametrize(("factor", "capacity"), [(0.5, 4), (1.0, 7), (1.2, 8), (3.0, 20)])
def test_an_expert_drops_what_a_sequence_has_beyond_its_capacity(factor: float, capacity: int) -> None:
    shape = build_model_config(ModelSection(**SIZES, **EXPERTS), VOCAB, LENGTH)
    layers = LayerFactory(DropoutClock(seed=0))
    layers.expert_capacity_factor = factor
    layer = MixtureOfExperts(shape, layers, None)
    initialize(layer, shape, seed=2)
    with torch.no_grad():
        layer.router.weight *= 10  # some experts are crowded
    hidden = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    layer.statistics = torch.zeros(6 + len(STATISTICS), dtype=torch.float64)
    found = layer(hidden)
    routing, dropped = layer.router(hidden), 0
    weights = routing.weights.detach().clone()
    for sequence in range(BATCH):
        taken = [0] * 6
        for token in range(LENGTH):
            for place, expert in enumerate(routing.experts[sequence, token].tolist()):
                taken[expert] += 1
                if taken[expert] > capacity:
                    weights[sequence, token, place] = 0
                    dropped += 1
    assert layer.statistics[6] == dropped
    assert (dropped > 0) == (factor < 2)
    assert layer.statistics[:6].sum() == BATCH * LENGTH * 2, "the load is that of all choices"
    chosen = routing.experts.flatten(0, 1), weights.flatten(0, 1)
    expected = layer.experts(hidden.flatten(0, 1), *chosen, routing.counts().sum(0)).view_as(hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    whole = layer.experts(hidden.flatten(0, 1), chosen[0], routing.weights.flatten(0, 1), routing.counts().sum(0))
    torch.testing.assert_close(layer.eval()(hidden), whole.view_as(hidden), rtol=0, atol=0)


def test_each_expert_has_an_initial_weight_of_its_own_name() -> None:
    shape = build_model_config(ModelSection(**SIZES, **EXPERTS), VOCAB, LENGTH)
    name = "layers.1.mlp.experts.down"
    whole = initial_weight(name, (6, 32, 12), shape, 7)
    assert torch.equal(whole[4], initial_weight(f"{name}.4", (32, 12), shape, 7))
    assert not torch.equal(whole[4], whole[5])
    assert float(whole.std()) == pytest.approx(0.2 / 2, rel=0.1)  # it writes to the residual stream
    assert float(initial_weight("layers.1.mlp.experts.up", (6, 12, 32), shape, 7).std()) == pytest.approx(0.2, rel=0.1)


def test_only_the_experts_of_a_token_count() -> None:
    shape = build_model_config(ModelSection(num_dense_layers=1, **SIZES, **EXPERTS), VOCAB, LENGTH)
    idle = 4 * 3 * 12 * 32  # four of six experts in one of two layers
    assert shape.parameter_count() - shape.active_parameter_count() == idle
    dense = build_model_config(ModelSection(intermediate_size=24, **SIZES), VOCAB, LENGTH)
    router, first = 6 * 32, 3 * 32 * (shape.intermediate_size - 24)  # the first layer's MLP is larger than two experts
    assert flops_per_token(shape, LENGTH) - flops_per_token(dense, LENGTH) == 6 * (router + first)


def test_the_watch_names_dead_and_overloaded_experts_when_they_change() -> None:
    watch = ExpertWatch(2)

    def add(step: int, *counts: tuple[int, ...]) -> Any:
        return watch.add(step, RoutingStatistics((1, 3), counts, 1.0, 2.0, 0.0), top=2)

    even, dead = (25,) * 8, (35, 30, 30, 30, 30, 30, 15, 0)
    full = (95, 15, 15, 15, 15, 15, 15, 15)
    assert add(1, even, even) == {}
    (found,) = add(2, even, even).values()
    assert (found["first_step"], found["last_step"]) == (1, 2)
    assert add(3, even, dead) == {}
    found, news = add(4, full, dead).values()
    assert (news["dead"], news["overloaded"]) == ([[3, 7]], [])
    assert found["load"]["1"][0] == pytest.approx((25 + 95) / 50)
    full = (196, 1, 1, 1, 0, 0, 0, 1)
    add(5, full, even), add(6, full, even)
    add(7, full, dead)
    found, news = add(8, full, dead).values()
    assert news["overloaded"] == [[1, 0]]
    assert [place for place in news["dead"] if place[0] == 3] == [[3, 7]]
    assert math.isclose(sum(found["load"]["1"]), 8)
    add(9, full, dead)
    assert list(add(10, full, dead)) == ["experts"]
