"""`compile=true` trains, validates and samples the same through a pipeline, and really compiles on every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.parity import train
from tests.distributed.training import Case, make_dataset
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OVERRIDES = ("parallel.pipeline=2", "train.checkpoint_activations_every=1", "data.document_mask=true")


def _compare(comm: Any, device: torch.device, prefix: Path, folder: Path) -> list[tuple[Any, int, int]]:
    from torch._dynamo.utils import counters

    results = []
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        counters.clear()
        case = Case("pipeline.json", "fp32", (*OVERRIDES, f"compile={compiled}"), {"train_micro_batch_size_per_gpu": 4})
        outcome = train(comm, device, case, prefix, folder)
        results.append((outcome, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return results


def test_compiled_equals_eager(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    ranks = run_ranks(2, _compare, tmp_path / "data", tmp_path, timeout_seconds=560)
    eager, compiled = ([rank[index][0] for rank in ranks] for index in (0, 1))
    for rank, (before, after) in enumerate(zip(eager, compiled, strict=True)):
        np.testing.assert_allclose(after.trained.losses, before.trained.losses, rtol=1e-5)
        np.testing.assert_allclose(after.trained.norms, before.trained.norms, rtol=1e-5)
        np.testing.assert_allclose(after.validation, before.validation, rtol=1e-5)
        np.testing.assert_allclose(after.logits, before.logits, rtol=1e-4, atol=1e-6)
        (_, none, _), (_, graphs, breaks) = ranks[rank]
        assert (none, breaks) == (0, 0)
        assert graphs >= 1, "a block; on the last stage the loss of a chunk as well"
