"""Options that several tools of this folder share, from the command line's words to what megalm.data takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast, get_args

import typer

from megalm.data.builder.dedup import Dedup
from megalm.data.readers.document_reader import OnError
from megalm.data.readers.records import ReadOptions
from megalm.errors import DataError

Inputs = Annotated[
    list[str],
    typer.Option("--input", help="file, folder, 'glob' or - of .jsonl .json .txt .md .parquet (.gz .zst .bz2 .xz)"),
]
StdinKind = Annotated[str, typer.Option(help="what comes by --input -: .jsonl .json .txt or .md")]
TextKey = Annotated[str, typer.Option(help="where the text is in JSON objects and parquet tables")]
Columns = Annotated[str | None, typer.Option(help="A,B: these keys or columns instead, joined by a blank line")]
TxtDocuments = Annotated[str, typer.Option(help="a .txt file is one document (file) or several (blank-line)")]
LargestMegabytes = Annotated[int, typer.Option("--max-document-mb", min=1, max=2047, help="refuse longer documents")]
OnErrorWord = Annotated[str, typer.Option(help="fail or skip, at what cannot be read and at empty documents")]


def read_options(text_key: str, columns: str | None, documents: str, largest_megabytes: int) -> ReadOptions:
    if documents not in ("file", "blank-line"):
        raise DataError(f"--txt-documents {documents}: is unknown; choose file or blank-line")
    names = tuple(name.strip() for name in columns.split(",")) if columns else ()
    if columns and not all(names):
        raise DataError(f"--columns {columns}: has an empty name; state names with commas between, such as title,text")
    return ReadOptions(text_key, names, documents, largest_megabytes << 20)


def policy(stated: str) -> OnError:
    return cast(OnError, _one_of("--on-error", stated, get_args(OnError)))


def dedup_of(stated: str) -> Dedup:
    return cast(Dedup, _one_of("--dedup", stated, get_args(Dedup)))


def _one_of(option: str, stated: str, known: Sequence[str]) -> str:
    if stated not in known:
        raise DataError(f"{option} {stated}: is unknown; choose one of {', '.join(known)}")
    return stated


def weights_of(stated: str | None) -> tuple[float, ...]:
    """ "95,5" as numbers."""
    try:
        weights = tuple(float(weight) for weight in stated.split(",")) if stated else ()
    except ValueError:
        weights = (-1.0,)
    if any(not 0 < weight < float("inf") for weight in weights):
        raise DataError(f"--split {stated}: state two or three positive weights, such as 95,5 or 90,5,5")
    return weights


def shard_of(stated: str | None) -> tuple[int, int]:
    """ "2/16" as numbers."""
    if not stated:
        return 0, 1
    shard, slash, shards = stated.partition("/")
    if not (slash and shard.isdigit() and shards.isdigit()):
        raise DataError(f"--shard {stated}: state it as NUMBER/OF, from 0/16 to 15/16")
    return int(shard), int(shards)
