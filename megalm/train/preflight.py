"""Before step 1, one of everything: what would fail in hour three fails now.

A training step at learning rate zero, a validation batch, a token of a sample and a checkpoint write. Afterwards the
engine is as it was: rate zero moves no weight, and moments and counters are cleared. It comes before a resumed state is
loaded, so there is nothing else to restore.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megalm.errors import TrainingError
from megalm.train.trainer import TrainerComponents

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def memory_errors_named(phase: str) -> Iterator[None]:
    """Turn running out of memory into a line that says in which phase, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise
        raise TrainingError(
            f"out of memory in {phase} ({str(error).splitlines()[0] if str(error) else 'MemoryError'}). Try a smaller "
            "train_micro_batch_size_per_gpu in the DeepSpeed JSON, train.checkpoint_activations_every=1, or a higher "
            "ZeRO stage (ds_configs/zero3.json, zero3_offload.json); megalm plan shows what each saves"
        ) from error


def run_preflight(parts: TrainerComponents) -> None:
    """Run one of everything; collective.

    Raises:
        TrainingError: out of memory, with the phase.
        OSError: a checkpoint cannot be written.
    """
    engine = parts.engine
    with memory_errors_named("the training step"):
        engine.train_step(parts.batches.batch(0), step=1, learning_rate=0.0)
    with memory_errors_named("validation"):
        parts.evaluator.rehearse(engine)
    with memory_errors_named("sampling"):
        parts.sampler.rehearse(engine)
    engine.reset()
    with memory_errors_named("writing a checkpoint"):
        parts.checkpoints.rehearse(engine)
