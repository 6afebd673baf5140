"""Is a dataset what a run wants, and if not: what differs, which command builds it again, or do so."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from megalm.data.builder import BuildOptions, BuildProgress, Built, build_files
from megalm.data.files import read_json
from megalm.data.filters import Filters
from megalm.data.indexed import bin_path, idx_path, sidecar_path
from megalm.data.inputs import STDIN, InputFile
from megalm.data.plan import SPLIT_NAMES
from megalm.data.records import ReadOptions
from megalm.data.tokenizer import Tokenizer
from megalm.errors import DataError

Rebuild = Literal["never", "auto", "always"]


def ensure_dataset(
    prefix: str | Path,
    tokenizer: Tokenizer,
    rebuild: Rebuild = "never",
    append_eod: bool | None = None,
    workers: int = 1,
    progress: Callable[[BuildProgress], None] | None = None,
) -> Built | None:
    """See that the dataset is of this tokenizer (and ends documents so), or build it again of what it was made of.

    Call it on one rank; the others wait and then open the files. None: nothing was done.

    Args:
        rebuild: "never" refuses what differs; "auto" builds it again, also where an input file has changed or the
            dataset's files are gone; "always" builds it again in any case.
        append_eod: whether documents must end with the end-of-document token; None: as they are.

    Raises:
        DataError: what differs, and the command that builds it again; with another `rebuild`, a dataset of which
            nobody noted what it was made of, and what building raises.
    """
    sidecar = _sidecar(prefix)
    if sidecar is None:
        if rebuild == "never":
            return None  # built by another toolkit: nothing is known, nothing can differ
        raise DataError(f"{sidecar_path(prefix)}: is not there, so nothing says what to build {prefix} of")
    found = differences(sidecar, tokenizer, append_eod)
    if rebuild == "never":
        if found:
            command = rebuild_command(prefix, sidecar, tokenizer, append_eod)
            raise DataError(f"{prefix}: {'; '.join(found)}. Build it again: {command}, or with data.rebuild=auto")
        return None
    gone = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.exists()]
    if rebuild == "auto" and not found and not gone and not changed_inputs(sidecar):
        return None
    options, inputs = _options(sidecar, append_eod), _inputs(prefix, sidecar)
    return build_files(
        inputs, tokenizer, _base(prefix, options), options, workers=workers, progress=progress, overwrite=True
    )


def differences(sidecar: dict[str, Any], tokenizer: Tokenizer, append_eod: bool | None = None) -> list[str]:
    """What of a PREFIX.json is not as wanted, for people; none: all is."""
    found, built = [], sidecar.get("tokenizer") or {}
    if built and built["fingerprint"] != tokenizer.fingerprint:
        found.append(
            f"was built with the tokenizer {built['name']} of {built['vocab_size']:,} ids "
            f"({built['fingerprint'][:12]}), not {tokenizer.name} of {tokenizer.vocab_size:,} "
            f"({tokenizer.fingerprint[:12]})"
        )
    ended = built.get("eod_id") is not None
    if built and append_eod is not None and ended != append_eod:
        found.append(f"its documents {'end' if ended else 'do not end'} with the end-of-document token")
    return found


def changed_inputs(sidecar: dict[str, Any]) -> list[str]:
    """Input files whose size or time is not the recorded one, or that are gone."""
    changed = []
    for entry in sidecar["inputs"]:
        if isinstance(entry, dict) and entry["path"] != STDIN:
            path = Path(entry["path"])
            file = InputFile.found_at(path) if path.exists() else None
            if file is None or (file.size, file.mtime_ns) != (entry["bytes"], entry["mtime_ns"]):
                changed.append(entry["path"])
    return changed


def rebuild_command(
    prefix: str | Path, sidecar: dict[str, Any], tokenizer: Tokenizer, append_eod: bool | None = None
) -> str:
    """The line of shell that builds the dataset again with this tokenizer."""
    options, inputs = _options(sidecar, append_eod), _inputs(prefix, sidecar)
    words = ["python", "data_tools/build_dataset.py"]
    for path in inputs:
        words += ["--input", path]
    words += ["--tokenizer", tokenizer.spec, "--output-prefix", _base(prefix, options), "--overwrite"]
    return shlex.join([*words, *_option_words(options)])


def _option_words(options: BuildOptions) -> list[str]:
    plain, read = BuildOptions(), options.read
    stated: list[tuple[str, object, object]] = [
        ("text-key", read.text_key, plain.read.text_key),
        ("columns", ",".join(read.columns), ""),
        ("txt-documents", read.documents, plain.read.documents),
        ("max-document-mb", read.largest_bytes >> 20, plain.read.largest_bytes >> 20),
        ("on-error", options.on_error, plain.on_error),
        ("dedup", options.dedup, plain.dedup),
        ("minhash-threshold", options.minhash_threshold, plain.minhash_threshold),
        ("split", ",".join(f"{weight:g}" for weight in options.split), ""),
        ("shard", f"{options.shard[0]}/{options.shard[1]}", "0/1"),
        *((name.replace("_", "-"), getattr(options.filters, name), None) for name in options.filters.names),
    ]
    words = [] if options.append_eod else ["--no-append-eod"]
    return words + [word for name, value, usual in stated if value != usual for word in (f"--{name}", str(value))]


def _sidecar(prefix: str | Path) -> dict[str, Any] | None:
    path = sidecar_path(prefix)
    facts = read_json(path) if path.exists() else None
    return facts if isinstance(facts, dict) and "bin_sha256" in facts else None


def _options(sidecar: dict[str, Any], append_eod: bool | None) -> BuildOptions:
    recorded = dict(sidecar["options"])
    if "shard" not in recorded:  # merged, or made of documents in memory
        return BuildOptions(append_eod=bool(recorded.get("append_eod", True)))
    recorded.pop("stdin_kind", None)
    read = recorded.pop("read")
    return BuildOptions(
        **recorded
        | {
            "read": ReadOptions(**read | {"columns": tuple(read["columns"])}),
            "filters": Filters(**recorded["filters"]),
            "split": tuple(recorded["split"]),
            "shard": tuple(recorded["shard"]),
            "append_eod": recorded["append_eod"] if append_eod is None else append_eod,
        }
    )


def _inputs(prefix: str | Path, sidecar: dict[str, Any]) -> Sequence[str]:
    paths = [entry["path"] for entry in sidecar["inputs"] if isinstance(entry, dict)]
    if not paths or STDIN in paths or "shard" not in sidecar["options"]:
        raise DataError(
            f"{prefix}: was built of standard input, merged, or made by a recipe, so it cannot be built again from "
            f"{sidecar_path(prefix).name} alone; build it as it was built before, with the tokenizer wanted"
        )
    return paths


def _base(prefix: str | Path, options: BuildOptions) -> str:
    """The prefix that was given to the build: without -train of a split."""
    name = str(prefix)
    for part in SPLIT_NAMES[: len(options.split)]:
        name = name.removesuffix(f"-{part}")
    return name
