"""Datasets that a checkpoint is evaluated on: the run's own validation sets, or any others of its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megalm.communicator import SingleProcessCommunicator
from megalm.config.loading import load_run_config
from megalm.data.builder.rebuild import Wanted, differences
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.sampling.batch_loader import BatchLayout, ValidationLoader
from megalm.data.sampling.samples import ValidationSamples
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import CheckpointError, DataError
from megalm.inference.inference_model import CheckpointFacts, InferenceModel
from megalm.train.datasets import find_data, open_validation
from megalm.train.evaluator import Evaluation, Evaluator

Row = dict[str, Any]  # one result: JSON

OWN, DATA = "validation", "data"  # sources
ALL = "all"  # several sets of one source together


class Task(Protocol):
    """Something to evaluate checkpoints on; its data is read once."""

    @property
    def batches(self) -> int:
        """How often `heartbeat` is called for one checkpoint."""
        ...

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        """One result a set, and one of all together where there are several."""
        ...


class DatasetTask:
    """Loss over datasets in windows, as training validates.

    Args:
        source: what `source` says in each row.
        sets: by name.
        batch_size: windows at once; changes memory and speed only.
        max_samples: at most so many windows of each set, evenly spaced.
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
        return sum(map(len, self._loaders.values()))

    def rows(self, model: InferenceModel, heartbeat: Callable[[], None]) -> list[Row]:
        sets = {name: (loader, loader) for name, loader in self._loaders.items()}
        found = Evaluator(sets, self._token_bytes, SingleProcessCommunicator(), heartbeat=heartbeat).evaluate(
            model, whole=True
        )
        assert found is not None, "a task has sets"
        if self._source == OWN or not found.parts:  # named as in metrics.jsonl
            each = [*found.parts, found]
        else:
            each = [*found.parts, *([replace(found, dataset=ALL)] if len(found.parts) > 1 else [])]
        return [{"source": self._source, **loss_fields(one)} for one in each]


def loss_fields(result: Evaluation) -> Row:
    return {
        "dataset": result.dataset,
        "targets": result.targets,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }


def own_sets(facts: CheckpointFacts, tell: Callable[[str], None]) -> dict[str, ValidationSamples]:
    """What the checkpoint's run validated on when it was written.

    Args:
        tell: called with lines for people, where a recipe is prepared again.

    Raises:
        CheckpointError: the run's configuration is gone, or it validates on nothing.
        ConfigError: a configuration file that is damaged.
        DataError: data that is not there any more, or was built with another tokenizer.
    """
    folders = [facts.path, *([facts.run_folder] if facts.run_folder else [])]
    config = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    if config is None:
        raise CheckpointError(
            f"{facts.path} has no config.yaml to say what it validated on; name a dataset with --data"
        )
    data = load_run_config(str(config), []).config.data
    sets = open_validation(data, find_data(data, tell), facts.tokenizer)
    if not sets:
        raise CheckpointError(
            f"the run of {facts.path} has no validation set (data.validation, data.split); name a dataset with --data"
        )
    return sets


def other_sets(facts: CheckpointFacts, prefixes: Sequence[str]) -> dict[str, ValidationSamples]:
    """Datasets by the last part of their prefix, or by all of it where two share that.

    Raises:
        DataError: missing or damaged files, or a dataset that was built with another tokenizer.
    """
    names = [Path(prefix).name for prefix in prefixes]
    if len(set(prefixes)) < len(prefixes):
        raise DataError(f"--data {' --data '.join(prefixes)}: one dataset is named twice; name it once")
    if len(set(names)) < len(names):
        names = list(prefixes)
    sets = {}
    for name, prefix in zip(names, prefixes, strict=True):
        sidecar = read_sidecar(prefix)
        if sidecar is not None and (found := differences(sidecar, Wanted(facts.tokenizer))):
            raise DataError(f"{prefix} {found[0]}; build it with the tokenizer of {facts.path} to evaluate on it")
        dataset = IndexedDataset(prefix)
        sets[name] = ValidationSamples(dataset, (0, len(dataset)), facts.sequence_length, facts.document_mask)
    return sets
