"""Train a miniature on the ranks of a process group: some steps, a save, and the same steps again after loading.

Legend: L sequence length, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import save_checkpoint
from megalm.data.sampling.batch_loader import BatchLoader, GlobalBatch
from megalm.data.sampling.samples import IGNORE_INDEX, Samples
from megalm.engine.build import build_engine
from megalm.engine.distributed import DistributedCommunicator
from megalm.engine.interface import Engine
from megalm.model.model_config import ModelConfig
from megalm.parity.miniature import VOCABULARY
from megalm.parity.state_comparison import Fragments, Outcome, Trace, some_choices
from megalm.planning.resolve import ResolvedRun
from megalm.train.datasets import batch_layout

STEPS, SAVED = 4, 2
_LEARNING_RATE = 3e-3
_SHORTEST, _LONGEST = 3, 20  # documents


class SyntheticSamples(Samples):
    """Documents with structure to learn, of many lengths; a document's last token has no target.

    So the ranks' micro-batches differ in their number of targets.
    """

    def __init__(self, length: int, document_mask: bool) -> None:
        self.sequence_length, self.document_mask = length, document_mask

    def sample(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        tokens, documents = self._tokens(index)
        labels = np.where(documents[1:] == documents[:-1], tokens[1:], IGNORE_INDEX)
        return tokens[:-1], labels

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        return self._tokens(index)[1][:-1].astype(np.int32)

    def target_count(self, index: int) -> int:
        return int((self.sample(index)[1] != IGNORE_INDEX).sum())

    def _tokens(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return L + 1 tokens and the numbers of their documents."""
        random = np.random.default_rng([7, index])
        parts: list[npt.NDArray[np.int64]] = []
        while sum(map(len, parts)) <= self.sequence_length:
            start, stride = random.integers(0, VOCABULARY), random.integers(1, 4)
            parts.append((start + stride * np.arange(random.integers(_SHORTEST, _LONGEST))) % VOCABULARY)
        documents = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return np.concatenate(parts)[: self.sequence_length + 1], documents[: self.sequence_length + 1]


@dataclass
class RankFindings:
    """What one rank shows.

    Attributes:
        trained: all steps, and the state before and after them.
        saved: the state at the save.
        second_half: of `trained`, the steps after the save.
        resumed: the steps after the save again, from the checkpoint of this layout.
        moved: the same from the checkpoint of another layout.
        moved_state: the state right after loading that one.
    """

    trained: Outcome
    saved: Trace
    second_half: Trace
    resumed: Trace
    moved: Trace | None = None
    moved_state: Trace | None = None


def train_and_resume(
    comm: DistributedCommunicator,
    device: torch.device,
    run: ResolvedRun,
    shape: ModelConfig,
    folder: Path,
    other: Path | None = None,
    say: Callable[[], None] = lambda: None,
) -> RankFindings:
    """Train, save to `folder`, resume from there and from the checkpoint `other` of another layout; collective.

    Args:
        say: called after each of the parts, of which there are `parts_of`.
    """
    engine, loader = _start(comm, device, run, shape)
    with loader:
        initial = snapshot(engine)
        first = steps(engine, loader, run, 1, SAVED)
        facts = {"step": SAVED, "tokens": 0, "counters": engine.counters()}
        own = save_checkpoint(folder, SAVED, engine.fragments(), facts, [], comm)
        say()
        second = steps(engine, loader, run, SAVED + 1, STEPS)
        trained = Trace([*first.losses, *second.losses], [*first.norms, *second.norms], second.fragments)
        validation = validation_losses(engine, run, loader.batch(run.stages.samples(STEPS)))
        texts = np.random.default_rng(3).integers(0, VOCABULARY, (2, run.config.data.sample_length))
        logits = engine.next_token_logits(texts, np.array([3, run.config.data.sample_length - 1]))
        choices = engine.row_losses(some_choices(VOCABULARY, run.config.data.sample_length - 1))
    engine.close()
    say()
    outcome = Outcome(Trace([], [], initial), trained, validation, logits, choices)
    _, resumed = load_and_train(comm, device, run, shape, own)
    say()
    findings = RankFindings(outcome, first, second, resumed)
    if other is not None:
        findings.moved_state, findings.moved = load_and_train(comm, device, run, shape, other)
        say()
    return findings


def load_and_train(
    comm: DistributedCommunicator, device: torch.device, run: ResolvedRun, shape: ModelConfig, checkpoint: Path
) -> tuple[Trace, Trace]:
    """Return the state right after loading a checkpoint, and the steps that follow it; collective."""
    engine, loader = _start(comm, device, run, shape, initial_weights=False)
    with loader:
        reader = CheckpointReader(checkpoint)
        engine.restore(reader.read, reader.manifest.counters, reader.manifest.step)
        loaded = Trace([], [], snapshot(engine))
        trained = steps(engine, loader, run, SAVED + 1, STEPS)
    engine.close()
    return loaded, trained


def _start(
    comm: DistributedCommunicator,
    device: torch.device,
    run: ResolvedRun,
    shape: ModelConfig,
    initial_weights: bool = True,
) -> tuple[Engine, BatchLoader]:
    samples = SyntheticSamples(run.config.data.sample_length, run.config.data.masks_documents)
    loader = BatchLoader(samples, batch_layout(run, run.topology.coordinate(comm.rank).data))
    return build_engine(run, shape, device, comm, initial_weights=initial_weights), loader


def steps(engine: Engine, loader: BatchLoader, run: ResolvedRun, first: int, last: int) -> Trace:
    """Optimizer steps first..last (counted from 1), and the state after them."""
    losses, norms = [], []
    for step in range(first, last + 1):
        stage = run.stages.at(step)
        batch = loader.batch(run.stages.samples(step - 1), [(stage.samples, stage.parts)])
        result = engine.train_step(batch, step, _LEARNING_RATE)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trace(losses, norms, snapshot(engine))


def validation_losses(engine: Engine, run: ResolvedRun, batch: GlobalBatch) -> list[float]:
    """Return the sum of losses in nats, and where the run validates it, that with the average of the weights."""
    losses = [engine.evaluate(batch.micro_batches)]
    if run.config.evaluates_ema:
        with engine.averaged_weights():
            losses.append(engine.evaluate(batch.micro_batches))
    return losses


def snapshot(engine: Any) -> Fragments:
    """Copies of this rank's fp32 masters and moments."""
    return [(fragment.key, fragment.tensor.detach().cpu().numpy().copy()) for fragment in engine.fragments()]
