"""A small real run through config, data and engine, without the launcher: what the parity tests compare."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.shard_spec import FragmentKey
from megalm.config.deepspeed.json_reader import DeviceFacts, read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.trained_tokens import trained_path
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import Samples, TrainingSamples
from megalm.engine.build import build_engine
from megalm.engine.interface import JudgeUpdate
from megalm.model.model_config import ModelConfig, build_model_config
from megalm.parity.miniature_training import snapshot
from megalm.parity.state_comparison import Trace, whole_state
from megalm.planning.lr_schedule import learning_rate
from megalm.planning.resolve import ResolvedRun, resolve

VOCAB = 131  # no multiple of anything, so that padding somewhere would show
MODEL = (
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.qk_norm=true",
    "model.tie_word_embeddings=false",
    "data.sequence_length=24",
    "train.steps=40",
    "schedule.warmup_steps=4",
    "schedule.peak_learning_rate=3e-3",
    "train.loss_chunk_tokens=40",
)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One layout of the same job: a shipped JSON with another precision, and settings of the model."""

    json: str
    precision: str = "fp32"
    overrides: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def make_dataset(prefix: Path, marked: bool = False) -> None:
    """Documents with structure to learn, of many lengths.

    Args:
        marked: of conversations, whose trained tokens are marked: no two micro-batches have equally many.
    """
    random = np.random.default_rng(7)
    writer = IndexedDatasetWriter(prefix, np.dtype(np.uint16))
    for length in random.integers(3, 90, size=200):
        start, stride = random.integers(0, VOCAB), random.integers(1, 4)
        writer.append((start + stride * np.arange(length)) % VOCAB)
    writer.close()
    if marked:
        trained = np.repeat(random.random(1000) < 0.7, 10)[: len(IndexedDataset(prefix).tokens)]
        trained_path(prefix).write_bytes(np.packbits(trained, bitorder="little").tobytes())


