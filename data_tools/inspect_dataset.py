"""Describe an indexed dataset, verify it, show its documents and steps, and find outliers in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from console import out, run
from options import one_of, weights_of

from megalm.cli.find_run import find_run
from megalm.data.analysis.dataset_info import PACKED_LENGTHS, describe, document_text, marked_text, statistics, verify
from megalm.data.analysis.sample_sources import TokenSpan, spans_of
from megalm.data.builder.workspace import tokenizer_files
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import dataset_paths
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import PackingKind, TrainingSamples, split_documents
from megalm.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import refuse_overwriting_inputs
from megalm.utils.progress import ProgressBar, percent


def main(
    prefix: Annotated[Path | None, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx")] = None,
    check: Annotated[
        bool,
        typer.Option("--verify", help="read everything, and check the index, the vocabulary and the recorded hashes"),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="decodes tokens to text, and must match the recorded tokenizer")
    ] = None,
    document: Annotated[int | None, typer.Option(min=0, help="show this document, from 0")] = None,
    stats: Annotated[bool, typer.Option(help="lengths, frequent tokens, fallback, duplicates")] = False,
    scan: Annotated[bool, typer.Option(help="measure the tokens in windows and rank the outliers")] = False,
    around: Annotated[int | None, typer.Option(min=0, help="with --scan: the windows around this token")] = None,
    window: Annotated[int, typer.Option(min=16, help="with --scan: tokens per window")] = 512,
    report: Annotated[Path | None, typer.Option(help="with --scan: write REPORT.png and REPORT.html")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="show the samples of this training step")] = None,
    named_run: Annotated[
        str | None, typer.Option("--run", help="with --step: the run, its folder or a name under runs/")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="with --step PREFIX: train_batch_size")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="data.sequence_length, with --step PREFIX (default 256), or to pack")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="with --step PREFIX: data.stride")] = None,
    seed: Annotated[int, typer.Option(min=0, help="with --step PREFIX: train.seed")] = 1234,
    split: Annotated[str | None, typer.Option(help="with --step PREFIX: data.split")] = None,
    packing: Annotated[str, typer.Option(help="with --step PREFIX: data.packing")] = "stream",
) -> None:
    """Print facts about a dataset; exit code 2 if it is damaged or has another tokenizer.

    \b
    python data_tools/inspect_dataset.py data/my --scan \\
        --tokenizer data/my.model --report my-scan
    python data_tools/inspect_dataset.py --run mine --step 500
    """
    if named_run is not None:
        if prefix is not None or step is None:
            raise DataError(f"--run {named_run}: takes --step and no PREFIX; the run determines the dataset")
        _show_step_of_run(find_run(named_run), step)
        return
    if prefix is None:
        raise DataError("give the PREFIX of a dataset, or --run and --step")
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    facts = describe(prefix, loaded, (sequence_length,) if sequence_length else PACKED_LENGTHS)
    if document is not None:
        out.text(document_text(prefix, document, loaded))
    elif step is not None:
        if batch_size is None:
            raise DataError(f"--step {step}: add --batch-size, the run's train_batch_size, or name the run with --run")
        dataset = IndexedDataset(prefix, loaded.vocab_size if loaded else None)
        weights, kind = weights_of(split), one_of("--packing", packing, PackingKind)
        documents = split_documents(len(dataset), weights)[0] if weights else (0, len(dataset))
        samples = TrainingSamples(dataset, documents, sequence_length or 256, seed, stride=stride, packing=kind)
        only = BlendedSamples([samples], [MixtureStage(0, (1.0,))])
        _show_pieces(spans_of(only, (step - 1) * batch_size, batch_size), loaded)
    elif scan or around is not None:
        _scan(prefix, loaded, around, window, report)
    else:
        if check:
            with ProgressBar("verifying", len(IndexedDataset(prefix).tokens), shown=percent) as bar:
                facts |= verify(prefix, loaded, bar.advance)
        width = max(map(len, facts))
        for name, value in facts.items():
            out.print(f"{name:<{width}}  {value}")
        if stats:
            _show_statistics(prefix, loaded)


def _show_step_of_run(run: Path, step: int) -> None:
    """Print the samples of a run, as recorded in its folder."""
    from megalm.train.step_lookup import samples_of_step

    read = samples_of_step(run, step, out.print)
    tense = "read" if read.trained else "will read"
    out.print(f"step {step} of {run} {tense} samples {read.first:,} to {read.end - 1:,}")
    _show_pieces(read.pieces, read.tokenizer)


def _show_pieces(pieces: Iterable[TokenSpan], tokenizer: Tokenizer | None) -> None:
    for piece in pieces:
        where = f"{piece.prefix} document {piece.document}"
        source = "" if piece.source is None else f", {piece.source}"
        out.print(f"--- sample {piece.sample}: {where}{source}, its tokens {piece.first:,} to {piece.end:,}")
        out.text(marked_text(piece.tokens, piece.trained, tokenizer))


def _show_statistics(prefix: Path, tokenizer: Tokenizer | None) -> None:
    dataset = IndexedDataset(prefix)
    with ProgressBar("counting", 2 * len(dataset.tokens), shown=percent) as bar:
        found = statistics(dataset, tokenizer, tell=bar.advance)
    out.print("\ntokens per sequence  sequences")
    most = max((count for _, _, count in found.length_histogram), default=1)
    for low, high, count in found.length_histogram:
        out.print(f"{f'{low:,} to {high:,}':>19}  {count:>10,}  {'#' * round(40 * count / most)}")
    if found.tokens_per_byte is not None:
        out.print(f"\ntokens per byte  {found.tokens_per_byte:.4f}")
        out.print(f"fallback tokens  {found.fallback_share:.4%}")
    out.print(f"duplicates       {found.duplicates:,}")
    out.print("\nmost frequent tokens")
    for token, share in found.frequent:
        shown = repr(tokenizer.decode([token])) if tokenizer else ""
        out.print(f"{token:>8}  {share:8.4%}  {shown}")


def _scan(prefix: Path, tokenizer: Tokenizer | None, around: int | None, window: int, report: Path | None) -> None:
    from megalm.data.analysis.anomaly_scan import (
        MEASURES,
        STRANGE,
        scan,
        scan_paths,
        strange_stretches,
        stretch_at,
        write_scan,
    )

    dataset = IndexedDataset(prefix)
    if report is not None:
        read = [*dataset_paths(prefix), *(tokenizer_files(tokenizer.spec) if tokenizer else ())]
        refuse_overwriting_inputs(scan_paths(report), read)
    if around is not None and around >= len(dataset.tokens):
        raise DataError(f"{prefix}: --around {around}: the dataset has {len(dataset.tokens):,} tokens, numbered from 0")
    with ProgressBar("scanning", 2 * len(dataset.tokens), shown=percent) as bar:
        scanned = scan(dataset, tokenizer.fallback_ids() if tokenizer else None, window, bar.advance)
    if around is not None:
        middle = around // window
        out.print("tokens                      score  " + "  ".join(f"{name:>12}" for name in MEASURES) + "  document")
        for place in range(max(0, middle - 5), min(len(scanned.scores), middle + 6)):
            values = "  ".join(f"{scanned.measures[name][place]:12.3f}" for name in MEASURES)
            source = stretch_at(dataset, scanned, place, place + 1).source
            mark = ">" if place == middle else " "
            out.print(f"{mark}{f'{place * window:,} on':<25}  {scanned.scores[place]:5.1f}  {values}  {source}")
    stretches = strange_stretches(dataset, scanned)
    if not stretches:
        out.print(f"no window is further than {STRANGE:.0f} usual distances from the median")
    for stretch in stretches:
        out.print(
            f"tokens {stretch.first:,} to {stretch.end:,}: score {stretch.score:.1f}, {stretch.reason} "
            f"{stretch.value:.3f} (median {stretch.median:.3f}), {stretch.source}"
        )
    if report is not None:
        out.print("wrote " + " and ".join(map(str, write_scan(scanned, stretches, str(prefix), report))))


if __name__ == "__main__":
    run(main)
