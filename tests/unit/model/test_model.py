"""Loss, masks, dropout, recomputation and initial weights of the plain model."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.config.schema import ModelSection, Recompute
from megalm.model.activation_offload import OffloadedInputs
from megalm.model.layer_factory import LayerFactory
from megalm.model.loss import IGNORE, LogitRule, chunk_loss, linear_cross_entropy
from megalm.model.model_config import ModelConfig, build_model_config, completed_settings, model_settings
from megalm.model.modules import DropoutClock
from megalm.model.recomputation import Recomputation
from megalm.model.transformer import LanguageModel, initialize

VOCAB, LENGTH = 53, 16
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SECTIONS = {
    "gpt2": ModelSection(style="gpt2", **SIZES),
    "llama": ModelSection(style="llama", qk_norm=True, num_key_value_heads=2, **SIZES),
    "llama-tied": ModelSection(style="llama", tie_word_embeddings=True, **SIZES),
    "gemma-like": ModelSection(
        norm_placement="both",
        norm_zero_centered=True,
        qk_norm="whole",
        sliding_window=3,
        full_attention_layers=2,
        rope_local_theta=100.0,
        attention_sinks=True,
        attn_logit_softcapping=2.0,
        embedding_scale=3.0,
        num_key_value_heads=2,
        **SIZES,
    ),
    "deepseek-like": ModelSection(
        num_experts=4,
        moe_intermediate_size=16,
        num_shared_experts=1,
        num_dense_layers=1,
        router_scores="sigmoid",
        **SIZES,
    ),
    "neox-like": ModelSection(
        style="gpt2",
        norm_placement="post",
        parallel_residual=True,
        position_embedding_type="rope",
        partial_rotary_factor=0.34,
        no_rope_layers=(1,),
        hidden_act="relu2",
        qkv_bias=False,
        **SIZES,
    ),
}


FIRST_RELEASE = {
    *("style", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "rope_theta", "norm_epsilon"),
    *("qk_norm", "dropout", "attention_dropout", "initializer_range"),
}


def build(section: ModelSection, seed: int = 1, **options: Any) -> LanguageModel:
    shape = build_model_config(section, VOCAB, LENGTH)
    clock = DropoutClock(seed=9)
    model = LanguageModel(shape, LayerFactory(clock), clock, **options)
    initialize(model, shape, seed)
    return model


def batch(rows: int = 3, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    return tokens, torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))
def test_shape_tells_every_parameter(section: ModelSection) -> None:
    shape = build_model_config(section, VOCAB, LENGTH)
    found = {name: tuple(parameter.shape) for name, parameter in build(section).named_parameters()}
    assert found == shape.parameters()
    assert sum(math.prod(size) for size in found.values()) == shape.parameter_count()


@pytest.mark.parametrize("name", list(SECTIONS))
def test_settings_survive_json_and_earlier_releases(name: str) -> None:
    shape = build_model_config(SECTIONS[name], VOCAB, LENGTH)
    stored = json.loads(json.dumps(model_settings(shape)))
    assert TypeAdapter(ModelConfig).validate_python(completed_settings(stored)) == shape
    if name in ("gpt2", "llama", "llama-tied"):
        first_release = {key: stored[key] for key in stored if key in FIRST_RELEASE}
        assert TypeAdapter(ModelConfig).validate_python(completed_settings(first_release)) == shape


@pytest.mark.parametrize(("multiple", "entries"), [(None, VOCAB), (1, VOCAB), (8, 56), (VOCAB, VOCAB), (64, 64)])
def test_a_vocabulary_is_padded_to_a_multiple(multiple: int | None, entries: int) -> None:
    shape = build_model_config(ModelSection(vocab_multiple=multiple, **SIZES), VOCAB, LENGTH)
    assert shape.vocab_size == entries
    assert shape.parameters()["embedding.tokens.weight"][0] == entries


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunked_loss_is_cross_entropy(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, VOCAB, (50,), generator=generator)
    labels[::6] = IGNORE
    total = linear_cross_entropy(hidden, weight, labels, chunk)
    (total * 3.0).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    (expected * 3.0).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0], hidden.grad, rtol=1e-5, atol=1e-5)  # the softmax is in fp32
    torch.testing.assert_close(found[1], weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, chunk), total)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_capped_logits_and_z_loss_have_the_gradients_of_their_formulas(softcap: float | None, z_loss: float) -> None:
    """The z-loss is in the gradients alone. The softmax is in fp32."""
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(40, VOCAB, generator=generator).mul_(4).requires_grad_()
    labels = torch.randint(0, VOCAB, (40,), generator=generator)
    labels[::6] = IGNORE
    losses, found = chunk_loss(products.detach(), labels, True, LogitRule(softcap, z_loss))
    logits = products if softcap is None else softcap * torch.tanh(products / softcap)
    expected = functional.cross_entropy(logits, labels, reduction="none")
    penalty = logits.logsumexp(-1).square()[labels != IGNORE].sum() * z_loss
    (expected.sum() + penalty).backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, products.grad, rtol=1e-5, atol=1e-6)


def _head_gradients(device: str, dtype: torch.dtype, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden states and of the head's weight, of 512 tokens and 96 entries that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (512, 96))
    labels = torch.randint(0, 96, (512,), generator=generator).to(device)
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight / 8)]
    linear_cross_entropy(*leaves, labels, chunk).backward()
    return leaves[0].grad, leaves[1].grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk", [16, 128, 512])
def test_a_bf16_gradient_of_the_head_is_rounded_once(chunk: int, device: str) -> None:
    """The logits' gradient is rounded to bf16, 2^-9 of each, and so is the sum; a sum in bf16 is 7e-3 off at 16."""
    for found, exact in zip(
        _head_gradients(device, torch.bfloat16, chunk), _head_gradients("cpu", torch.float64, 512), strict=True
    ):
        assert (found.cpu().double() - exact).norm() < 4e-3 * exact.norm()


