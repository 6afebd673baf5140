"""Options that several tools share, and their conversion to the types of megalm.data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import typer

from megalm.data.builder.decontamination import OverlapAction, OverlapOptions
from megalm.data.readers.document_reader import LossPolicy, OnError
from megalm.data.readers.input_files import KINDS
from megalm.data.readers.losses import share_of_text
from megalm.data.readers.records import ReadOptions
from megalm.errors import DataError

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input", help="file, folder, 'glob', s3://... or - of .jsonl .json .txt .md .parquet (.gz .zst .bz2 .xz)"
    ),
]
StdinKind = Annotated[
    str | None,
    typer.Option(help="format of standard input (--input -): .jsonl .json .txt or .md [default: .jsonl]"),
]
InputKind = Annotated[
    str | None,
    typer.Option(help="what all files hold, whatever their names: .jsonl (lines) .json (array) .txt .md or .parquet"),
]
TextKey = Annotated[str, typer.Option(help="key of the text in JSON objects, or its column in parquet tables")]
Columns = Annotated[str | None, typer.Option(help="A,B: these keys or columns instead, joined by a blank line")]
MessagesKey = Annotated[
    str | None,
    typer.Option(help="key or column of chat messages: only the assistant's are trained [not with --text-key]"),
]
TxtDocuments = Annotated[str, typer.Option(help="a .txt file is one document (file) or several (blank-line)")]
LargestMegabytes = Annotated[int, typer.Option("--max-document-mb", min=1, max=2047, help="refuse longer documents")]
OnErrorWord = Annotated[str, typer.Option(help="fail or skip, at unreadable documents and files")]
EmptyDocuments = Annotated[str, typer.Option(help="skip (and count) or fail, at documents without text")]
MaxLoss = Annotated[
    str | None,
    typer.Option(help="with --on-error skip: fail if a larger share of documents or bytes is lost [default: 1%]"),
]


def read_options(
    text_key: str,
    columns: str | None,
    documents: str,
    largest_megabytes: int,
    input_kind: str | None,
    messages_key: str | None = None,
) -> ReadOptions:
    one_of("--txt-documents", documents, Literal["file", "blank-line"])
    names = tuple(name.strip() for name in columns.split(",")) if columns else ()
    if columns and not all(names):
        raise DataError(f"--columns {columns}: has an empty name; separate the names by commas, such as title,text")
    kind = f".{input_kind.removeprefix('.')}" if input_kind else ""
    if kind and kind not in KINDS:
        raise DataError(f"--input-kind {kind}: is unknown; choose one of {', '.join(KINDS)}")
    if messages_key and (names or text_key != ReadOptions().text_key):
        other = f"--columns {columns}" if names else f"--text-key {text_key}"
        raise DataError(f"--messages-key {messages_key} and {other}: a document is one or the other; omit one of them")
    return ReadOptions(text_key, names, documents, largest_megabytes << 20, kind, messages_key or "")


def overlap_of(
    files: Sequence[str] | None, tokens: int | None, action: str | None, keys: str | None
) -> OverlapOptions | None:
    """Return what is kept out; None without `files`. Raises DataError for an option without them."""
    given = {"--overlap-tokens": tokens, "--overlap-action": action, "--overlap-key": keys}
    if not files:
        for option, value in given.items():
            if value is not None:
                raise DataError(f"{option} {value}: needs evaluation sets; name them with --exclude-overlap FILE")
        return None
    names = tuple(name.strip() for name in keys.split(",")) if keys else ()
    if keys is not None and not (names and all(names)):
        raise DataError(
            f"--overlap-key {keys!r}: has an empty name; separate the names by commas, such as question,answer"
        )
    chosen = one_of("--overlap-action", action or "drop", OverlapAction)
    return OverlapOptions(tuple(files), 13 if tokens is None else tokens, chosen, names)


def loss_policy(on_error: str, empty_documents: str, max_loss: str | None) -> LossPolicy:
    return LossPolicy(
        one_of("--on-error", on_error, OnError),
        one_of("--empty-documents", empty_documents, OnError),
        None if max_loss is None else share_of_text(max_loss, "--max-loss"),
    )


def one_of(option: str, value: str, words: Any) -> Any:
    """Return the value. Raises DataError if it is none of the words of a Literal."""
    if value not in get_args(words):
        raise DataError(f"{option} {value}: is unknown; choose one of {', '.join(get_args(words))}")
    return value


def weights_of(value: str | None) -> tuple[float, ...]:
    """Parse "95,5" into numbers."""
    try:
        weights = tuple(float(weight) for weight in value.split(",")) if value else ()
    except ValueError:
        weights = (-1.0,)
    if any(not 0 < weight < float("inf") for weight in weights):
        raise DataError(f"--split {value}: give two or three positive weights, such as 95,5 or 90,5,5")
    return weights


def shard_of(value: str | None) -> tuple[int, int]:
    """Parse "2/16" into numbers."""
    if not value:
        return 0, 1
    shard, slash, shards = value.partition("/")
    if not (slash and shard.isdigit() and shards.isdigit()):
        raise DataError(f"--shard {value}: give it as NUMBER/COUNT, from 0/16 to 15/16")
    return int(shard), int(shards)
