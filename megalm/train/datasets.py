"""Open the data of a run from its `data` section: tokenizer, training batches, validation batches."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.communicator import Communicator
from megalm.config.loading import SAVED_CONFIG
from megalm.config.schema import BlendPart, DataSection, DataStage, RunConfig
from megalm.data.builder.rebuild import Wanted, build_prefix, ensure_dataset
from megalm.data.builder.stdlib_corpus import default_cache_dir, prepare_recipe
from megalm.data.indexed.dataset import IndexedDataset, bin_path, idx_path
from megalm.data.indexed.metadata import read_sidecar
from megalm.data.sampling.batch_loader import BatchLayout, ValidationLoader
from megalm.data.sampling.index_cache import ArrayCache
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.sample_order import Range
from megalm.data.sampling.samples import TrainingSamples, ValidationSamples, split_documents
from megalm.data.tokenizers.tokenizer import AUTO, Tokenizer, load_tokenizer
from megalm.errors import ConfigError, DataError
from megalm.planning.batch_size import TrainingStages
from megalm.planning.resolve import ResolvedRun
from megalm.runs.metrics_log import TOTAL
from megalm.train.multiple_choice import NO_CHOICES, Choices, ChoiceTask, Encoding, read_choices

log = logging.getLogger(__name__)
# Below this number of documents or samples, shuffling is faster than writing the order to a file.
KEPT_ORDERS_FROM = 100_000
KEPT_CHECKS_FROM = 1 << 22  # sequences; checking the index of fewer takes a few hundredths of a second


@dataclass(frozen=True)
class DataPlaces:
    """The files that the data section refers to, after a recipe is prepared.

    Attributes:
        validation: name and prefix of each validation set.
    """

    blends: tuple[DataStage, ...]
    validation: tuple[tuple[str, str], ...]
    split: str | None
    tokenizer: str

    @property
    def training(self) -> list[str]:
        """Distinct prefixes, in the configured order."""
        return list(dict.fromkeys(part.prefix for stage in self.blends for part in stage.blend))

    @property
    def prefixes(self) -> list[str]:
        return list(dict.fromkeys([*self.training, *(prefix for _, prefix in self.validation)]))


@dataclass(frozen=True)
class RunData:
    """The open data of a run.

    Attributes:
        places: the files that it is read from.
        samples: the number of samples of `train` that the run has read at its end.
        validation_fingerprint: of the samples for validation during training; only losses over the same ones compare.
        unigram_entropy: nats per token of the only training dataset, if its builder noted it.
        choices: the questions of `evaluate.tasks`.
    """

    places: DataPlaces
    tokenizer: Tokenizer
    train: BlendedSamples
    samples: int
    validation: dict[str, ValidationSamples]
    validation_fingerprint: str
    unigram_entropy: float | None
    choices: Choices = NO_CHOICES


def find_data(data: DataSection, info: Callable[[str], None]) -> DataPlaces:
    """Return the run's data files; if no dataset is configured, prepare the recipe's first (slow the first time only).

    Raises:
        ConfigError: no data is configured.
    """
    if data.train is not None:
        if data.tokenizer is None:
            raise ConfigError("data.train needs data.tokenizer, the tokenizer that built the dataset")
        return DataPlaces(data.blends, tuple(data.validation_sets.items()), data.split, data.tokenizer)
    if data.recipe is None:
        raise ConfigError("no data: set data.train and data.tokenizer, or data.recipe=python-stdlib")
    prepared = prepare_recipe(data.recipe, _cache(data), data.recipe_vocab_size, info)
    only = BlendPart(prefix=str(prepared.train_prefix), weight=1.0)
    blends = (DataStage(from_step=1, blend=(only,)),)
    return DataPlaces(blends, (), data.split or prepared.split, str(prepared.tokenizer_path))


def rebuild_data(data: DataSection, places: DataPlaces, workers: int, info: Callable[[str], None]) -> None:
    """Rebuild datasets as `data.rebuild` configures; call in one process, before any other opens them.

    Raises:
        DataError: a dataset differs from the configuration, or cannot be built.
    """
    if data.rebuild == "never":
        return  # open_data refuses a dataset that differs
    tokenizer, done = load_run_tokenizer(data, places), set[str]()
    for prefix in places.prefixes:
        if build_prefix(prefix) in done:  # the other part of a split
            continue
        built = ensure_dataset(prefix, _wanted(data, prefix, tokenizer), data.rebuild, workers, info)
        if built is not None:
            done.add(build_prefix(prefix))
            documents, tokens = (sum(getattr(report, of) for report in built.reports) for of in ("documents", "tokens"))
            info(f"built {build_prefix(prefix)}: {documents:,} documents, {tokens:,} tokens")


def open_run_data(
    run: ResolvedRun, first_sample_of: Callable[[int], int], comm: Communicator, info: Callable[[str], None]
) -> RunData:
    """Prepare, rebuild and open the data of a run; collective. For arguments and errors see the four functions."""
    places = comm.once_per_node(lambda: find_data(run.config.data, info))
    comm.once(lambda: rebuild_data(run.config.data, places, len(os.sched_getaffinity(0)), info))
    data = open_data(run, places, first_sample_of)
    return replace(data, choices=open_choices(run, data.tokenizer, info))


def open_choices(run: ResolvedRun, tokenizer: Tokenizer, info: Callable[[str], None]) -> Choices:
    """Read the questions of `evaluate.tasks`.

    Raises:
        DataError: a line is not a question, or a choice exceeds the model's window.
    """
    data, evaluate = run.config.data, run.config.evaluate
    encoding = Encoding(tokenizer, data.sample_length, data.masks_documents)
    rows = run.batch.micro_batch * run.batch.data_parallel

    def task(max_samples: int | None) -> ChoiceTask:
        return ChoiceTask([read_choices(Path(file), encoding, max_samples) for file in evaluate.tasks], rows)

    whole = task(None)
    for one in whole.sets:
        if one.cut:
            info(f"  WARNING: {one.name}: {one.cut:,} contexts exceed the model's window and lose their beginning")
    return whole if evaluate.max_samples is None else task(evaluate.max_samples), whole


def open_data(run: ResolvedRun, places: DataPlaces, first_sample_of: Callable[[int], int] | None = None) -> RunData:
    """Open the files of `places` and split them into samples.

    Args:
        first_sample_of: step -> number of its first sample, if the batch or order changed during the run; 0 or less
            before the order began.

    Raises:
        DataError: a missing or damaged file, a dataset with fewer tokens than one sample, or one that was built with
            another tokenizer or other settings.
        ConfigError: a tokenizer that does not fit the model, or validation on training data that is not allowed.
    """
    data = open_datasets(run.config, run.stages, places, first_sample_of)
    # A run of an earlier release that resumes keeps what it began with, and is warned.
    is_given = any(key.startswith("data.validation") and source != SAVED_CONFIG for key, source in run.sources.items())
    if is_given and not run.config.data.allow_validation_on_training:
        for name, prefix in validation_on_training(data):
            raise ConfigError(
                f"data.validation: set {name} holds the same documents as {prefix}, which the run trains on; name a "
                "held-out dataset, use data.split, or set data.allow_validation_on_training=true"
            )
    return data


def validation_on_training(data: RunData) -> list[tuple[str, str]]:
    """Return each set of data.validation that is a training dataset, with that dataset: by path or by content."""
    weights = [max(of_part) for of_part in zip(*(stage.weights for stage in data.train.stages), strict=True)]
    trained = [part.dataset for part, weight in zip(data.train.parts, weights, strict=True) if weight > 0]
    return [
        (name, other.prefix)
        for name, dataset in ((name, data.validation[name].dataset) for name, _ in data.places.validation)
        for other in trained
        if Path(dataset.prefix).resolve() == Path(other.prefix).resolve() or dataset.fingerprint == other.fingerprint
    ]


def open_datasets(
    config: RunConfig,
    training: TrainingStages,
    places: DataPlaces,
    first_sample_of: Callable[[int], int] | None = None,
) -> RunData:
    """The same as `open_data`, for a run of which only configuration and batches are known."""
    data = config.data
    tokenizer = load_run_tokenizer(data, places)
    entries = config.model.vocab_size
    if entries is not None and entries < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={entries} is smaller than the {tokenizer.vocab_size} entries of {places.tokenizer}; "
            "remove it to use the tokenizer's"
        )
    opened = {prefix: open_dataset(data, prefix, tokenizer) for prefix in places.prefixes}
    ranges = {prefix: _cut(opened[prefix], places.split) for prefix in places.training}
    requested = training.samples(config.train.steps)
    parts = [_training_samples(config, opened[prefix], ranges[prefix][0], requested) for prefix in places.training]
    stages = _stages(places, first_sample_of or (lambda step: training.samples(step - 1)))
    train = BlendedSamples(parts, stages, ArrayCache(_cache(data) / "orders"))
    validation = dict(_validation_samples(data, places, opened, ranges))
    alone = places.training[0] if len(places.training) == 1 else None
    entropy = (read_sidecar(alone) or {}).get("unigram_entropy") if alone is not None else None
    fingerprint = validation_fingerprint(validation, config.evaluate.max_samples)
    return RunData(places, tokenizer, train, requested, validation, fingerprint, entropy)


def load_run_tokenizer(data: DataSection, places: DataPlaces) -> Tokenizer:
    """Load the tokenizer. Without data.eod_token and data.bos_token, documents end and begin as in the first dataset
    that it built; where it has built none yet, they begin as the tokenizer itself begins a text.

    Raises:
        DataError: the tokenizer cannot be read, or has no such token.
    """
    tokenizer = load_tokenizer(places.tokenizer, data.eod_token)
    recorded = [(read_sidecar(prefix) or {}).get("tokenizer") or {} for prefix in places.prefixes]
    own = [facts for facts in recorded if facts.get("fingerprint") == tokenizer.fingerprint]
    if data.eod_token is None and (ends := [end for facts in own if (end := facts.get("eod_id")) is not None]):
        tokenizer = tokenizer.with_eod(ends[0])
    if data.bos_token is not None:
        return tokenizer.with_bos(data.bos_token)
    if own:
        return tokenizer.with_bos(own[0].get("bos_id"))
    return tokenizer.with_bos(AUTO if data.rebuild != "never" else None)


def open_validation(data: DataSection, places: DataPlaces, tokenizer: Tokenizer) -> dict[str, ValidationSamples]:
    """Return the run's validation sets by name; does not open training data without a held-out part.

    Raises:
        DataError: a missing or damaged file, or a dataset that was built with another tokenizer.
    """
    training = places.training if places.split is not None else []
    wanted = dict.fromkeys((*training, *(prefix for _, prefix in places.validation)))
    opened = {prefix: open_dataset(data, prefix, tokenizer) for prefix in wanted}
    ranges = {prefix: _cut(opened[prefix], places.split) for prefix in training}
    return dict(_validation_samples(data, places, opened, ranges))


def open_dataset(data: DataSection, prefix: str, tokenizer: Tokenizer) -> IndexedDataset:
    """Open a dataset and check that it is what the run wants.

    Raises:
        DataError: a missing or damaged file, another tokenizer or other settings, or a token outside the vocabulary.
    """
    wanted = _wanted(data, prefix, tokenizer)
    ensure_dataset(prefix, wanted)
    dataset = IndexedDataset(prefix, tokenizer.vocab_size, partial(_check_index, cache=_cache(data) / "checked"))
    if not (read_sidecar(prefix) or {}).get("tokenizer"):
        eod_id = None if data.append_eod is None else tokenizer.eod_id
        check_foreign_dataset(dataset, eod_id, data.append_eod, tokenizer.bos_id)
        if data.bos_token is None and tokenizer.bos_id is None:
            _warn_of_begins(dataset, tokenizer)
    return dataset


def _warn_of_begins(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Another toolkit may have put the tokenizer's own token before each document, and records nothing of it."""
    own = tokenizer.with_bos(AUTO)
    if own.bos_id is not None and (found := begins_with(dataset, own.bos_id))[0] == found[1]:
        log.warning(
            "%s: its documents begin with %s (id %d); set data.bos_token=%r, so that generation, evaluation and "
            "exports put it before a text too",
            dataset.prefix,
            own.bos_token,
            own.bos_id,
            own.bos_token,
        )