def test_a_gpu_adds_the_heads_gradient_in_one_product() -> None:
    """Looked at on torch's `meta`, which takes a GPU's way: no narrow product of a chunk beside the fp32 sum."""
    with Operations() as operations:
        _head_gradients("meta", torch.bfloat16, 128)
    assert operations.names.count("aten.addmm.dtype_out") == 4
    assert operations.names.count("aten.mm.default") == 4  # the logits
    assert operations.names.count("aten.mm.out") == 4  # the gradient of the hidden states


def test_loss_without_any_target_is_zero() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORE), 2)
    total.backward()
    assert total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))
def test_masked_documents_are_as_if_apart(section: ModelSection) -> None:
    """Three documents in one sample give the losses and the gradient that each gives alone.

    Gradients of a row add up terms of up to 8, whose rounding in fp32 is 1e-6; the tolerance is four of them.
    """
    tokens, labels = batch(rows=1)
    cuts = [0, 5, 6, LENGTH]
    documents = torch.zeros_like(tokens)
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        documents[0, start:stop] = number
    together, apart = build(section), build(section)
    loss, _ = together(tokens, labels, documents)
    loss.backward()
    for start, stop in itertools.pairwise(cuts):
        apart(tokens[:, start:stop], labels[:, start:stop])[0].backward()
    for (name, ours), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        if not name.endswith("positions.weight"):  # its unused rows have no gradient apart
            torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=4e-6, msg=lambda m, n=name: f"{n}: {m}")
    plain, _ = together(tokens, labels)
    assert not torch.allclose(plain, loss)


RECOMPUTATIONS = {
    "every block": Recomputation(every=1),
    "every 2nd block": Recomputation(every=2),
    **{kind: Recomputation(kind) for kind in get_args(Recompute) if kind != "none"},
}
DROPPING = {
    "gpt2": ModelSection(style="gpt2", dropout=0.3, attention_dropout=0.2, **SIZES),
    "llama": ModelSection(style="llama", dropout=0.3, qk_norm=True, num_key_value_heads=2, **SIZES),
}


