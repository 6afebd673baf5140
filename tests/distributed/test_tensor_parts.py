"""A tensor or context group at work: validation, sampling, dropout, recomputation, compiled blocks, bf16, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.config.schema import ModelSection
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.batch_loader import BatchLayout, ValidationLoader
from megalm.data.sampling.samples import ValidationSamples
from megalm.model.layer_factory import LayerFactory, shard_of
from megalm.model.model_config import build_model_config
from megalm.model.modules import DropoutClock
from megalm.model.transformer import Block, initialize
from megalm.parallel.context_parallel import ExchangedSequence, RingSequence
from megalm.parallel.process_groups import make_groups
from megalm.parallel.sharded_linear import TensorProducts
from megalm.parallel.tensor_parallel import TensorLayers
from megalm.topology import Topology
from tests.distributed.selection import selected
from tests.distributed.training import VOCAB, Case, Trace, make_dataset, start, steps
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

TENSOR, SEQUENCE = ("parallel.tensor=2",), ("parallel.tensor=2", "parallel.sequence=true")
CONTEXT, RING = ("parallel.context=2",), ("parallel.context=2", "parallel.context_method=ring")
OVERLAP = "parallel.overlap_tensor_communication=true"
DROPOUT = ("model.dropout=0.2", "model.attention_dropout=0.2")
NORMS, ATTENTION, MLP = (f"train.recompute={kind}" for kind in ("norms", "attention", "mlp"))
TILES = "train.mlp_chunk_tokens=100"
GPT2 = ("model.style=gpt2", "data.document_mask=true")
ONE_RANK = {
    "plain": Case("zero1.json"),
    "gpt2": Case("zero1.json", overrides=GPT2),
    "bf16": Case("zero1.json", "bf16"),
}
CASES = {
    "plain": Case("zero1.json", overrides=TENSOR),
    "sequence": Case("zero1.json", overrides=SEQUENCE),
    "context": Case("zero1.json", overrides=CONTEXT),
    "ring": Case("zero1.json", overrides=RING),
    "recomputed": Case("zero2.json", overrides=(*SEQUENCE, NORMS, OVERLAP)),
    "recomputed zero3": Case("zero3.json", overrides=(*TENSOR, NORMS, TILES, OVERLAP)),
    "recomputed context": Case("zero2.json", overrides=(*CONTEXT, ATTENTION, TILES)),
    "compiled": Case("zero1.json", overrides=(*TENSOR, "compile=true")),
    "compiled sequence": Case("zero2.json", overrides=(*SEQUENCE, "compile=true", OVERLAP)),
    "compiled context": Case("zero2.json", overrides=(*CONTEXT, "compile=true")),
    "compiled ring": Case("zero2.json", overrides=(*RING, "compile=true")),
    "bf16": Case("zero1.json", "bf16", (*TENSOR, OVERLAP)),
    "bf16 ring": Case("zero3.json", "bf16", RING),
    "bf16 sequence zero2": Case("zero2.json", "bf16", SEQUENCE),
    "bf16 sequence zero3": Case("zero3.json", "bf16", (*SEQUENCE, OVERLAP)),
    "gpt2": Case("zero1.json", overrides=(*GPT2, *SEQUENCE)),
    "gpt2 context": Case("zero1.json", overrides=(*GPT2, *CONTEXT)),
    "dropout": Case("zero1.json", overrides=(*TENSOR, *DROPOUT)),
    "dropout recomputed": Case("zero1.json", overrides=(*TENSOR, *DROPOUT, ATTENTION)),
    "dropout sequence": Case("zero1.json", overrides=(*SEQUENCE, *DROPOUT, OVERLAP)),
    "dropout context": Case("zero1.json", overrides=(*CONTEXT, *DROPOUT, "data.document_mask=true")),
    "dropout context recomputed": Case(
        "zero1.json", overrides=(*CONTEXT, *DROPOUT, "data.document_mask=true", ATTENTION)
    ),
    "dropout sequence recomputed": Case("zero1.json", overrides=(*SEQUENCE, *DROPOUT, MLP, OVERLAP)),
}
ASKED = ("plain", "sequence", "context", "ring", "gpt2", "gpt2 context")
# g++ compiles each graph; "compiled sequence" communicates in more places, "compiled context" within a graph
SLOW = ("compiled", "compiled ring")
STEPS = 3


class _Rows(TorchDispatchMode):
    """Remembers how many rows any operation gave of logits, or of anything else of one of these `widths`."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self._widths = widths
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] in self._widths:
            self.most = max(self.most, result.numel() // result.shape[-1])
        return result


def _train(
    comm: Any, device: torch.device, cases: dict[str, Case], prefix: Path, folder: Path
) -> dict[str, tuple[Trace, Any]]:
    """Per case the training, and what the engine says when it is asked, or how many graphs and breaks there were."""
    from torch._dynamo.utils import counters

    found = {}
    for name, case in cases.items():
        torch._dynamo.reset()
        counters.clear()
        engine, run, loader = start(comm, device, case, prefix, folder)
        trace = steps(engine, run, loader, 1, STEPS)
        compiled = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        found[name] = trace, _ask(engine, run, loader, prefix, comm) if name in ASKED else compiled
        if "zero3" not in name:
            _assert_replicas_are_equal(engine, comm)
        loader.close()
    return found


def _assert_replicas_are_equal(engine: Any, comm: Any) -> None:
    """What a whole parameter has become is the same on every rank of the group, bit for bit."""
    whole = {
        name: parameter.detach().float().numpy()
        for name, parameter in engine._engine.module.named_parameters()
        if shard_of(parameter).rectangle is None
    }
    is_divided = comm.size > engine._groups.topology.data_context
    assert 0 < len(whole) < len(list(engine._engine.module.parameters())) + (not is_divided)
    for other in comm.gather(whole):
        for name, values in whole.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def _ask(engine: Any, run: Any, loader: Any, prefix: Path, comm: Any) -> dict[str, Any]:
    samples = ValidationSamples(IndexedDataset(prefix), (196, 200), run.config.data.sequence_length)
    place = run.topology.coordinate(comm.rank)
    batches = ValidationLoader(samples, BatchLayout(16, run.batch.micro_batch, place.data, run.topology.data))
    tokens = np.random.default_rng(3).integers(0, VOCAB, size=(3, 13))  # an odd length: slices of it need padding
    with _Rows(VOCAB) as rows:
        logits = engine.next_token_logits(tokens, np.array([12, 0, 7]))
    return {
        "validation": [engine.evaluate(batch.micro_batches) for batch in batches],
        "logits": logits,
        "rows": rows.most,
        "training rows": _training_rows(engine, loader),
    }


def _training_rows(engine: Any, loader: Any) -> tuple[int, int]:
    """Rows as wide as the vocabulary, and as a rank's share of it, while a step is trained."""
    with _Rows(VOCAB) as whole, _Rows(VOCAB // 2, VOCAB // 2 + 1) as shares:
        engine.train_step(loader.batch(0), STEPS + 1, 1e-3)
    return whole.most, shares.most


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, tuple[Trace, Any]]]]:
    folder = tmp_path_factory.mktemp("tensor_parts")
    make_dataset(folder / "data")
    left_out = {*SLOW} - set(selected(request, "name"))
    cases = {1: ONE_RANK, 2: {name: case for name, case in CASES.items() if name not in left_out}}
    return {size: run_ranks(size, _train, cases[size], folder / "data", folder) for size in cases}


