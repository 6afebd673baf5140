"""Train a SentencePiece tokenizer on text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from console import out, print_skipped, run
from options import (
    Columns,
    EmptyDocuments,
    InputKind,
    Inputs,
    LargestMegabytes,
    MaxLoss,
    OnErrorWord,
    StdinKind,
    TextKey,
    TxtDocuments,
    loss_policy,
    read_options,
)

from megalm.data.readers.document_reader import read_documents
from megalm.data.readers.input_files import ReadReport, find_inputs
from megalm.data.tokenizers.training import ModelType, report_path, train_tokenizer
from megalm.errors import DataError
from megalm.utils.atomic_files import refuse_overwriting_inputs


def main(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="the .model file to write")],
    vocab_size: Annotated[
        int, typer.Option(min=1, help="number of pieces, with the 260 for bytes and special tokens")
    ] = 32_000,
    model_type: Annotated[ModelType, typer.Option(help="unigram encodes faster, bpe trains faster")] = "unigram",
    text_key: TextKey = "text",
    columns: Columns = None,
    txt_documents: TxtDocuments = "file",
    input_kind: InputKind = None,
    stdin_kind: StdinKind = None,
    max_document_mb: LargestMegabytes = 32,
    max_sentences: Annotated[
        int, typer.Option(min=1, help="maximum number of lines to train on, sampled evenly")
    ] = 1_000_000,
    special_token: Annotated[
        list[str] | None, typer.Option(help="a token that text never encodes to; repeatable")
    ] = None,
    on_error: OnErrorWord = "fail",
    empty_documents: EmptyDocuments = "skip",
    max_loss: MaxLoss = None,
    overwrite: Annotated[bool, typer.Option(help="replace an output of this name")] = False,
) -> None:
    """Train a tokenizer that decodes every text back exactly, and write it with a report beside it.

    \b
    python data_tools/train_tokenizer.py --input my.jsonl \\
        --output data/my.model --vocab-size 8192
    """
    if output.suffix != ".model":
        raise DataError(f"{output}: the output must be named NAME.model")
    policy, reading = loss_policy(on_error, empty_documents, max_loss), ReadReport()
    read = read_options(text_key, columns, txt_documents, max_document_mb, input_kind)
    files = find_inputs(inputs, reading, stdin_kind or read.kind or ".jsonl", read.kind)
    refuse_overwriting_inputs([output, report_path(output)], (file.on_disk for file in files))
    for path in (output, report_path(output)):
        if path.exists() and not overwrite:
            raise DataError(f"{path}: already exists; choose another output, or overwrite it (--overwrite)")
    documents = read_documents(files, policy, reading, read)
    report = train_tokenizer(
        (document.text for document in documents),
        output,
        vocab_size=vocab_size,
        model_type=model_type,
        max_sentences=max_sentences,
        special_tokens=special_token or (),
        progress=out.print if out.is_terminal else None,
    )
    out.print(
        f"{output}: {report.vocab_size} pieces ({report.model_type}) from {report.documents:,} documents, "
        f"{report.text_bytes / 1e6:,.1f} MB; trained on {report.sentences_used:,} of {report.sentences:,} lines"
    )
    print_skipped(reading)


if __name__ == "__main__":
    run(main)