def resolved(case: Case, world_size: int, folder: Path, kind: Literal["cpu", "cuda"] = "cpu") -> ResolvedRun:
    content = json.loads((ROOT / "ds_configs" / case.json).read_text())
    content.pop("bf16", None)
    content.pop("fp16", None)
    if case.precision == "bf16":
        content["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        content["fp16"] = {"enabled": True, "initial_scale_power": 10}
    for section, value in case.settings.items():
        content[section] = {**content.get(section, {}), **value} if isinstance(value, dict) else value
    path = folder / f"{case.json}-{world_size}.json"
    path.write_text(json.dumps(content))
    stated = {override.split("=")[0]: override for override in (*MODEL, *case.overrides)}  # the case's own win
    loaded = load_run_config(None, list(stated.values()))
    return resolve(loaded, read_deepspeed_json(str(path)), world_size, DeviceFacts(kind, True, 4 << 30), VOCAB)


def shape_of(run: ResolvedRun) -> ModelConfig:
    return build_model_config(run.config.model, VOCAB, run.config.data.sample_length)


def start(
    comm: Any,
    device: torch.device,
    case: Case,
    prefix: Path,
    folder: Path,
    judge: JudgeUpdate | None = None,
    initial_weights: bool = True,
) -> tuple[Any, ResolvedRun, BatchLoader]:
    """Engine, resolved run and loader of this rank."""
    rank_folder = folder / f"rank-{comm.rank}"
    rank_folder.mkdir(exist_ok=True)
    run = resolved(case, comm.size, rank_folder, "cuda" if device.type == "cuda" else "cpu")
    samples = training_samples(run, IndexedDataset(prefix))
    batch, data_rank = run.batch, run.topology.coordinate(comm.rank).data
    layout = BatchLayout(batch.global_batch, batch.micro_batch, data_rank, batch.data_parallel)
    loader = BatchLoader(samples, layout)
    engine = build_engine(run, shape_of(run), device, comm, judge, initial_weights=initial_weights)
    return engine, run, loader


def training_samples(run: ResolvedRun, dataset: IndexedDataset) -> Samples:
    """All documents; with best-fit packing a mixture of two parts of them, twice as much of the first."""
    data = run.config.data
    make = partial(TrainingSamples, dataset, sequence_length=data.sample_length, seed=5)
    if data.packing == "stream":
        return make((0, 200), document_mask=data.masks_documents)
    parts = [make(part, document_mask=data.masks_documents, packing="best_fit") for part in ((0, 120), (120, 200))]
    return BlendedSamples(parts, [MixtureStage(0, (2, 1))])


def steps(engine: Any, run: ResolvedRun, loader: BatchLoader, first: int, last: int) -> Trace:
    """Optimizer steps first..last (counted from 1), and the state after them.

    Of a mixture the losses by dataset follow on those of the steps, of a model with experts in fp32 its routing.
    """
    losses, norms, by_dataset = [], [], []
    for step in range(first, last + 1):
        stage = run.stages.at(step)
        batch = loader.batch(run.stages.samples(step - 1), [(stage.samples, stage.parts)])
        result = engine.train_step(batch, step, learning_rate(run.schedule, step))
        assert not result.skipped, step
        losses.append(result.loss)
        norms.append(result.grad_norm)
        assert len(result.dataset_losses) == len(batch.dataset_targets)
        if batch.dataset_targets:
            own = [loss or 0.0 for loss in result.dataset_losses]
            mean = np.dot(own, batch.dataset_targets) / batch.target_count
            np.testing.assert_allclose(mean, result.loss, rtol=1e-6)
            by_dataset += own
        # Rounded numbers send a token elsewhere.
        exact = run.precision == "fp32" == run.config.train.optimizer_state
        if result.routing is not None and exact:
            routed = [token for counts in result.routing.counts for token in counts]
            by_dataset += [*routed, result.routing.entropy, result.routing.balance_loss, result.routing.z_loss]
            by_dataset += [] if result.routing.dropped is None else [result.routing.dropped]
    return Trace(losses + by_dataset, norms, snapshot(engine))


def train_cases(
    comm: Any, device: torch.device, prefix: Path, folder: Path, cases: dict[str, Case], last: int
) -> dict[str, Trace]:
    """Each case, one after another, from step 1 to `last`."""
    traces = {}
    for name, case in cases.items():
        engine, run, loader = start(comm, device, case, prefix, folder)
        traces[name] = steps(engine, run, loader, 1, last)
        loader.close()
    return traces


def assert_same_state(ranks: list[Trace], reference: Trace) -> None:
    """Masters and moments of all ranks together against the one-rank run's, as far as some steps of Adam allow."""
    expected, found = whole_state([reference]), whole_state(ranks)
    assert expected.keys() == found.keys()
    for place, values in expected.items():
        difference = np.abs(found[place] - values)
        # A bias on all keys changes no softmax: its gradient is rounding alone, which Adam turns into steps.
        mean = 1e-4 if place[0].endswith("attention.key.bias") else 1e-6
        assert difference.max() < 2e-4, place
        assert difference.mean() < mean, place


def assert_bit_equal(straight: Trace, again: Trace, name: str = "") -> None:
    """Losses, norms, masters and moments of a rank that resumed are those of an undisturbed run."""
    assert (again.losses, again.norms) == (straight.losses, straight.norms), name
    for (key, expected), (other, found) in zip(straight.fragments, again.fragments, strict=True):
        assert key == other
        np.testing.assert_array_equal(found, expected, err_msg=f"{name}: {key}")


def assert_stored(path: Path, ranks: list[Trace], name: str) -> None:
    """The state of all ranks together is what a checkpoint holds."""
    reader = CheckpointReader(path)
    for (parameter, kind), values in whole_state(ranks).items():
        shape = reader.shapes()[parameter]
        whole = reader.read(FragmentKey(parameter, kind, shape, 0, int(np.prod(shape)))).numpy()
        np.testing.assert_array_equal(values, whole, err_msg=f"{name}, {path}: {kind} of {parameter}")
