"""Attention by blocks of queries, and the document mask in the form of each kernel, against the dense formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.config.schema import ModelSection
from megalm.model.attention_kernels import (
    AttentionMask,
    ScoreRule,
    blockwise_attention,
    dense_attention,
    flex,
    flex_blocks,
    fused_attention,
)
from megalm.model.model_config import build_model_config
from megalm.model.transformer import LanguageModel, initialize

BATCH, HEADS, WIDTH = 2, 4, 16
GROUPS = (1, 2)  # query heads that share a key/value head
# One token; less than a block; a block and one; several; a length whose probabilities are recomputed.
LENGTHS = (1, 100, 129, 512, 1100)


def _inputs(length: int, dtype: torch.dtype, groups: int = 1) -> list[Tensor]:
    """Query, key, value and an outer gradient, [B, N or K, T, D], strided as projections leave them."""
    torch.manual_seed(length)
    heads = (HEADS, HEADS // groups, HEADS // groups, HEADS)
    return [torch.randn(BATCH, length, count, WIDTH, dtype=dtype).transpose(1, 2) for count in heads]


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula, with each key/value head repeated for the query heads that share it."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


def _documents(length: int) -> Tensor:
    """[B, T] three documents in the first sample, one in the second; borders inside of blocks."""
    documents = torch.zeros(BATCH, length, dtype=torch.int32)
    documents[0, length // 3 :] = 1
    documents[0, 2 * length // 3 :] = 2
    return documents


def _with_gradients(attend: object, inputs: list[Tensor], sinks: Tensor | None = None) -> list[Tensor]:
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs[:3])
    leaves = [query, key, value] if sinks is None else [query, key, value, sinks.requires_grad_()]
    mixed = attend(query, key, value)  # type: ignore[operator]
    return [mixed, *torch.autograd.grad(mixed, leaves, inputs[3])]


PLAIN = ScoreRule(WIDTH**-0.5)
RULES = {
    "plain": PLAIN,
    "window in a block": ScoreRule(0.3, window=5),
    "window over blocks": ScoreRule(0.3, window=150),
    "window of one": ScoreRule(0.3, window=1),
    "soft cap": ScoreRule(0.3, softcap=1.5),
    "soft cap, window": ScoreRule(0.3, softcap=1.5, window=130),
}


def _seen(rule: ScoreRule, length: int, documents: Tensor | None) -> Tensor:
    """[B or 1, 1, T, T] by comparing all pairs."""
    place = torch.arange(length)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < (rule.window or length))
    if documents is None:
        return seen[None, None]
    return (seen & (documents[:, :, None] == documents[:, None, :]))[:, None]


@pytest.mark.parametrize(("length", "groups"), [*((length, 1) for length in LENGTHS), (129, 2), (1100, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_equal_the_dense_formula(length: int, masked: bool, groups: int) -> None:
    """In fp64, where both round at 1e-16: what remains would be another formula."""
    documents = _documents(length) if masked else None
    inputs = _inputs(length, torch.float64, groups)
    expected = _with_gradients(lambda q, k, v: _dense(q, k, v, _seen(PLAIN, length, documents)), inputs)
    found = _with_gradients(lambda q, k, v: blockwise_attention(q, k, v, documents, PLAIN), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
@pytest.mark.usefixtures("flex_on_cpu")
def test_blocks_follow_every_rule(rule: ScoreRule, sink: bool, masked: bool) -> None:
    """The CPU's blocks and flex attention, against the formula over all pairs; key/value heads are shared.

    Flex attention computes in fp32 at most; its mask is the formula's, and its blocks are those of every pair.
    """
    length, documents = 384, _documents(384)
    which = documents if masked else None
    sinks = torch.linspace(-1, 2, HEADS, dtype=torch.float64) if sink else None
    dense, inputs = _seen(rule, length, which), _inputs(length, torch.float64, groups=2)
    expected = _with_gradients(lambda q, k, v: dense_attention(q, k, v, rule, dense, sinks), inputs, sinks)
    found = _with_gradients(lambda q, k, v: blockwise_attention(q, k, v, which, rule, sinks), inputs, sinks)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    blocks = flex_blocks(documents, which, rule.window)
    narrow, narrow_sinks = [x.float() for x in inputs], None if sinks is None else sinks.detach().float()
    found = _with_gradients(lambda q, k, v: flex(q, k, v, rule, blocks, narrow_sinks), narrow, narrow_sinks)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    known = create_block_mask(blocks.mask_mod, BATCH if masked else None, None, length, length, "cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(blocks, name), getattr(known, name)), name


@pytest.mark.parametrize("groups", GROUPS)
def test_blocks_in_bf16_are_as_near_as_the_fused_kernel(groups: int) -> None:
    """Both round probabilities to bf16, 2^-9 apart; an accumulation in bf16 would be several times further off."""
    inputs = _inputs(512, torch.bfloat16, groups)
    exact = _with_gradients(_dense, [x.double() for x in inputs])
    blocks = _with_gradients(lambda q, k, v: blockwise_attention(q, k, v, None, PLAIN), inputs)
    for one, other in zip(blocks, exact, strict=True):
        assert (one.double() - other).norm() < 8e-3 * other.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("groups", GROUPS)
def test_flash_attention_shares_keys_and_values(groups: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's flash kernel has the same switch: it gets keys and values as they are, and both ways are equal."""
    shapes = []
    kernel = functional.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        shapes.append(key.shape[1])
        return kernel(query, key, *rest, **options)

    inputs = [x.to(device) for x in _inputs(300, torch.bfloat16, groups)]
    exact = _with_gradients(_dense, [x.double() for x in inputs])
    monkeypatch.setattr(functional, "scaled_dot_product_attention", seen)
    for flash in (False, True):
        monkeypatch.setattr("megalm.model.attention_kernels._has_flash_attention", lambda _, flash=flash: flash)
        found = _with_gradients(lambda q, k, v: fused_attention(q, k, v, is_causal=True), inputs)
        for one, other in zip(found, exact, strict=True):
            assert (one.double() - other).norm() < 8e-3 * other.norm()
    assert shapes == [HEADS, HEADS // groups]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way through the model: flex attention by torch's own plain formula, which a CPU has for both passes.

    torch refuses the backward pass on a CPU because its CPU *kernel* has none.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(
        "megalm.model.transformer.attention_mask",
        lambda shape, length, device, documents: AttentionMask(
            documents,
            {window: flex_blocks(torch.empty(1, length), documents, window) for window in map(shape.window, range(9))},
        ),
    )
    monkeypatch.setattr("megalm.model.attention_kernels._compiled_flex_attention", lambda: flex_attention)


@pytest.mark.parametrize("length", [300, 512])
@pytest.mark.usefixtures("flex_on_cpu")
def test_flex_mask_is_the_dense_one(length: int) -> None:
    documents = _documents(length)
    inputs = _inputs(length, torch.float32)
    dense = _seen(PLAIN, length, documents)
    expected = _with_gradients(
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=dense), inputs
    )
    found = _with_gradients(
        lambda q, k, v: flex_attention(q, k, v, block_mask=flex_blocks(documents, documents)), inputs
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_compiled_model_with_flex_attention_is_the_one_on_a_cpu(request: pytest.FixtureRequest) -> None:
    """Losses and gradients of batches whose documents differ; one graph serves all blocks and batches."""
    length, vocabulary = 200, 53
    section = ModelSection(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    shape = build_model_config(section, vocabulary, length)
    model = LanguageModel(shape)
    initialize(model, shape, seed=1)
    batches = []
    for seed in range(3):
        tokens = torch.randint(0, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(seed))
        documents = (torch.arange(length) >= 60 + 30 * seed).int().expand(BATCH, length)
        batches.append((tokens, documents))
    expected = [_loss_and_gradients(model, *batch) for batch in batches]

    request.getfixturevalue("flex_on_cpu")
    counter = CompileCounterWithBackend("aot_eager")  # the plain formula: inductor has a GPU's kernels only
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(dynamic=False, fullgraph=True, backend=counter)
    for batch, (loss, gradients) in zip(batches, expected, strict=True):
        found_loss, found = _loss_and_gradients(model, *batch)
        torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0.0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    (graph,) = counter.graphs
    assert "flex_attention" in str(graph.graph)
    assert "repeat_interleave" not in str(graph.graph)


def _loss_and_gradients(model: LanguageModel, tokens: Tensor, documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = model(tokens, tokens, documents)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_flex_blocks_are_those_of_every_pair_of_tokens() -> None:
    """No more blocks than needed, none that must be there left out, and whole ones known as whole."""
    length = 128 * 9
    documents = _documents(length)
    found = flex_blocks(documents, documents)
    expected = create_block_mask(found.mask_mod, BATCH, None, length, length, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert found.full_kv_num_blocks is not None
    assert expected.full_kv_num_blocks is not None
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
    assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)


def test_flex_blocks_need_no_square() -> None:
    with _Largest() as largest:
        flex_blocks(_documents(4096), _documents(4096))
    assert largest.elements <= BATCH * 4096


@pytest.mark.gpu
def test_flex_gradients_equal_the_dense_formula() -> None:
    documents = _documents(300).cuda()
    inputs = [x.cuda() for x in _inputs(300, torch.float32)]
    mask, blocks = _seen(PLAIN, 300, documents.cpu()).cuda(), flex_blocks(documents, documents)
    expected = _with_gradients(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), inputs)
    compiled = torch.compile(flex_attention, dynamic=False)
    found = _with_gradients(lambda q, k, v: compiled(q, k, v, block_mask=blocks), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)  # TF32 products


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_square_exists_under_a_document_mask() -> None:
    """Forward and backward of 2,048 tokens hold an eighth of the square of scores at once, and no [T, T] mask."""
    length = 2048
    inputs = _inputs(length, torch.float32)
    with _Largest() as largest:
        _with_gradients(lambda q, k, v: blockwise_attention(q, k, v, _documents(length), PLAIN), inputs)
    assert largest.elements <= BATCH * HEADS * length * length // 8
