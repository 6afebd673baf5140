"""Average the weights of checkpoints into a new one, which holds weights only, as an imported model does."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.save_transaction import bytes_needed, save_checkpoint
from megalm.checkpoint.shard_spec import WEIGHTS, Fragment, FragmentKey
from megalm.communicator import SingleProcessCommunicator
from megalm.errors import CheckpointError

# Of the last checkpoint's manifest; the state of its training is left out.
_KEPT = ("step", "tokens", "parameters", "model", "data", "tokenizer", "eod_id", "bos_id")
_CHANGE_NO_RESULT = ("dropout", "attention_dropout", "initializer_range")


class WeightAverage:
    """The mean of the fp32 weights of checkpoints, each counted once and alike.

    Args:
        readers: of two or more checkpoints of one model, in any layouts.

    Raises:
        CheckpointError: the checkpoints are fewer than two, or not of one model and tokenizer.
    """

    def __init__(self, readers: Sequence[CheckpointReader]) -> None:
        if len({reader.path.resolve() for reader in readers}) < max(2, len(readers)):
            raise CheckpointError("an average needs two or more different checkpoints; name each of them once")
        self._readers = sorted(readers, key=lambda reader: reader.manifest.step)
        if differences := list(_differences(self._readers)):
            raise CheckpointError("; ".join(differences))
        self.parameters = len(self._last.shapes())
        self.bytes = bytes_needed(self._means(lambda: None))

    @property
    def _last(self) -> CheckpointReader:
        """The checkpoint of the latest step, whose step and settings the average has."""
        return self._readers[-1]

    def _means(self, advance: Callable[[], None]) -> list[Fragment]:
        """Return the whole parameters, each averaged only when it is written."""
        shapes = self._last.shapes().items()
        keys = (FragmentKey(name, "master", shape, 0, math.prod(shape)) for name, shape in shapes)
        return [Fragment(key, partial(self._mean, key, advance)) for key in keys]

    def _mean(self, key: FragmentKey, advance: Callable[[], None]) -> Tensor:
        total = torch.zeros(key.shape, dtype=torch.float64)
        for reader in self._readers:
            total += reader.read_finite(key.name, key.shape)
        advance()
        return (total / len(self._readers)).float().reshape(-1)

    def write(self, checkpoints: Path, name: str, advance: Callable[[], None]) -> Path:
        """Write the checkpoint `checkpoints/step-N`, with the configuration files of the last one; return its path.

        Args:
            name: of the folder that holds it.
            advance: called after each parameter.

        Raises:
            CheckpointError: a file cannot be read, or has weights that are not finite.
            TrainingError: the checkpoint cannot be written; its cause is the error.
        """
        last = self._last.manifest
        stored = {fragment.file for tensor in last.tensors.values() for fragment in tensor.fragments}
        copies = [self._last.path / file for file in last.files if file not in stored]
        facts: dict[str, Any] = {
            "holds": WEIGHTS,
            "averaged_from": [f"{reader.manifest.run or '?'}/{reader.path.name}" for reader in self._readers],
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "run": name,
            **{key: last.content[key] for key in _KEPT if key in last.content},
            "validation_loss": None,
            "validation_tokens": None,
            "counters": {"optimizer_step": 0, "skipped_steps": 0, "loss_scaler": {}},
            "fingerprints": {"tokenizer": last.fingerprints.tokenizer},
            "attempt": 1,
        }
        means = self._means(advance)
        return save_checkpoint(checkpoints, facts.pop("step"), means, facts, copies, SingleProcessCommunicator())


def _differences(readers: Sequence[CheckpointReader]) -> Iterator[str]:
    """Name each checkpoint that is of another model or tokenizer than the first one."""

    def identity(reader: CheckpointReader) -> dict[str, object]:
        facts = {key: value for key, value in reader.manifest.model.items() if key not in _CHANGE_NO_RESULT}
        return {**facts, "tokenizer": reader.manifest.fingerprints.tokenizer, "tensors": reader.shapes()}

    first = identity(readers[0])
    for reader in readers[1:]:
        other = identity(reader)
        if keys := [key for key in first | other if first.get(key) != other.get(key)]:
            yield f"{reader.path} is of another model than {readers[0].path}: {', '.join(keys)} differ"
