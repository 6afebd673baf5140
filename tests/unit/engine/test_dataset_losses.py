"""Losses by dataset against the loss of each dataset's samples alone. Tolerance: 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalm.config.schema import ModelSection
from megalm.data.sampling.batch_loader import GlobalBatch
from megalm.engine.base_engine import DatasetLosses
from megalm.model.loss import IGNORE
from megalm.model.model_config import build_model_config
from megalm.model.transformer import LanguageModel, initialize

DATASETS = [2, 0, 2, 0, 2, 2]  # of the samples; 1 has none


def test_each_dataset_has_the_loss_of_its_own_samples() -> None:
    shape = build_model_config(ModelSection(hidden_size=32, num_hidden_layers=1, num_attention_heads=4), 61, 12)
    model = LanguageModel(shape, chunk_tokens=7)  # chunks end inside samples
    initialize(model, shape, 1)
    tokens, labels = torch.randint(0, 61, (2, 6, 12), generator=torch.Generator().manual_seed(3))
    labels[1, 4:] = labels[2, :7] = IGNORE
    counts = [(labels[row] != IGNORE).sum().item() for row in range(6)]
    targets = tuple(int(np.bincount(DATASETS, counts, 3)[number]) for number in range(3))
    losses = DatasetLosses(model.head.output, torch.device("cpu"))
    losses.begin(GlobalBatch((), sum(targets), (0, 6), 0, targets))
    total = 0.0
    for rows in (slice(0, 4), slice(4, 6)):
        losses.of(np.array(DATASETS[rows]))
        total += model(tokens[rows], labels[rows])[0].item()
    losses.of(None)
    model(tokens, labels)  # not of the step
    found = losses.means([total, *map(float, losses.sums())])
    assert found[1] is None
    for number in (0, 2):
        own = [row for row in range(6) if DATASETS[row] == number]
        alone = model(tokens[own], labels[own])[0].item() / targets[number]
        assert found[number] == pytest.approx(alone, rel=1e-6)
    assert sum(map(float, losses.sums())) == pytest.approx(total, rel=1e-6)
    losses.begin(GlobalBatch((), 1, (0, 6)))
    assert (model.head.output.observe, losses.sums(), losses.means([1.0])) == (None, [], ())
