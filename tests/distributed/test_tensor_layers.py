"""Sharded layers against their dense equivalents: outputs and every gradient, on 2 and 4 ranks.

Tolerance: fp32 sums in another order, 6e-8 a rounding. Gradients of gains and key biases are sums of some thousand
addends that nearly cancel, and are up to 3e-5 of their largest value off, everything else less than 1e-6. A wrong sum
is off by a quarter or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.config.schema import ModelSection
from megalm.model.attention import Attention
from megalm.model.layer_factory import LayerFactory, RouterLosses, shard_of
from megalm.model.loss import IGNORE
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.model.modules import DropoutClock
from megalm.model.moe import MixtureOfExperts
from megalm.model.recomputation import KEEP_ALL, Recomputation
from megalm.model.transformer import MLP, Embedding, LanguageModel, LanguageModelHead, initialize
from megalm.parallel.process_groups import AxisGroup, make_groups
from megalm.parallel.sharded_linear import TensorProducts
from megalm.parallel.tensor_parallel import TensorLayers
from megalm.topology import Topology
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

VOCAB, HIDDEN, LENGTH, BATCH = 131, 32, 24, 3  # 131: shares of unequal size
TOLERANCE = 1e-4
# A rank scales its part of a divided row: other float8 numbers, 2^-4 of each at most, in a sum of some hundred.
TOLERANCES = {"float8 mlp": 0.06, "compiled float8 mlp": 0.06, "float8 training": 0.02}
CLOCK = DropoutClock(seed=0)


def shape(style: str, key_value_heads: int, vocab_size: int = VOCAB, **choices: Any) -> ModelConfig:
    section = ModelSection(
        style=style,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        **{"qk_norm": True, **choices},
    )
    return build_model_config(section, vocab_size, LENGTH)


class Lab:
    """Runs a dense module and its sharded twin on the same numbers.

    Args:
        stream: how the residual stream lies on the group: whole, or this rank's slice of the sequence.
        chunks: of the tokens whose communication and products run at the same time.

    Attributes:
        batch: number of samples.
        compiled: the sharded twin is one graph, run as it is.
    """

    def __init__(self, group: AxisGroup, sequence: bool, chunks: int = 1) -> None:
        self.group, self.sequence, self.chunks = group, sequence, chunks
        self.batch = BATCH
        self.compiled = False
        self.use(float8=False)

    def use(self, float8: bool) -> None:
        self.dense = LayerFactory(CLOCK, float8=float8)
        self.sharded: LayerFactory = TensorLayers(CLOCK, TensorProducts(self.group, self.sequence, float8, self.chunks))

    def stream(self, whole: Tensor) -> Tensor:
        if not self.sequence:
            return whole
        length = whole.shape[1] // self.group.size
        return whole.narrow(1, self.group.index * length, length)

    def twins(self, make: Callable[[LayerFactory], nn.Module], sizes: ModelConfig) -> tuple[nn.Module, nn.Module]:
        dense, sharded = make(self.dense), make(self.sharded)
        for module in (dense, sharded):
            initialize(module, sizes, seed=1)
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:  # biases and gains that are not all alike
                    whole = torch.randn(shard_of(parameter).shape, generator=seeded(name))
                    parameter.data.add_(shard_of(parameter).cut(whole))
        return dense, sharded

    def compare_gradients(self, dense: nn.Module, sharded: nn.Module) -> dict[str, float]:
        whole = dict(dense.named_parameters())
        assert whole.keys() == dict(sharded.named_parameters()).keys()
        return {
            name: difference(parameter.grad, shard_of(parameter).cut(whole[name].grad), whole[name].grad)
            for name, parameter in sharded.named_parameters()
        }

    def compare(self, make: Callable[[LayerFactory], nn.Module], sizes: ModelConfig, *rest: Any) -> dict[str, float]:
        """A module from the stream to the stream: differences of output, input gradient and parameter gradients."""
        dense, sharded = self.twins(make, sizes)
        size = self.batch, LENGTH, HIDDEN
        hidden, outer = (torch.randn(size, generator=seeded(name)) for name in ("hidden", "outer"))
        whole, part = hidden.clone().requires_grad_(), self.stream(hidden).clone().requires_grad_()
        if self.compiled:
            sharded.compile(dynamic=False, fullgraph=True, backend="aot_eager")  # refuses graph breaks
        expected, found = dense(whole, *rest), sharded(part, *rest)
        expected.backward(outer)
        found.backward(self.stream(outer))
        return {
            "output": difference(found, self.stream(expected), expected),
            "input gradient": difference(part.grad, self.stream(whole.grad), whole.grad),
            **self.compare_gradients(dense, sharded),
        }


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def difference(found: Tensor | None, expected: Tensor, whole: Tensor) -> float:
    """Largest difference, as a part of the largest value anywhere."""
    assert found is not None
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / whole.abs().max().clamp(min=1e-3))


COMPOSED = {"qk_norm": "whole", "attention_sinks": True, "attn_logit_softcapping": 1.0, "sliding_window": 5}
COMPOSED |= {"norm_zero_centered": True, "qkv_bias": True, "attention_output_bias": False}


def _attention(lab: Lab, style: str, key_value_heads: int, **choices: Any) -> dict[str, float]:
    sizes = shape(style, key_value_heads, **choices)
    return lab.compare(lambda layers: Attention(sizes, layers, None, CLOCK, 1), sizes, None)


def _mlp(lab: Lab, style: str) -> dict[str, float]:
    sizes = shape(style, 4)
    return lab.compare(lambda layers: MLP(sizes, layers), sizes)


def _experts(lab: Lab, **choices: Any) -> dict[str, float]:
    """With the gradients of the router's own losses; the dense twin counts tokens as the ranks do."""
    sizes = shape("llama", 4, num_experts=4, moe_intermediate_size=16, num_shared_experts=1, **choices)

    def make(layers: LayerFactory) -> nn.Module:
        layers.router_losses = RouterLosses(balance=0.5, z=0.1)
        layer = MixtureOfExperts(sizes, layers, MLP(sizes, layers, 16))
        layer.losses_factor = 3.0
        return layer

    return lab.compare(make, sizes)