def _check_index(dataset: IndexedDataset, cache: Path) -> None:
    """Check every index entry; of a large dataset, one process does it once and the others find the result."""
    if len(dataset) < KEPT_CHECKS_FROM:
        return dataset.verify()

    def check() -> dict[str, npt.NDArray[np.int64]]:
        dataset.verify()
        return {"sequences": np.array([len(dataset)])}

    path = idx_path(dataset.prefix).resolve()
    found = path.stat()
    ArrayCache(cache).get(("index", str(path), found.st_size, found.st_mtime_ns), check)
    return None


def batch_layout(run: ResolvedRun, data_rank: int, sequences: int | None = None) -> BatchLayout:
    """Return the part of a global batch, by default of the run's largest, that this data-parallel rank reads."""
    batch = run.batch if sequences is None else run.batch.of(sequences)
    return BatchLayout(batch.global_batch, batch.micro_batch, data_rank, batch.data_parallel)


def validation_loaders(
    run: ResolvedRun, data: RunData, data_rank: int
) -> dict[str, tuple[ValidationLoader, ValidationLoader]]:
    """Return, by name of the set, a loader of the part used during training and one of the complete set."""
    smallest = min(stage.sequences for stage in run.stages.stages)  # the last batch is padded
    layout, most = batch_layout(run, data_rank, smallest), run.config.evaluate.max_samples

    def loaders(samples: ValidationSamples) -> tuple[ValidationLoader, ValidationLoader]:
        whole = ValidationLoader(samples, layout)
        part = whole if most is None or most >= len(samples) else ValidationLoader(samples.subset(most), layout)
        return part, whole

    return {name: loaders(samples) for name, samples in data.validation.items()}