def two_in_flight(model: LanguageModel) -> list[torch.Tensor]:
    """Gradients of two micro-batches, both of which run forward before the first runs backward, as in a pipeline."""
    tokens, labels = batch()
    losses = []
    for micro_batch in (0, 1):
        model.embedding.dropout.clock.micro_batch = micro_batch
        losses.append(model(tokens, labels)[0])
    for loss in losses:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("recomputation", RECOMPUTATIONS.values(), ids=list(RECOMPUTATIONS))
@pytest.mark.parametrize("section", DROPPING.values(), ids=list(DROPPING))
def test_recomputation_changes_no_bit(section: ModelSection, recomputation: Recomputation) -> None:
    """With dropout: each micro-batch draws its own masks again."""
    gradients = (two_in_flight(build(section, recomputation=it)) for it in (Recomputation(), recomputation))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


TILED = {name: it for name, it in RECOMPUTATIONS.items() if it.kind != "mlp"} | {"none": Recomputation()}


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("section", DROPPING.values(), ids=list(DROPPING))
def test_an_mlp_in_tiles_has_the_same_gradients(section: ModelSection, name: str) -> None:
    """fp32, within 1e-6 of a parameter's largest: a product of fewer rows may add in another order. The gradient of a
    bias of keys is 0 but for rounding."""
    chosen = TILED[name], replace(TILED[name], mlp_chunk_tokens=7)
    for expected, found in zip(*(two_in_flight(build(section, recomputation=it)) for it in chosen), strict=True):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-8


def test_gradients_of_tiles_are_added_up_in_fp32() -> None:
    """In bf16, with a tile for each token, they are as near to those of fp32 as without tiles."""
    gradients = []
    for dtype, chunk in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 1)):
        model = build(SECTIONS["llama"], recomputation=Recomputation(mlp_chunk_tokens=chunk)).to(dtype)
        model(*batch())[0].backward()
        found = [it.grad for it in model.layers[1].mlp.parameters()]
        assert {it.dtype for it in found} == {dtype}
        gradients.append(torch.cat([it.flatten() for it in found]).float())
    exact, plain, tiled = gradients
    assert (tiled - exact).norm() < 1.05 * (plain - exact).norm()


@pytest.mark.parametrize(("chunk", "most"), [(7, 7), (9, 8), (1000, 48)])
def test_of_an_mlp_in_tiles_one_tile_is_alive(chunk: int, most: int) -> None:
    """Of 48 tokens, in training and in validation; tiles are of one size."""
    model = build(SECTIONS["llama"], recomputation=Recomputation("full", mlp_chunk_tokens=chunk))
    inner = model.layers[0].mlp.up.out_features
    tokens, labels = batch()
    assert tokens.numel() == 48
    with Operations() as operations:
        model(tokens, labels)[0].backward()
    assert operations.most_rows(inner) == most
    with Operations() as operations, torch.no_grad():
        model.eval()(tokens, labels)
    assert operations.most_rows(inner) == most


def test_a_hook_sees_the_gradient_of_all_tiles() -> None:
    """Once, as tensor groups need it of norms; a frozen parameter has none."""
    model = build(SECTIONS["llama"], recomputation=Recomputation(mlp_chunk_tokens=7))
    seen = []
    weight = model.layers[0].mlp_norm.weight
    frozen = model.layers[0].mlp.up.weight.requires_grad_(False)
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    model(*batch())[0].backward()
    (gradient,) = seen
    assert torch.equal(gradient, weight.grad)
    assert frozen.grad is None


@pytest.mark.parametrize(
    ("recomputation", "graphs"),
    [(Recomputation("attention"), 2), (Recomputation("mlp"), 2), (Recomputation("full", mlp_chunk_tokens=12), 3)],
)
def test_compiled_halves_of_a_block_are_recomputed(recomputation: Recomputation, graphs: int) -> None:
    """Each half is one graph, which serves every block; the backward pass computes one of them again. A tile is one
    graph without gradients and one with them."""
    section = ModelSection(style="llama", dropout=0.2, num_key_value_heads=2, **SIZES)
    plain, compiled = build(section), build(section, recomputation=recomputation)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled.compile_blocks(fullgraph=True, backend=counter)
    tokens, labels = batch()
    losses = []
    for step in (1, 2):
        for model in (plain, compiled):
            model.embedding.dropout.clock.step = step
            loss, _ = model(tokens, labels)
            loss.backward()
            losses.append(loss.item())
    assert losses[::2] == losses[1::2]
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == graphs


