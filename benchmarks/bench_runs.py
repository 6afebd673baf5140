"""The runs that benchmarks train: their size and settings, random tokens, their ranks, steps of megalm's engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.nanogpt import Shape
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


def keys_of(shape: Shape, style: str) -> dict[str, Any]:
    """The run configuration's keys of a model of this size."""
    return {
        "model.style": style,
        "model.num_hidden_layers": shape.layers,
        "model.hidden_size": shape.hidden,
        "model.num_attention_heads": shape.heads,
        "data.sequence_length": shape.sequence,
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


def launch_ranks(count: int, words: list[str], name: str) -> str:
    """Run this benchmark with more `words` on each rank; return what the first one prints. If a rank fails, exit."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    processes = []
    for rank in range(count):
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        # The store is here already, under a port that is held: the first rank is not to start one.
        meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
        environment = os.environ | {key: str(value) for key, value in (here | meet).items()}
        command = [sys.executable, *sys.orig_argv[1:], *words]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:  # else the profiler's own lines are all there is
            sys.exit(f"{name}: a rank failed\n{errors}")
    return outputs[0][0]