def validation_fingerprint(validation: Mapping[str, ValidationSamples], most: int | None = None) -> str:
    """Return a hash of the validation sets, or of their first `most` samples; "" without any."""
    facts = [(name, samples.fingerprint) for name, samples in validation.items()]
    return hashlib.sha256(repr((facts, most)).encode()).hexdigest() if facts else ""


def _cache(data: DataSection) -> Path:
    return Path(data.cache) if data.cache else default_cache_dir()


def _wanted(data: DataSection, prefix: str, tokenizer: Tokenizer) -> Wanted:
    """Return the configured settings of a dataset; raw inputs apply to data.train only."""
    inputs = (data.input,) if isinstance(data.input, str) else data.input or ()
    return Wanted(tokenizer, data.append_eod, inputs if prefix == data.train else ())


def _cut(dataset: IndexedDataset, split: str | None) -> tuple[Range, Range | None]:
    """Return the ranges of documents for training and for validation."""
    if split is None:
        return (0, len(dataset)), None
    weights = [float(weight) for weight in split.split(",")]
    training, validation = split_documents(len(dataset), weights)
    return training, validation if weights[1] else None


def _training_samples(config: RunConfig, dataset: IndexedDataset, documents: Range, requested: int) -> TrainingSamples:
    data = config.data
    return TrainingSamples(
        dataset,
        documents,
        data.sample_length,
        config.train.seed,
        order=data.order,
        requested_samples=requested,
        document_mask=data.masks_documents,
        stride=data.stride,
        cache=_orders(data, dataset),
        packing=data.packing,
    )