def _mlp_of_one_sample(lab: Lab, style: str) -> dict[str, float]:
    """Its positions are divided, and so lie apart in the whole sequence."""
    lab.batch = 1
    return _mlp(lab, style)


def _compiled(lab: Lab, check: Callable[[Lab], dict[str, float]]) -> dict[str, float]:
    lab.compiled = True
    torch._dynamo.reset()
    return check(lab)


class _Columns(nn.Module):
    """Two column layers of one input, whose outputs a rank holds in part."""

    def __init__(self, layers: LayerFactory) -> None:
        super().__init__()
        self.project = layers.projection()
        self.gate, self.up = (layers.column(HIDDEN, 64, False, parts=64) for _ in range(2))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.project(hidden, self.gate, self.up)


def _float8_columns(lab: Lab) -> dict[str, float]:
    """Outputs and weight gradients, whose rows are whole on a rank and have the scales of the undivided layer."""
    lab.use(float8=True)
    dense, sharded = lab.twins(_Columns, shape("llama", 4))
    hidden, outer = (torch.randn(BATCH, LENGTH, size, generator=seeded(str(size))) for size in (HIDDEN, 64))
    part = slice(lab.group.index * 64 // lab.group.size, (lab.group.index + 1) * 64 // lab.group.size)
    outputs = dense(hidden), sharded(lab.stream(hidden).requires_grad_())
    torch.autograd.backward(outputs[0], [outer, outer])
    torch.autograd.backward(outputs[1], [outer[..., part], outer[..., part]])
    found = {"output": max(difference(o, e[..., part], e) for e, o in zip(*outputs, strict=True))}
    return found | lab.compare_gradients(dense, sharded)


def _float8_mlp(lab: Lab) -> dict[str, float]:
    lab.use(float8=True)
    return _mlp(lab, "llama")


def _float8_training(lab: Lab) -> dict[str, float]:
    """Nats between the losses of a group in float8 and of one rank in fp32, the most in 24 steps."""
    factories = lab.dense, TensorLayers(CLOCK, TensorProducts(lab.group, lab.sequence, float8=True))
    sizes = shape("llama", 4)
    losses = []
    for layers in factories:
        model = LanguageModel(sizes, layers, CLOCK, chunk_tokens=40)
        initialize(model, sizes, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator = seeded("training")
        for _ in range(24):
            start = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
            tokens = (start + torch.arange(LENGTH + 1)) % VOCAB
            optimizer.zero_grad()
            loss, targets = model(tokens[:, :-1], tokens[:, 1:])
            (loss / targets).backward()
            optimizer.step()
            losses.append(loss.item() / int(targets))
    plain, rounded = losses[:24], losses[24:]
    assert plain[-1] < plain[0] - 1
    return {"nats apart": max(abs(a - b) for a, b in zip(plain, rounded, strict=True))}


def _embedding(lab: Lab, documents: bool) -> dict[str, float]:
    sizes = shape("gpt2", 4)
    dense, sharded = lab.twins(lambda layers: Embedding(sizes, layers), sizes)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=seeded("tokens"))
    numbers = (torch.arange(LENGTH) // 7).expand(BATCH, LENGTH).contiguous() if documents else None
    outer = torch.randn(BATCH, LENGTH, HIDDEN, generator=seeded("outer"))
    expected, found = dense(tokens, numbers), sharded(tokens, numbers)
    expected.backward(outer)
    found.backward(lab.stream(outer))
    assert torch.equal(found, lab.stream(expected))  # a sum of one row and of zeros
    return lab.compare_gradients(dense, sharded)


def _loss(lab: Lab, vocab_size: int, scale: float, softcap: float | None = None) -> dict[str, float]:
    """Loss, its gradients and the logits; `scale` makes logits so large that exp of them overflows."""

    def make(layers: LayerFactory) -> nn.Module:
        layers.z_loss = 0.1 if softcap else 0.0
        return LanguageModelHead(layers.vocabulary_weight(vocab_size, HIDDEN), layers.output(vocab_size, softcap), 10)

    dense, sharded = lab.twins(make, shape("llama", 4, vocab_size))
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, generator=seeded("hidden")) * scale
    labels = torch.randint(0, vocab_size, (BATCH, LENGTH), generator=seeded("labels"))
    labels[:, ::5] = IGNORE
    labels[0] = IGNORE  # a chunk without any target
    whole, part = hidden.clone().requires_grad_(), lab.stream(hidden).clone().requires_grad_()
    (expected, targets), (found, counted) = dense(whole, labels), sharded(part, labels)
    expected.backward()
    found.backward()
    assert targets == counted
    positions = torch.tensor([0, 11, LENGTH - 1])
    with torch.no_grad():
        logits, found_logits = dense(hidden, None, positions), sharded(lab.stream(hidden), None, positions)
        evaluated, _ = sharded(lab.stream(hidden), labels)
    assert found_logits.shape == (BATCH, vocab_size)
    return {
        "loss": difference(found, expected, expected),
        "loss without gradients": difference(evaluated, expected, expected),
        "logits": difference(found_logits, logits, logits),
        "hidden gradient": difference(part.grad, lab.stream(whole.grad), whole.grad),
        **lab.compare_gradients(dense, sharded),
    }


def _model(lab: Lab, style: str, key_value_heads: int, recomputation: Recomputation = KEEP_ALL) -> dict[str, float]:
    sizes = shape(style, key_value_heads)

    dense = LanguageModel(sizes, lab.dense, CLOCK, chunk_tokens=40)
    sharded = LanguageModel(sizes, lab.sharded, CLOCK, chunk_tokens=40, recomputation=recomputation)
    for model in (dense, sharded):
        initialize(model, sizes, seed=1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=seeded("tokens"))
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=seeded("labels"))
    documents = (torch.arange(LENGTH) // 7).expand(BATCH, LENGTH).contiguous()
    (expected, _), (found, _) = dense(tokens, labels, documents), sharded(tokens, labels, documents)
    expected.backward()
    found.backward()
    whole = dict(dense.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter.data, shard_of(parameter).cut(whole[name].data)), name  # initial weights
    return {"loss": difference(found, expected, expected), **lab.compare_gradients(dense, sharded)}


CHECKS: dict[str, Callable[[Lab], dict[str, float]]] = {
    **{
        f"attention {style}, {heads} kv": lambda lab, style=style, heads=heads: _attention(lab, style, heads)
        for style, heads in (("gpt2", 4), ("llama", 4), ("llama", 2), ("llama", 1))
    },
    "attention composed, 2 kv": lambda lab: _attention(lab, "llama", 2, **COMPOSED),
    "attention composed, 1 kv": lambda lab: _attention(lab, "gpt2", 1, **COMPOSED),
    **{f"mlp {style}": lambda lab, style=style: _mlp(lab, style) for style in ("gpt2", "llama")},
    "experts": _experts,
    "experts, not gated": lambda lab: _experts(lab, gated_mlp=False, router_scores="sigmoid"),
    "mlp gpt2, one sample": lambda lab: _mlp_of_one_sample(lab, "gpt2"),
    "mlp llama, one sample": lambda lab: _mlp_of_one_sample(lab, "llama"),
    "float8 columns": _float8_columns,
    "float8 mlp": _float8_mlp,
    "float8 training": _float8_training,
    "embedding": lambda lab: _embedding(lab, documents=False),
    "embedding of documents": lambda lab: _embedding(lab, documents=True),
    "loss": lambda lab: _loss(lab, VOCAB, 1.0),
    "loss, even vocabulary": lambda lab: _loss(lab, 128, 1.0),
    "loss, one row a rank": lambda lab: _loss(lab, lab.group.size + 1, 1.0),
    "loss, large logits": lambda lab: _loss(lab, VOCAB, 1e4),
    "loss, soft cap and z-loss": lambda lab: _loss(lab, VOCAB, 10.0, softcap=2.0),
    "model gpt2": lambda lab: _model(lab, "gpt2", 4),
    "model llama, 2 kv": lambda lab: _model(lab, "llama", 2),
    "model llama, 1 kv, recomputed": lambda lab: _model(lab, "llama", 1, Recomputation(every=1)),
    "model gpt2, tiles": lambda lab: _model(lab, "gpt2", 4, Recomputation("full", mlp_chunk_tokens=10)),
    "compiled attention gpt2, 1 kv": lambda lab: _compiled(lab, lambda lab: _attention(lab, "gpt2", 1)),
    "compiled float8 mlp": lambda lab: _compiled(lab, _float8_mlp),
}
CHUNKS = 2  # of three samples, or of the positions of one
Check = tuple[int, str, bool, int]


def _is_tried(size: int, name: str, chunks: int) -> bool:
    if name.startswith("compiled"):
        return (size, chunks) == (2, CHUNKS)  # torch's compiler takes seconds to load
    return chunks == 1 or name.startswith(("attention", "mlp", "model", "float8 columns", "float8 mlp"))


ALL_CHECKS: list[Check] = [
    (size, name, sequence, chunks)
    for size in (2, 4)
    for name in CHECKS
    for sequence in (False, True)
    for chunks in (1, CHUNKS)
    if _is_tried(size, name, chunks)
]


def _run_checks(comm: Any, device: torch.device) -> dict[Check, dict[str, float]]:
    groups = make_groups(Topology(comm.size, tensor=comm.size), comm.rank, comm.timeout)
    return {check: CHECKS[check[1]](Lab(groups.tensor, *check[2:])) for check in ALL_CHECKS if check[0] == comm.size}


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[Check, dict[str, float]]]]:
    return {size: run_ranks(size, _run_checks) for size in (2, 4)}


@pytest.mark.parametrize(
    "check",
    ALL_CHECKS,
    ids=lambda check: f"{check[1]}, {'in slices' if check[2] else 'whole'}, {check[3]} chunks, {check[0]} ranks",
)
def test_sharded_equals_dense(results: dict[int, Any], check: Check) -> None:
    size, name, *_ = check
    for rank, found in enumerate(results[size]):
        for what, value in found[check].items():
            assert value < TOLERANCES.get(name, TOLERANCE), (rank, what, value)
