"""Evaluates checkpoints on datasets: the run's own validation sets, or others with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.communicator import SingleProcessCommunicator
from megalm.config.loading import load_run_config
from megalm.data.builder.rebuild import Wanted, differences
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.sampling.batch_loader import BatchLayout, GlobalBatch, ValidationLoader
from megalm.data.sampling.samples import ValidationSamples
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import CheckpointError, DataError
from megalm.inference.inference_model import CheckpointFacts, InferenceModel
from megalm.train.datasets import find_data, open_validation
from megalm.train.evaluator import Evaluation, Evaluator

Row = dict[str, Any]  # one result, as JSON

OWN, DATA = "validation", "data"  # sources
ALL = "all"  # the total over several sets of one source


class DatasetTask:
    """Loss over windows of datasets, as in validation; the data is read once for all checkpoints.

    Args:
        source: the `source` of each row.
        sets: by name.
        batch_size: windows per batch; changes memory and speed only.
        max_samples: the largest number of windows of each set, evenly spaced.
    """

    def __init__(
        self,
        source: str,
        sets: Mapping[str, ValidationSamples],
        tokenizer: Tokenizer,
        batch_size: int,
        max_samples: int | None = None,
    ) -> None:
        self._source = source
        self._token_bytes = tokenizer.token_bytes()
        layout = BatchLayout(batch_size, batch_size, 0, 1)
        chosen = {name: one if max_samples is None else one.subset(max_samples) for name, one in sets.items()}
        self._loaders = {name: ValidationLoader(one, layout) for name, one in chosen.items()}

    @property
    def batches(self) -> int:
        """The calls of `heartbeat` for one checkpoint."""
        return sum(map(len, self._loaders.values()))

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        """A result for each set, and the total; the run's own sets have the rows of metrics.jsonl."""
        results = evaluate_sets(model, self._loaders, self._token_bytes, heartbeat, as_in_training=self._source == OWN)
        return [{"source": self._source, **loss_fields(result)} for result in results]


def evaluate_sets(
    model: InferenceModel,
    sets: Mapping[str, Iterable[GlobalBatch]],
    token_bytes: npt.NDArray[np.int32],
    heartbeat: Callable[[], None],
    as_in_training: bool = False,
) -> list[Evaluation]:
    """Evaluate each set, and the total `ALL` of several sets, or training's total."""
    pairs = {name: (batches, batches) for name, batches in sets.items()}
    evaluator = Evaluator(pairs, token_bytes, SingleProcessCommunicator(), heartbeat=heartbeat)
    total = evaluator.evaluate(model, whole=True)
    assert total is not None, "a task has at least one set"
    if as_in_training or not total.parts:
        return [*total.parts, total]
    return [*total.parts, *([replace(total, dataset=ALL)] if len(total.parts) > 1 else [])]


def loss_fields(result: Evaluation) -> Row:
    return {
        "dataset": result.dataset,
        "targets": result.targets,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }


def own_sets(facts: CheckpointFacts, tell: Callable[[str], None]) -> dict[str, ValidationSamples]:
    """The validation sets of the checkpoint's run.

    Args:
        tell: called with lines for the user if a recipe's data is prepared again.

    Raises:
        CheckpointError: the run's configuration is missing, or has no validation set.
        ConfigError: the configuration file is damaged.
        DataError: the data is missing, or was built with another tokenizer.
    """
    folders = [facts.path, *([facts.run_folder] if facts.run_folder else [])]
    config = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    if config is None:
        raise CheckpointError(
            f"{facts.path} has no config.yaml, so its validation sets are unknown; name a dataset with --data"
        )
    data = load_run_config(str(config), []).config.data
    sets = open_validation(data, find_data(data, tell), facts.tokenizer)
    if not sets:
        raise CheckpointError(
            f"the run of {facts.path} has no validation set (data.validation, data.split); name a dataset with --data"
        )
    return sets


def other_sets(facts: CheckpointFacts, prefixes: Sequence[str]) -> dict[str, ValidationSamples]:
    """Open datasets, each named by the last part of its prefix, or by the whole prefix if two share that part.

    Raises:
        DataError: files are missing or damaged, or a dataset was built with another tokenizer.
    """
    names = [Path(prefix).name for prefix in prefixes]
    if len(set(names)) < len(names):
        names = list(prefixes)
    sets = {}
    for name, prefix in zip(names, prefixes, strict=True):
        sidecar = read_sidecar(prefix)
        if sidecar is not None and (found := differences(sidecar, Wanted(facts.tokenizer))):
            raise DataError(f"{prefix} {found[0]}; build it as the data of {facts.path} to evaluate on it")
        dataset = IndexedDataset(prefix, facts.tokenizer.vocab_size)
        sets[name] = ValidationSamples(
            dataset, (0, len(dataset)), facts.sequence_length, facts.document_mask, facts.packing
        )
    return sets