def _orders(data: DataSection, dataset: IndexedDataset) -> Path | None:
    """Return the folder of a dataset's kept orders; None for one whose order is faster made than read."""
    samples = len(dataset.tokens) // (data.stride or data.sample_length)
    return _cache(data) / "orders" if max(len(dataset), samples) >= KEPT_ORDERS_FROM else None


def _stages(places: DataPlaces, first_sample_of: Callable[[int], int]) -> list[MixtureStage]:
    """Return the mixture's stages; an order that begins in the middle of a run starts with the stage then active."""
    stages: list[MixtureStage] = []
    for stage in places.blends:
        weights = {part.prefix: part.weight for part in stage.blend}
        first = 0 if stage.from_step == 1 else max(0, first_sample_of(stage.from_step))
        if first == 0:
            stages.clear()
        stages.append(MixtureStage(first, tuple(weights.get(prefix, 0.0) for prefix in places.training)))
    return stages


def _validation_samples(
    data: DataSection,
    places: DataPlaces,
    opened: dict[str, IndexedDataset],
    ranges: dict[str, tuple[Range, Range | None]],
) -> Iterator[tuple[str, ValidationSamples]]:
    """Yield the configured validation sets, or the held-out part of each training dataset."""

    def samples(dataset: IndexedDataset, documents: Range) -> ValidationSamples:
        cache = _orders(data, dataset)
        return ValidationSamples(dataset, documents, data.sample_length, data.masks_documents, data.packing, cache)

    for name, prefix in places.validation:
        yield name, samples(opened[prefix], (0, len(opened[prefix])))
    for prefix, (_, documents) in ranges.items():
        if documents is not None:
            yield TOTAL if len(ranges) == 1 else Path(prefix).name, samples(opened[prefix], documents)


