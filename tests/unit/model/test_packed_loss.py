"""A packed batch under the document mask against the same documents, each alone in a row. Tolerance: 1e-5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megalm.config.schema import ModelSection
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.trained_tokens import trained_path
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import IGNORE_INDEX, TrainingSamples
from megalm.model.model_config import build_model_config
from megalm.model.transformer import LanguageModel, initialize

VOCAB, LENGTH = 61, 24


def documents(prefix: Path, marked: bool) -> IndexedDataset:
    random = np.random.default_rng(3)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for length in random.integers(2, LENGTH + 2, size=40):
            writer.append(random.integers(0, VOCAB, size=length))
    if marked:
        trained = random.random(len(IndexedDataset(prefix).tokens)) < 0.6
        trained_path(prefix).write_bytes(np.packbits(trained, bitorder="little").tobytes())
    return IndexedDataset(prefix)


@pytest.mark.parametrize(("style", "marked"), [("llama", False), ("gpt2", True)])
def test_equal_to_one_document_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str, marked: bool) -> None:
    monkeypatch.setattr("megalm.data.sampling.samples.check_trained", lambda dataset: None)
    dataset = documents(tmp_path / "data", marked)
    section = ModelSection(style=style, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)  # type: ignore[arg-type]
    shape = build_model_config(section, VOCAB, LENGTH)
    model = LanguageModel(shape)
    initialize(model, shape, 1)
    samples = TrainingSamples(dataset, (0, 40), LENGTH, seed=5, document_mask=True, packing="best_fit")
    count = int(samples.samples_per_epoch)
    assert count < 30, "several documents in a row"
    with BatchLoader(samples, BatchLayout(count, count, 0, 1)) as loader:
        batch = loader.batch(0)
    (micro,) = batch.micro_batches
    assert micro.documents is not None
    assert batch.padding > 0
    packed, _ = model(*(torch.from_numpy(array) for array in (micro.tokens, micro.labels, micro.documents)))
    packed.backward()
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    tokens = torch.zeros((len(dataset), LENGTH), dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for number in range(len(dataset)):
        positions = dataset.sequence_positions(number)
        row, end = torch.from_numpy(dataset.read(positions)), len(positions) - 1
        tokens[number, :end], labels[number, :end] = row[:-1], row[1:]
        if dataset.trained is not None:
            labels[number, :end][torch.from_numpy(~dataset.trained.at(positions)[1:])] = IGNORE_INDEX
    alone, _ = model(tokens, labels)
    alone.backward()
    assert batch.target_count == (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    for one, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, rtol=1e-4, atol=1e-4)
