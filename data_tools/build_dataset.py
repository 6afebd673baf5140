"""Tokenize text files into an indexed dataset: PREFIX.bin, PREFIX.idx, PREFIX.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from console import BuildBar, one_line_errors, out, policy, run, tell_reading

from megalm.data.builder import build_dataset
from megalm.data.corpus import PACKINGS, ReadReport, find_files, iter_documents
from megalm.data.tokenizer import load_tokenizer


def main(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="file, folder or 'glob' of .jsonl .json .txt .md .parquet (.gz .zst .bz2 .xz)"),
    ],
    tokenizer: Annotated[str, typer.Option(help="SentencePiece .model, Hugging Face tokenizer.json, or 'bytes'")],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the three files to write")],
    workers: Annotated[int, typer.Option(min=1, help="processes; the result is the same for any number")] = 1,
    append_eod: Annotated[bool, typer.Option(help="end each document with the end-of-document token")] = True,
    text_key: Annotated[str, typer.Option(help="where the text is in JSON objects and parquet tables")] = "text",
    on_error: Annotated[str, typer.Option(help="raise or skip, at what cannot be read")] = "raise",
    overwrite: Annotated[bool, typer.Option(help="replace a dataset of this name")] = False,
) -> None:
    """Build a dataset; each document is decoded again to see that the tokenizer loses nothing.

    Example: python data_tools/build_dataset.py --input my.jsonl --tokenizer data/my.model --output-prefix data/my
    """
    with one_line_errors():
        reading = ReadReport()
        files = find_files(inputs)
        # The size of packed files and tables says little about that of their text.
        plain = all(file.suffix not in (*PACKINGS, ".parquet") for file in files)
        with BuildBar(sum(file.stat().st_size for file in files) if plain else None) as bar:
            report = build_dataset(
                iter_documents(inputs, text_key=text_key, on_error=policy(on_error), report=reading),
                load_tokenizer(tokenizer),
                output_prefix,
                append_eod=append_eod,
                workers=workers,
                progress=bar.update,
                inputs=inputs,
                overwrite=overwrite,
            )
        out.print(
            f"{output_prefix}: {report.documents:,} documents, {report.tokens:,} tokens ({report.dtype}), "
            f"{report.text_bytes / max(1, report.tokens):.2f} bytes a token, "
            f"unigram entropy {report.unigram_entropy:.3f} nats"
        )
        tell_reading(reading)
        if report.empty_documents:
            out.print(f"left out {report.empty_documents:,} empty documents")
        if report.inexact_documents:
            names = ", ".join(report.inexact_names[:3])
            out.print(f"{report.inexact_documents:,} documents do not decode back exactly, the first: {names}")


if __name__ == "__main__":
    run(main)