# Up to this many tokens are read; of a larger dataset, evenly spaced probes that together have as many.
SCANNED_TOKENS = 1 << 24
PROBE_TOKENS = 1 << 16
SEEN_DOCUMENTS = 4096


def check_foreign_dataset(
    dataset: IndexedDataset, eod_id: int | None, append_eod: bool | None, bos_id: int | None = None
) -> None:
    """Check a dataset whose tokenizer is not recorded, because another toolkit built it, by looking at its tokens.

    Their range is checked, and how documents end and begin.

    Args:
        eod_id: the end-of-document token; needed only if `append_eod` is not None.
        append_eod: whether documents must end with it; None: either.
        bos_id: the token that documents must begin with; None: any.

    Raises:
        DataError: a token is outside `dataset.vocab_size`, or documents end or begin otherwise.
    """
    total = len(dataset.tokens)
    probes = -(-min(total, SCANNED_TOKENS) // PROBE_TOKENS)
    for start in np.linspace(0, max(0, total - PROBE_TOKENS), probes, dtype=np.int64).tolist():
        dataset.read(range(start, min(start + PROBE_TOKENS, total)))
    if append_eod is not None:
        ended, count = ends_with(dataset, eod_id)
        if (ended < count) if append_eod else (2 * ended > count):
            raise DataError(
                f"{bin_path(dataset.prefix)}: of {count:,} documents looked at, {ended:,} end with the "
                f"end-of-document token {eod_id}, unlike data.append_eod={str(append_eod).lower()}; "
                "change the key, or build the dataset again"
            )
    if bos_id is not None:
        begun, count = begins_with(dataset, bos_id)
        if begun < count:
            raise DataError(
                f"{bin_path(dataset.prefix)}: of {count:,} documents looked at, {begun:,} begin with the token "
                f"{bos_id} of data.bos_token or of the run's other datasets; change the key, or build the dataset again"
            )


def ends_with(dataset: IndexedDataset, token: int | None) -> tuple[int, int]:
    """Return how many of the documents looked at end with the token, and the number of these documents."""
    begins, ends = _looked_at(dataset)
    return int(np.count_nonzero(dataset.tokens[ends - 1] == token)), len(begins)


def begins_with(dataset: IndexedDataset, token: int | None) -> tuple[int, int]:
    """Return how many of the documents looked at begin with the token, and the number of these documents."""
    begins, _ = _looked_at(dataset)
    return int(np.count_nonzero(dataset.tokens[begins] == token)), len(begins)


def _looked_at(dataset: IndexedDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the [first, end) tokens of some documents, without those whose first or last sequence is empty."""
    count = min(dataset.document_count, SEEN_DOCUMENTS)
    documents = np.linspace(0, max(0, dataset.document_count - 1), count, dtype=np.int64)
    begins, ends = dataset.document_index[documents], dataset.document_index[documents + 1]
    first, last = begins[ends > begins], ends[ends > begins] - 1  # sequences of each document that has one
    lengths, size = dataset.sequence_lengths, dataset.dtype.itemsize
    whole = (lengths[first] > 0) & (lengths[last] > 0)
    first, last = first[whole], last[whole]
    return dataset.sequence_pointers[first] // size, dataset.sequence_pointers[last] // size + lengths[last]
