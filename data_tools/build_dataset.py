"""Tokenize text files into an indexed dataset: PREFIX.bin, PREFIX.idx, PREFIX.sources, PREFIX.json (PREFIX.minhash)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from console import BuildBar, out, print_removed, run
from options import (
    Columns,
    EmptyDocuments,
    InputKind,
    Inputs,
    LargestMegabytes,
    MaxLoss,
    MessagesKey,
    OnErrorWord,
    StdinKind,
    TextKey,
    TxtDocuments,
    loss_policy,
    one_of,
    overlap_of,
    read_options,
    shard_of,
    weights_of,
)

from megalm.data.analysis.dataset_info import packed_padding
from megalm.data.builder.build_plan import BuildOptions, Filters
from megalm.data.builder.builder import build_files, check_build
from megalm.data.builder.dedup import Dedup
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.trained_tokens import trained_share
from megalm.data.tokenizers.chat_template import load_chat_template
from megalm.data.tokenizers.tokenizer import AUTO, describe_ends, load_tokenizer
from megalm.errors import DataError


def main(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="SentencePiece .model, Hugging Face tokenizer.json, or 'bytes'")],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the files to write")],
    workers: Annotated[int, typer.Option(min=1, help="processes; the result is the same for any number")] = 1,
    append_eod: Annotated[bool, typer.Option(help="end each document with the end-of-document token")] = True,
    eod_token: Annotated[
        str | None, typer.Option(help="this token ends a document, such as '<|endoftext|>' [default: the tokenizer's]")
    ] = None,
    bos_token: Annotated[
        str,
        typer.Option(
            help="this token begins a document, such as '<s>'; auto: what the tokenizer itself puts before a text; none"
        ),
    ] = AUTO,
    text_key: TextKey = "text",
    columns: Columns = None,
    txt_documents: TxtDocuments = "file",
    input_kind: InputKind = None,
    stdin_kind: StdinKind = None,
    messages_key: MessagesKey = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="with --messages-key: Jinja file of the chat template [default: the tokenizer's]"),
    ] = None,
    max_document_mb: LargestMegabytes = 32,
    on_error: OnErrorWord = "fail",
    empty_documents: EmptyDocuments = "skip",
    max_loss: MaxLoss = None,
    split: Annotated[str | None, typer.Option(help="95,5: PREFIX-train and PREFIX-validation; a third: -test")] = None,
    dedup: Annotated[
        str, typer.Option(help="none, exact, or minhash (near copies): remove repeated documents")
    ] = "none",
    minhash_threshold: Annotated[
        float, typer.Option(help="similarity from which documents are near copies, 0 to 1")
    ] = 0.8,
    min_characters: Annotated[int | None, typer.Option(help="remove shorter documents")] = None,
    max_characters: Annotated[int | None, typer.Option(help="remove longer documents")] = None,
    min_letter_share: Annotated[float | None, typer.Option(help="share of letters, whitespace aside, 0 to 1")] = None,
    max_repeated_line_share: Annotated[
        float | None, typer.Option(help="share of characters in repeated lines, 0 to 1")
    ] = None,
    max_word_length: Annotated[float | None, typer.Option(help="mean characters per word")] = None,
    exclude_overlap: Annotated[
        list[str] | None,
        typer.Option(help="evaluation set (file, folder, 'glob' or PREFIX): keep its text out; may be repeated"),
    ] = None,
    overlap_tokens: Annotated[
        int | None, typer.Option(help="words in a row that count as overlap [default: 13]")
    ] = None,
    overlap_action: Annotated[
        str | None, typer.Option(help="drop the document, or cut the overlap and keep what is around [default: drop]")
    ] = None,
    overlap_key: Annotated[
        str | None, typer.Option(help="A,B: these keys or columns of the sets [default: all that hold text]")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="0/16 to 15/16: build this part only; merge_datasets.py joins them")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="replace a dataset of this name")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="check options, inputs and tokenizer; read and write nothing")
    ] = False,
) -> None:
    """Build a dataset. A killed build resumes when you start it again; a finished one is not built again.

    \b
    python data_tools/build_dataset.py --input my.jsonl \\
        --tokenizer data/my.model --output-prefix data/my
    """
    policy = loss_policy(on_error, empty_documents, max_loss)
    filters = Filters(min_characters, max_characters, min_letter_share, max_repeated_line_share, max_word_length)
    if chat_template is not None and not messages_key:
        raise DataError(f"--chat-template {chat_template}: renders messages; name their key with --messages-key")
    options = BuildOptions(
        append_eod=append_eod,
        on_error=policy.on_error,
        empty_documents=policy.empty_documents,
        max_loss=policy.max_loss,
        read=read_options(text_key, columns, txt_documents, max_document_mb, input_kind, messages_key),
        filters=filters,
        dedup=one_of("--dedup", dedup, Dedup),
        minhash_threshold=minhash_threshold,
        split=weights_of(split),
        shard=shard_of(shard),
        overlap=overlap_of(exclude_overlap, overlap_tokens, overlap_action, overlap_key),
        chat=load_chat_template(chat_template, tokenizer) if messages_key else None,
    )
    if eod_token is not None and not append_eod:
        raise DataError(f"--eod-token {eod_token}: no token ends a document with --no-append-eod; omit one of them")
    loaded = load_tokenizer(tokenizer, eod_token, bos_token)
    stdin_kind = stdin_kind or options.read.kind or ".jsonl"
    if check:
        files = check_build(inputs, loaded, output_prefix, options, stdin_kind).files
        out.print(f"{output_prefix}: a build would read {len(files):,} files")
        return
    bar = BuildBar()
    with bar:
        built = build_files(
            inputs,
            loaded,
            output_prefix,
            options,
            workers=workers,
            progress=bar.tell,
            overwrite=overwrite,
            stdin_kind=stdin_kind,
        )
    if built.was_there:
        out.print(f"{output_prefix}: is already built from this input; nothing to do")
    if built.resumed:
        out.print(f"resumed after {built.resumed / 1e6:,.1f} MB of an earlier build")
    for report, prefix in zip(built.reports, options.output_prefixes(output_prefix), strict=True):
        out.print(
            f"{prefix}: {report.documents:,} documents, {report.tokens:,} tokens ({report.dtype}), "
            f"{report.text_bytes / max(1, report.tokens):.2f} bytes per token, "
            f"unigram entropy {report.unigram_entropy:.3f} nats"
        )
        if report.trained:
            out.print(f"{prefix}: trained tokens {trained_share(report.trained['tokens'], report.tokens)}")
        if report.tokens:
            advice = "train them whole: " if report.trained else ""
            out.print(f"{prefix}: {advice}data.packing=best_fit has {packed_padding(IndexedDataset(prefix))}")
        if report.inexact_documents:
            names = ", ".join(report.inexact_names[:3])
            out.print(f"{report.inexact_documents:,} documents do not decode back exactly, the first: {names}")
    if ends := describe_ends(loaded, append_eod):
        out.print(ends)
    print_removed(built)


if __name__ == "__main__":
    run(main)
