"""Attention of a context group against one rank in fp64: numbers, gradients, documents, shared key/value heads."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.config.deepspeed.json_schema import ZeroSection
from megalm.config.schema import ModelSection
from megalm.cost_model.memory import MemoryCase, estimate_memory
from megalm.model.attention_kernels import AttentionMask, ScoreRule, blockwise_attention, dense_attention
from megalm.model.layer_factory import WHOLE_SEQUENCE, AttentionInputs, LayerFactory
from megalm.model.model_config import build_model_config
from megalm.model.modules import DropoutClock
from megalm.model.transformer import LanguageModel, initialize
from megalm.parallel import ring_attention
from megalm.parallel.collectives import sum_over
from megalm.parallel.context_parallel import ExchangedSequence, RingSequence
from megalm.parallel.process_groups import AxisGroup, make_groups
from megalm.parallel.ring_attention import RingPlaces
from megalm.topology import Topology
from tests.live_memory import PeakMemory
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 48, 8
VOCABULARY = 256
METHODS = {"all_to_all": ExchangedSequence, "ring": RingSequence}
PLAIN = ScoreRule(WIDTH**-0.5)
RULES = {
    "plain": PLAIN,
    "scale and window": ScoreRule(0.4, window=11),
    "soft cap": ScoreRule(0.6, softcap=1.5),
    "sinks": PLAIN,
    "all": ScoreRule(0.6, softcap=1.5, window=19),
}
KEY_HEADS, TILES = (1, 2, 4), (1024, 5)  # a whole half of a rank's part, and several tiles, the last of them shorter
CASES = [
    (method, heads, documents, tile, rule)
    for method, heads, documents, tile, rule in itertools.product(METHODS, KEY_HEADS, (False, True), TILES, RULES)
    if method == "ring" or tile == TILES[0]
]


def _differences(comm: Any, device: torch.device) -> dict[Any, tuple[float, float]]:
    """Per case the largest difference of an output, and of a gradient."""
    group = make_groups(Topology(comm.size, context=comm.size), comm.rank, comm.timeout).context
    places = torch.arange(LENGTH)
    # One document begins in the middle of a rank's part; one token is alone: it sees nothing in most parts.
    documents = torch.stack((places // 10, (places > 17).long() + 7 * (places == 30) + 9 * (places > 30)))
    found = {}
    for case in CASES:
        method, heads, has_documents, ring_attention._TILE, name = case
        rule = RULES[name]
        generator = torch.Generator().manual_seed(heads)
        sizes = (HEADS, heads, heads, HEADS)
        *whole, weight = (torch.randn(BATCH, count, LENGTH, WIDTH, generator=generator) for count in sizes)
        if name in ("sinks", "all"):
            whole.append(torch.randn(HEADS, generator=generator))
        expected = [x.double().requires_grad_() for x in whole]
        seen = rule.seen(LENGTH, LENGTH, device).expand(BATCH, 1, LENGTH, LENGTH)
        if has_documents:
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        query, key, value, *sinks = expected
        right = dense_attention(query, key, value, rule, seen, sinks[0] if sinks else None)
        (right * weight).sum().backward()
        sequence = METHODS[method](group)
        held = sequence.positions(LENGTH // comm.size, device)
        own = [(x if x.ndim == 1 else x[:, :, held]).clone().requires_grad_() for x in whole]

        def plain(inputs: AttentionInputs, rule: ScoreRule = rule) -> Tensor:
            query, key, value, mask, sinks = inputs
            return blockwise_attention(query, key, value, mask.documents if mask else None, rule, sinks)

        mask = AttentionMask(documents, {}) if has_documents else None
        inputs = AttentionInputs(own[0], own[1], own[2], mask, own[3] if sinks else None)
        output = sequence.attend(plain, inputs, rule)
        (output * weight[:, :, held]).sum().backward()
        worst = 0.0
        for mine, whole_one in zip(own, expected, strict=True):
            assert mine.grad is not None
            assert whole_one.grad is not None
            if mine.ndim == 1:  # each rank has a part of it
                sum_over(mine.grad, group)
            right_grad = whole_one.grad if mine.ndim == 1 else whole_one.grad[:, :, held]
            worst = max(worst, float((mine.grad - right_grad).abs().max()))
        found[case] = float((output - right[:, :, held]).abs().max().detach()), worst
    return found


@pytest.fixture(scope="module", params=[2, 4])
def differences(request: pytest.FixtureRequest) -> list[dict[Any, tuple[float, float]]]:
    return run_ranks(request.param, _differences)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_one_rank(
    differences: list[dict[Any, tuple[float, float]]], method: str
) -> None:
    for rank in differences:
        for case, (output, gradient) in rank.items():
            if case[0] == method:
                assert output < 1e-6, case
                assert gradient < (3e-6 if case[-1] == "soft cap" else 2e-6), case


def _peaks(comm: Any, device: torch.device, section: ModelSection, length: int) -> dict[str, int]:
    """Per method the most bytes alive in a forward and a backward pass; of a rank without a group too."""
    group = make_groups(Topology(comm.size, context=comm.size), comm.rank, comm.timeout).context
    shape, clock = build_model_config(section, VOCABULARY, length), DropoutClock(seed=0)
    found = {}
    for method, sequence in {"whole": WHOLE_SEQUENCE, **{name: make(group) for name, make in METHODS.items()}}.items():
        model = LanguageModel(shape, LayerFactory(clock, sequence=sequence), clock, chunk_tokens=64).bfloat16()
        initialize(model, shape, seed=1)
        tokens = sequence.cut(torch.randint(0, VOCABULARY, (1, length)))
        with PeakMemory() as memory:
            model(tokens, tokens)[0].backward()
        found[method] = memory.peak
    return found


def test_the_planned_peak_is_what_is_alive() -> None:
    """Of a llama in bf16, whose activations fall with the parts of a sequence."""
    length = 1024
    section = ModelSection(
        style="llama", hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2
    )
    shape = build_model_config(section, VOCABULARY, length)
    gradients = 2 * shape.parameter_count()
    ranks = run_ranks(2, _peaks, section, length)
    for method in ("whole", *METHODS):
        case = MemoryCase(
            shape=shape,
            sequence_length=length,
            micro_batch=1,
            accumulation=2,
            precision="bf16",
            gradient_precision="fp32",
            communication_precision="fp32",
            zero=ZeroSection(stage=1),
            topology=Topology(2, context=1 if method == "whole" else 2),
            ring=method == "ring",
            loss_chunk_tokens=64,
            on_cpu=True,
        )
        plan = estimate_memory(case)
        planned = plan.activations + plan.loss + gradients
        for rank in ranks:
            # All gradients are added to the plan, of which some come after the peak.
            assert 0.95 <= planned / rank[method] <= 1.08, (method, planned, rank)


def test_every_rule_of_scores_is_compared() -> None:
    """A ring computes scores by itself: a rule that is new has its place there too."""
    for field in fields(ScoreRule):
        assert any(getattr(rule, field.name) != getattr(PLAIN, field.name) for rule in RULES.values()), field.name


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_divides_the_work_evenly(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """In each turn of the ring all ranks have as many scores to compute, and all pairs are met once."""
    monkeypatch.setattr(ring_attention, "_TILE", 5)
    length = 24
    met: set[tuple[int, int]] = set()
    for turn in range(ranks):
        work = set()
        for rank in range(ranks):
            places = RingPlaces(AxisGroup(tuple(range(ranks)), rank, None))  # type: ignore[arg-type]  # sends nothing
            source = (rank - turn) % ranks
            queries = places.positions(rank, length, torch.device("cpu"))
            keys = places.positions(source, length, torch.device("cpu"))
            own = 0
            for tile in places.tiles(source, length, None):
                assert queries[tile.queries][0] - keys[tile.keys][0] == tile.ahead
                seen = {(int(q), int(k)) for q in queries[tile.queries] for k in keys[tile.keys] if k <= q}
                assert not seen & met
                met |= seen
                own += len(seen)
            work.add(own)
        assert len(work) == 1
    assert met == {(query, key) for query in range(length * ranks) for key in range(query + 1)}
