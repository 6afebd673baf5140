"""inspect_dataset.py --step: print the documents that a training step reads, and their text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from console import out
from options import weights_of

from megalm.data.analysis.dataset_info import marked_text
from megalm.data.analysis.sample_sources import TokenSpan, spans_of
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import PackingKind, TrainingSamples, split_documents
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import DataError


def show_step_of_run(run: Path, step: int) -> None:
    """Print the samples of a run, as recorded in its folder."""
    from megalm.train.step_lookup import samples_of_step

    read = samples_of_step(run, step, out.print)
    tense = "read" if read.trained else "will read"
    out.print(f"step {step} of {run} {tense} samples {read.first:,} to {read.end - 1:,}")
    _show(read.pieces, read.tokenizer)


def show_step_of_dataset(
    prefix: Path,
    tokenizer: Tokenizer | None,
    step: int,
    batch_size: int | None,
    sequence_length: int,
    stride: int | None,
    seed: int,
    split: str | None,
    packing: PackingKind,
) -> None:
    """Print the samples of a run on one dataset with these settings; the run need not exist."""
    if batch_size is None:
        raise DataError(f"--step {step}: add --batch-size, the run's train_batch_size, or name the run with --run")
    dataset = IndexedDataset(prefix, tokenizer.vocab_size if tokenizer else None)
    weights = weights_of(split)
    documents = split_documents(len(dataset), weights)[0] if weights else (0, len(dataset))
    samples = TrainingSamples(dataset, documents, sequence_length, seed, stride=stride, packing=packing)
    only = BlendedSamples([samples], [MixtureStage(0, (1.0,))])
    _show(spans_of(only, (step - 1) * batch_size, batch_size), tokenizer)


def _show(pieces: Iterable[TokenSpan], tokenizer: Tokenizer | None) -> None:
    for piece in pieces:
        where = f"{piece.prefix} document {piece.document}"
        source = "" if piece.source is None else f", {piece.source}"
        out.print(f"--- sample {piece.sample}: {where}{source}, its tokens {piece.first:,} to {piece.end:,}")
        out.text(marked_text(piece.tokens, piece.trained, tokenizer))