def test_dropout_is_a_function_of_its_place() -> None:
    clock = DropoutClock(seed=1)
    layers = LayerFactory(clock)
    x = torch.ones(200, 50)
    first, other = layers.dropout(0.3, 1, "a", False), layers.dropout(0.3, 1, "b", False)
    once = first(x)
    assert torch.equal(once, first(x))
    assert not torch.equal(once, other(x))
    clock.step += 1
    assert not torch.equal(once, first(x))
    assert (once == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert once.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(first.eval()(x), x)


@pytest.mark.parametrize(
    ("style", "dropout", "every", "masked"),
    [("gpt2", 0.2, 1, False), ("llama", 0.2, 0, True), ("llama", 0.0, 1, False)],
)
def test_a_block_is_one_graph(style: str, dropout: float, every: int, masked: bool) -> None:
    """Norms, residuals, RoPE, SwiGLU and dropout compile together: `fullgraph` refuses a break, and one graph serves
    every block, step and micro-batch. What it computes is what the block computes, dropout's masks included."""
    section = ModelSection(style=style, dropout=dropout, num_key_value_heads=2, **SIZES)
    plain, compiled = (build(section, recomputation=Recomputation(every=every)) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for block in compiled.layers:
        block.compile(dynamic=False, fullgraph=True, backend=counter)
    tokens, labels = batch()
    documents = (torch.arange(LENGTH) >= 5).int().expand(len(tokens), LENGTH) if masked else None
    losses = []
    for step, micro_batch in ((1, 0), (1, 1), (2, 0)):
        for model in (plain, compiled):
            clock = model.embedding.dropout.clock
            clock.step, clock.micro_batch = step, micro_batch
            loss, _ = model(tokens, labels, documents)
            loss.backward()
            losses.append(loss.item())
    assert losses[::2] == losses[1::2]
    assert len(set(losses)) == (3 if dropout else 1)
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    assert counter.frame_count == 1


def test_dropout_draws_what_it_has_always_drawn() -> None:
    """A resumed run continues on the masks of the version that began it."""
    clock = DropoutClock(seed=1234, step=7, micro_batch=3)
    generator = torch.Generator().manual_seed(6062533019586588555)
    expected = torch.rand(4, 9, generator=generator) >= 0.5
    assert clock.seed_at("12/mlp_output") == 6062533019586588555
    assert torch.equal(LayerFactory(clock).dropout(0.5, 12, "mlp_output", False)(torch.ones(4, 9)) > 0, expected)


def test_initial_weights_depend_on_name_and_seed_only() -> None:
    one, again, other = build(SECTIONS["gpt2"]), build(SECTIONS["gpt2"]), build(SECTIONS["gpt2"], seed=2)
    deeper = build(ModelSection(style="gpt2", **(SIZES | {"num_hidden_layers": 3})))
    for (name, weight), same, changed in zip(
        one.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(weight, same)
        if weight.ndim > 1:
            assert not torch.equal(weight, changed), name
    name = "layers.1.attention.query.weight"
    assert torch.equal(one.get_parameter(name), deeper.get_parameter(name))


def test_residual_projections_start_smaller() -> None:
    shape = build_model_config(ModelSection(hidden_size=128, num_hidden_layers=8, num_attention_heads=4), 100, 8)
    model = LanguageModel(shape)
    initialize(model, shape, seed=1)
    assert model.get_parameter("layers.3.mlp.up.weight").std().item() == pytest.approx(0.02, rel=0.02)
    assert model.get_parameter("layers.3.mlp.down.weight").std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert model.get_parameter("layers.3.attention.output.weight").std().item() == pytest.approx(0.02 / 4, rel=0.02)


def test_logits_of_one_position_are_those_of_all() -> None:
    model = build(SECTIONS["llama"]).eval()
    tokens, _ = batch()
    positions = torch.tensor([3, 0, LENGTH - 1])
    expected = model(tokens)[torch.arange(3), positions]
    torch.testing.assert_close(model(tokens, positions=positions), expected)
    cut = model(tokens[:1, :4], positions=torch.tensor([3]))
    torch.testing.assert_close(cut, expected[:1], rtol=1e-5, atol=1e-6)


class Operations(TorchDispatchMode):
    """Remembers the operations, and on which devices tensors are made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()
        self._sizes: set[torch.Size] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        self.names.append(str(op))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.devices |= {tensor.device.type for tensor in tensors}
        self._sizes |= {tensor.shape for tensor in tensors if tensor.ndim > 2}  # no weights
        return made

    def most_rows(self, width: int) -> int:
        """The most rows of any activation of this width."""
        return max(size.numel() // width for size in self._sizes if size[-1] == width)


ON_META = [
    (name, recompute)
    for name in SECTIONS
    for recompute in (*get_args(Recompute), "tiles")
    if name != "gemma-like" and (name, recompute) != ("deepseek-like", "tiles")  # flex attention has no `meta`
]


@pytest.mark.parametrize(("name", "recompute"), ON_META)
def test_every_tensor_is_made_where_the_model_is(name: str, recompute: str) -> None:
    """Looked at on torch's `meta`: on a GPU, one that is made on the CPU is an error or a wait."""
    chosen = Recomputation(mlp_chunk_tokens=7) if recompute == "tiles" else Recomputation(recompute)
    dtype = torch.bfloat16 if name == "deepseek-like" else torch.float32  # a grouped product on `meta` takes no other
    model = build(SECTIONS[name], recomputation=chosen).to("meta", dtype).train()
    tokens, labels = (tensor.to("meta") for tensor in batch())
    with Operations() as operations:
        loss, _ = model(tokens, labels)
        loss.backward()
    assert operations.devices == {"meta"}


@pytest.mark.parametrize("recomputation", [Recomputation("full"), Recomputation(every=2, mlp_chunk_tokens=7)])
@pytest.mark.parametrize("section", DROPPING.values(), ids=list(DROPPING))
def test_offloaded_inputs_change_no_bit(section: ModelSection, recomputation: Recomputation) -> None:
    """In two steps, the second of which uses the first one's buffers, and of two micro-batches in flight."""
    inputs = OffloadedInputs(torch.device("cpu"))
    plain, offloaded = (
        build(section, recomputation=it) for it in (recomputation, replace(recomputation, inputs=inputs))
    )
    for _ in range(2):
        for one, other in zip(two_in_flight(plain), two_in_flight(offloaded), strict=True):
            assert torch.equal(one, other)
    (buffers,) = inputs._free.values()
    whole = len(plain.layers) if recomputation.kind == "full" else 1
    assert len(buffers) == 2 * whole


def test_an_offloaded_input_comes_back_one_block_ahead() -> None:
    """Before a block's backward pass begins, its own input is there, and the copy of the next one has begun; an earlier
    one is in the CPU's memory alone."""
    inputs = OffloadedInputs(torch.device("cpu"))
    section = ModelSection(style="llama", **(SIZES | {"num_hidden_layers": 4}))
    model = build(section, recomputation=Recomputation("full", inputs=inputs))
    kept: list[Any] = []
    keep, read = inputs._keep, inputs._read
    on_device = []

    def watched_keep(hidden: torch.Tensor) -> Any:
        kept.append(keep(hidden))
        return kept[-1]

    def watched_read(one: Any) -> torch.Tensor:
        tensor = read(one)
        on_device.append([other.device is not None for other in kept])
        return tensor

    inputs._keep, inputs._read = watched_keep, watched_read
    loss, _ = model(*batch())
    assert [one.device is not None for one in kept] == [False, False, False, True]
    loss.backward()
    assert on_device == [
        [False, False, True, False],
        [False, True, False, False],
        [True, False, False, False],
        [False] * 4,
    ]
