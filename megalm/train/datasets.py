"""From the data section to what the loop reads: tokenizer, training batches, validation batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.resolve import ResolvedRun
from megalm.config.schema import DataSection
from megalm.data.files import read_json
from megalm.data.indexed import IndexedDataset, sidecar_path
from megalm.data.loader import BatchLayout, BatchLoader, ValidationLoader
from megalm.data.recipe import default_cache_dir, prepare_recipe
from megalm.data.samples import TrainingSamples, ValidationSamples, split_documents
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import ConfigError, DataError


@dataclass(frozen=True)
class DataPlaces:
    """Which files the data section means, once a recipe is prepared."""

    train: str
    validation: str | None
    split: str | None
    tokenizer: str


@dataclass(frozen=True)
class RunData:
    tokenizer: Tokenizer
    train: TrainingSamples
    validation: ValidationSamples | None
    unigram_entropy: float | None  # nats per token of the training dataset, if its builder noted it


def known_vocab_size(data: DataSection) -> int | None:
    """The tokenizer's, where there is one already; the rules in config/checks.py tell of one that is missing.

    Raises:
        DataError: it cannot be read.
    """
    if data.tokenizer is None or (data.tokenizer != "bytes" and not Path(data.tokenizer).exists()):
        return None
    return load_tokenizer(data.tokenizer).vocab_size


def find_data(data: DataSection, tell: Callable[[str], None]) -> DataPlaces:
    """Prepare the recipe if there is no dataset of one's own; slow the first time only.

    Raises:
        ConfigError: no data was named at all.
    """
    if data.train is not None:
        if data.tokenizer is None:
            raise ConfigError("data.train is stated without data.tokenizer; name the tokenizer that it was built with")
        return DataPlaces(data.train, data.validation, data.split, data.tokenizer)
    if data.recipe is None:
        raise ConfigError("no data: state data.train and data.tokenizer, or data.recipe=python-stdlib")
    cache = Path(data.cache).expanduser() if data.cache else default_cache_dir()
    prepared = prepare_recipe(data.recipe, cache, data.recipe_vocab_size, tell)
    return DataPlaces(str(prepared.train_prefix), None, data.split or prepared.split, str(prepared.tokenizer_path))


def open_data(run: ResolvedRun, places: DataPlaces) -> RunData:
    """Open the files of `places` and cut them into samples.

    Raises:
        DataError: a missing or damaged file, a dataset with fewer tokens than one sample, or one that was built with
            another tokenizer.
        ConfigError: a tokenizer that does not fit the model, or more epochs than `data.max_epochs`.
    """
    data, seed = run.config.data, run.config.train.seed
    tokenizer = load_tokenizer(places.tokenizer)
    stated = run.config.model.vocab_size
    if stated is not None and stated < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={stated} is smaller than the {tokenizer.vocab_size} entries of {places.tokenizer}; "
            "leave it out to take the tokenizer's"
        )
    for prefix in (places.train, places.validation):
        if prefix is not None:
            _refuse_other_tokenizer(Path(prefix), tokenizer)
    dataset = IndexedDataset(places.train)
    documents = len(dataset)
    train_range, validation_range = (0, documents), None
    if places.split is not None:
        weights = [float(weight) for weight in places.split.split(",")]
        train_range, validation_range = split_documents(documents, weights)
    train = TrainingSamples(
        dataset,
        train_range,
        data.sequence_length,
        seed,
        order=data.order,
        requested_samples=run.config.train.steps * run.batch.global_batch,
        document_mask=data.document_mask,
    )
    validation = None
    if places.validation is not None:
        held_out = IndexedDataset(places.validation)
        validation = ValidationSamples(held_out, (0, len(held_out)), data.sequence_length, data.document_mask)
    elif validation_range is not None:
        validation = ValidationSamples(dataset, validation_range, data.sequence_length, data.document_mask)
    _refuse_too_many_epochs(run, train)
    return RunData(tokenizer, train, validation, _unigram_entropy(Path(places.train)))


def epochs(run: ResolvedRun, train: TrainingSamples) -> float:
    """How often the run sees each training token."""
    return run.config.train.steps * run.tokens_per_step / train.tokens_per_epoch


def batch_loader(run: ResolvedRun, train: TrainingSamples, data_rank: int) -> BatchLoader:
    return BatchLoader(train, batch_layout(run, data_rank))


def batch_layout(run: ResolvedRun, data_rank: int) -> BatchLayout:
    """The part of a global batch that this data-parallel rank takes."""
    batch = run.batch
    return BatchLayout(batch.global_batch, batch.micro_batch, data_rank, batch.data_parallel)


def validation_loaders(
    run: ResolvedRun, data: RunData, data_rank: int
) -> tuple[ValidationLoader | None, ValidationLoader | None]:
    """The part that is used while training, and the whole set."""
    if data.validation is None:
        return None, None
    layout, most = batch_layout(run, data_rank), run.config.evaluate.max_samples

    def loader(samples: ValidationSamples) -> ValidationLoader:
        return ValidationLoader(samples, layout)

    whole = loader(data.validation)
    part = whole if most is None or most >= len(data.validation) else loader(data.validation.subset(most))
    return part, whole


def _refuse_too_many_epochs(run: ResolvedRun, train: TrainingSamples) -> None:
    most, planned = run.config.data.max_epochs, epochs(run, train)
    if most is not None and planned > most:
        raise ConfigError(
            f"{run.config.train.steps} steps see the data {planned:.1f} times, data.max_epochs={most:g}; "
            "train fewer steps or bring more data"
        )


def _refuse_other_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """The same numbers would be other text: training would go on, and mean nothing."""
    built_with = _sidecar(prefix).get("tokenizer", {})
    if built_with and built_with["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"{prefix} was built with the tokenizer {built_with['name']} of {built_with['vocab_size']} entries, which "
            f"{tokenizer.spec} is not (fingerprint {built_with['fingerprint'][:12]}, not "
            f"{tokenizer.fingerprint[:12]}); name the right one as data.tokenizer, or build the dataset again"
        )


def _unigram_entropy(prefix: Path) -> float | None:
    return _sidecar(prefix).get("unigram_entropy")


def _sidecar(prefix: Path) -> dict[str, Any]:
    """What the builder noted beside the dataset; empty where another toolkit built it."""
    path = sidecar_path(prefix)
    facts = read_json(path) if path.is_file() else {}
    return facts if isinstance(facts, dict) and "bin_sha256" in facts else {}