@pytest.mark.parametrize("name", ASKED)
def test_validation_and_logits_are_those_of_one_rank(found: dict[int, Any], name: str) -> None:
    expected = found[1][0]["gpt2" if name.startswith("gpt2") else "plain"][1]
    for rank in found[2]:
        answers = rank[name][1]
        np.testing.assert_allclose(answers["validation"], expected["validation"], rtol=1e-5)
        assert answers["logits"].shape == (3, VOCAB)
        np.testing.assert_allclose(answers["logits"], expected["logits"], atol=2e-4)  # weights differ by Adam's steps
        np.testing.assert_array_equal(answers["logits"], found[2][0][name][1]["logits"])  # the same on all ranks
        # The last position's alone; a whole head's weight, transposed, has 32 rows as wide.
        whole_head = name.endswith(("context", "ring"))
        assert answers["rows"] == (32 if whole_head else 3)
        # train.loss_chunk_tokens of this rank's share of the vocabulary, or of all of it
        assert answers["training rows"] == ((40, 0) if whole_head else (0, 40))


@pytest.mark.parametrize(
    "name",
    [
        "recomputed",
        "recomputed zero3",
        "recomputed context",
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in SLOW),
        "compiled sequence",
        "compiled context",
    ],
)
def test_recomputed_and_compiled_blocks_train_alike(found: dict[int, Any], name: str) -> None:
    """fp32, 1e-5: compiled norms and activations round otherwise."""
    expected = found[1][0]["plain"][0]
    for rank in found[2]:
        np.testing.assert_allclose(rank[name][0].losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(rank[name][0].norms, expected.norms, rtol=1e-5)
        graphs, breaks = rank[name][1]
        assert (graphs > 0) == name.startswith("compiled")
        assert (breaks > 0) == (name == "compiled ring")  # at the ring, which is no operator


@pytest.mark.parametrize("name", ["bf16", "bf16 ring", "bf16 sequence zero2", "bf16 sequence zero3"])
def test_bf16_is_as_near_to_fp32_as_on_one_rank(found: dict[int, Any], name: str) -> None:
    """bf16 rounds at 4e-3; a loss is a mean over hundreds of targets. A group also rounds each rank's addend."""
    plain, alone = found[1][0]["plain"][0], found[1][0]["bf16"][0]
    np.testing.assert_allclose(alone.losses, plain.losses, rtol=2e-3)
    for rank in found[2]:
        np.testing.assert_allclose(rank[name][0].losses, plain.losses, rtol=2e-3)
        np.testing.assert_allclose(rank[name][0].norms, plain.norms, rtol=2e-2)


@pytest.mark.parametrize("name", ["dropout", "dropout sequence", "dropout context"])
def test_dropout_acts_and_recomputation_draws_the_same_masks(found: dict[int, Any], name: str) -> None:
    for rank in found[2]:
        trace, again = rank[name][0], rank[f"{name} recomputed"][0]
        assert np.abs(np.array(trace.losses) - found[1][0]["plain"][0].losses).max() > 1e-3
        assert (again.losses, again.norms) == (trace.losses, trace.norms)
        assert trace.losses == found[2][0][name][0].losses
        for (key, values), (other, expected) in zip(again.fragments, trace.fragments, strict=True):
            assert key == other
            np.testing.assert_array_equal(values, expected)


def _masks(comm: Any, device: torch.device) -> dict[tuple[str, str], Any]:
    """Per kind of group: what dropout leaves of ones in the stream, and the seed of attention's own."""
    clock = DropoutClock(seed=3, step=7, micro_batch=2)
    group = make_groups(Topology(comm.size, tensor=comm.size), comm.rank, comm.timeout).tensor
    sizes = build_model_config(
        ModelSection(style="gpt2", hidden_size=32, num_attention_heads=4, dropout=0.2), VOCAB, 64
    )
    found: dict[tuple[str, str], Any] = {}
    factories = {
        "tensor": TensorLayers(clock, TensorProducts(group)),
        "sequence": TensorLayers(clock, TensorProducts(group, sequence=True)),
        "context": LayerFactory(clock, sequence=ExchangedSequence(group)),
    }
    for kind, layers in factories.items():
        block = Block(sizes, layers, None, clock, layer=1)
        ones = torch.ones(2, 64, 32)
        found[kind, "stream"] = block.mlp_dropout(ones).numpy()
        found[kind, "another site"] = block.attention_dropout(ones).numpy()
        found[kind, "attention"] = clock.seed_at(block.attention.place)
    return found


def test_masks_are_equal_where_numbers_are_and_different_where_they_are_not() -> None:
    first, second = run_ranks(2, _masks)
    for kind in ("tensor", "sequence", "context"):
        assert first[kind, "attention"] != second[kind, "attention"]  # of other heads
    np.testing.assert_array_equal(first["tensor", "stream"], second["tensor", "stream"])
    for kind in ("sequence", "context"):  # slices of the sequence are other numbers
        assert (first[kind, "stream"] != second[kind, "stream"]).mean() > 0.2
    assert (first["tensor", "stream"] != first["tensor", "another site"]).mean() > 0.2
    np.testing.assert_allclose((first["tensor", "stream"] == 0).mean(), 0.2, atol=0.02)  # 4,096 draws
    np.testing.assert_allclose(first["tensor", "stream"].max(), 1.25)


def _saved_bytes(comm: Any, device: torch.device) -> dict[str, int]:
    """Bytes that one block keeps for its backward pass, its parameters apart."""
    section = ModelSection(style="gpt2", hidden_size=64, num_attention_heads=4, dropout=0.1)
    clock, sizes = DropoutClock(seed=0), build_model_config(section, VOCAB, 128)
    group = make_groups(Topology(comm.size, tensor=comm.size), comm.rank, comm.timeout).tensor
    factories: dict[str, LayerFactory] = {
        "dense": LayerFactory(clock),
        "tensor": TensorLayers(clock, TensorProducts(group)),
        "sequence": TensorLayers(clock, TensorProducts(group, sequence=True)),
        "context": LayerFactory(clock, sequence=ExchangedSequence(group)),
        "ring": LayerFactory(clock, sequence=RingSequence(group)),
    }
    found = {}
    for name, layers in factories.items():
        block = Block(sizes, layers, None, clock, 1)
        initialize(block, sizes, seed=1)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

        def keep(tensor: Tensor, parameters: set[int] = parameters, kept: dict[int, Any] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage
            return tensor

        stream = torch.randn(4, 128 // layers.slices // layers.sequence.parts, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(stream * 1.0, None)
        found[name] = sum(storage.nbytes() for storage in kept.values())
    return found


@pytest.mark.parametrize(("size", "factor"), [(2, 0.9), (4, 0.7)])
def test_a_stream_in_slices_keeps_less(size: int, factor: float) -> None:
    """With slices a rank keeps its share of everything; without, the whole stream beside its share of the rest."""
    for rank in run_ranks(size, _saved_bytes):
        assert rank["sequence"] < factor * rank["tensor"]
        assert rank["sequence"] < 1.05 * rank["dense"] / size
        # Attention's output is kept for all heads of the slice, as for whole sequences of some heads.
        assert rank["context"] < 1.1 * rank["dense"] / size
        assert rank["ring"] < 1.1 * rank["dense"] / size
