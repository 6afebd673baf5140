"""The runs that benchmarks train: their size and settings, random tokens, and the steps of megalm's engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.config.deepspeed.json_reader import read_deepspeed_json
from megalm.config.loading import load_run_config
from megalm.data.indexed.dataset import IndexedDataset, best_dtype
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import TrainingSamples
from megalm.engine.build import build_engine
from megalm.engine.device import device_facts
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.interface import Engine, StepResult
from megalm.model.model_config import build_model_config
from megalm.planning.resolve import ResolvedRun, resolve
from megalm.rank_environment import rank_facts

ROOT = Path(__file__).resolve().parent.parent
ZERO1 = ROOT / "ds_configs" / "zero1.json"
_DOCUMENTS = 64


@dataclass(frozen=True)
class Shape:
    """The size of a model and of its batch.

    Attributes:
        batch: sequences of a step.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence

    def keys(self, style: str) -> dict[str, Any]:
        """The run configuration's keys of a model of this size."""
        return {
            "model.style": style,
            "model.num_hidden_layers": self.layers,
            "model.hidden_size": self.hidden,
            "model.num_attention_heads": self.heads,
            "data.sequence_length": self.sequence,
        }


def words_of(keys: Mapping[str, Any]) -> list[str]:
    """Keys as a command line has them: key=value, the value as YAML."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in keys.items()]


def resolved_run(
    path: Path, changes: Mapping[str, Any], keys: Mapping[str, Any], vocabulary: int, base: Path = ZERO1
) -> ResolvedRun:
    """A run on the ranks of this job.

    Args:
        path: where its DeepSpeed JSON is written, `base` with `changes`.
        keys: of the run configuration.
    """
    path.write_text(json.dumps(json.loads(base.read_text()) | dict(changes)))
    ranks = rank_facts()
    device = device_facts(ranks.local_world_size)
    loaded = load_run_config(None, words_of(keys))
    return resolve(loaded, read_deepspeed_json(str(path)), ranks.world_size, device, vocabulary)


def write_random_tokens(prefix: Path, vocabulary: int, sequence: int) -> None:
    """A dataset of 64 documents, each of eight samples."""
    random = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, best_dtype(vocabulary))
    for _ in range(_DOCUMENTS):
        writer.append(random.integers(0, vocabulary, size=sequence * 8))
    writer.close()


def random_batches(run: ResolvedRun, prefix: Path, rank: int) -> BatchLoader:
    samples = TrainingSamples(IndexedDataset(prefix), (0, _DOCUMENTS), run.config.data.sequence_length, seed=1)
    batch, place = run.batch, run.topology.coordinate(rank).data
    return BatchLoader(samples, BatchLayout(batch.global_batch, batch.micro_batch, place, batch.data_parallel))


def engine_steps(
    run: ResolvedRun, vocabulary: int, device: torch.device, comm: DistributedCommunicator, prefix: Path
) -> tuple[Engine, Callable[[int], StepResult]]:
    """megalm's engine of a run, and what takes its step of a number: the whole of `train_step`, with its batch."""
    shape = build_model_config(run.config.model, vocabulary, run.config.data.sequence_length)
    engine = build_engine(run, shape, device, comm)
    loader = random_batches(run, prefix, comm.rank)

    def step(number: int) -> StepResult:
        return engine.train_step(loader.batch((number - 1) * run.batch.global_batch), number, 1e-4)

    return engine, step
