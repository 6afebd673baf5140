"""Check whether a dataset is what a run wants; if not, report the differences and the build command, or rebuild it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from megalm.data.builder.build_plan import SPLIT_NAMES, BuildOptions
from megalm.data.builder.builder import Built, build_files
from megalm.data.builder.decontamination import DATASET
from megalm.data.indexed.dataset import bin_path, idx_path, sidecar_path
from megalm.data.indexed.metadata import read_sidecar, recorded_paths
from megalm.data.readers.input_files import STDIN, InputFile, ReadReport, find_inputs
from megalm.data.tokenizers.tokenizer import NONE, Tokenizer
from megalm.errors import DataError
from megalm.utils.remote_files import is_remote

Rebuild = Literal["never", "auto", "always"]


@dataclass(frozen=True)
class Wanted:
    """A run's requirements for a dataset.

    Attributes:
        append_eod: whether documents must end with the end-of-document token; None: either.
        inputs: files, folders and globs that it must be built from; empty: any.
    """

    tokenizer: Tokenizer
    append_eod: bool | None = None
    inputs: Sequence[str] = ()


def ensure_dataset(
    prefix: str | Path,
    wanted: Wanted,
    rebuild: Rebuild = "never",
    workers: int = 1,
    tell: Callable[[str], None] | None = None,
) -> Built | None:
    """Ensure that the dataset is as wanted, or rebuild it from its recorded inputs or from `wanted.inputs`.

    Call it on one rank; the others wait and then open the files. Returns None if nothing was done.

    Args:
        rebuild: "never" refuses a dataset that differs; "auto" rebuilds it, also if an input file has changed or the
            dataset's files are gone (missing raw text is not a reason); "always" rebuilds it in any case.
        tell: called with a progress line before a build.

    Raises:
        DataError: with "never", the differences and the command that rebuilds the dataset; otherwise, its inputs are
            not recorded, or building fails.
    """
    say = tell or (lambda line: None)
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        return _build_first(prefix, wanted, workers, say) if rebuild != "never" else None
    found = differences(sidecar, wanted)
    if rebuild == "never":
        if found:
            other = _other_tokens(sidecar.get("tokenizer") or {}, wanted.tokenizer)
            start = f"Set the right {other[0]}, or build" if other else "Build"
            raise DataError(f"{prefix} {'; '.join(found)}. {start} {_how(prefix, sidecar, wanted)}")
        return None
    found += [f"{path.name} is missing" for path in (bin_path(prefix), idx_path(prefix)) if not path.exists()]
    found += [f"its input {path} differs in size or time from the record" for path in changed_inputs(sidecar)[:1]]
    if rebuild == "auto" and not found:
        return None
    recorded = _inputs(prefix, sidecar)  # also raises if it cannot be rebuilt at all
    options = _options(sidecar, wanted.append_eod)
    say(f"rebuilding {prefix}: {'; '.join(found) or 'data.rebuild=always'}")
    built = build_files(
        wanted.inputs or recorded,
        wanted.tokenizer,
        build_prefix(prefix),
        options,
        workers=workers,
        overwrite=True,
        again=rebuild == "always",
    )
    return None if built.was_there else built  # a file with another time can have the same content


def differences(sidecar: dict[str, Any], wanted: Wanted) -> list[str]:
    """Return the differences between a PREFIX.json and what is wanted, as messages; empty if there are none."""
    found, built = [], sidecar.get("tokenizer") or {}
    if other_tokens := _other_tokens(built, wanted.tokenizer):
        found.append(other_tokens[1])
    ended = built.get("eod_id") is not None
    if built and wanted.append_eod is not None and ended != wanted.append_eod:
        found.append(f"has documents that {'end' if ended else 'do not end'} with the end-of-document token")
    if wanted.inputs:
        used = {_whole_name(path) for path in recorded_paths(sidecar)}
        kind = sidecar["options"].get("read", {}).get("kind", "")
        named = {path for entry in wanted.inputs for path in _named_by(entry, kind, used)}
        if other := sorted(named ^ used):
            word = "not built from" if other[0] in named else "built from"
            found.append(f"was {word} {other[0]}, unlike data.input")
    return found


def _other_tokens(built: dict[str, Any], tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Return the key that chooses the tokens, and how they differ; None if they do not, or a dataset records none."""
    if built and built["fingerprint"] != tokenizer.fingerprint:
        return "data.tokenizer", (
            f"was built with the tokenizer {built['name']} of {built['vocab_size']:,} ids "
            f"({built['fingerprint'][:12]}), not {tokenizer.name} of {tokenizer.vocab_size:,} "
            f"({tokenizer.fingerprint[:12]})"
        )
    eod_id, bos_id = built.get("eod_id"), built.get("bos_id")
    if built and bos_id != tokenizer.bos_id:
        has, wants = (
            "their text" if token is None else f"{tokenizer.with_bos(token).bos_token} (id {token})"
            for token in (bos_id, tokenizer.bos_id)
        )
        return "data.bos_token", f"has documents that begin with {has}, not with {wants}"
    if eod_id is not None and tokenizer.eod_is_chosen and eod_id != tokenizer.eod_id:
        return "data.eod_token", (
            f"has documents that end with {tokenizer.with_eod(eod_id).eod_token} (id {eod_id}), "
            f"not {tokenizer.eod_token} (id {tokenizer.eod_id})"
        )
    return None


def _named_by(entry: str, kind: str, used: set[str]) -> set[str]:
    """Return the files that an entry of `data.input` names; if they are gone, those `used` under this name."""
    try:
        return {_whole_name(file.path) for file in find_inputs([entry], ReadReport(), input_kind=kind)}
    except DataError:
        name = _whole_name(entry)
        gone = {path for path in used if fnmatch(path, name) or path.startswith(f"{name}/")}
        if not gone or any(Path(path).exists() for path in gone):
            raise
        return gone


def _whole_name(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())


def build_prefix(prefix: str | Path) -> str:
    """Return the prefix given to the build: without the -train of a split."""
    name, sidecar = str(prefix), read_sidecar(prefix) or {}
    for part in SPLIT_NAMES[: len(sidecar.get("options", {}).get("split", ()))]:
        name = name.removesuffix(f"-{part}")
    return name


def _build_first(prefix: str | Path, wanted: Wanted, workers: int, say: Callable[[str], None]) -> Built:
    """Build a missing dataset from the configured inputs."""
    if any(path.exists() for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix))):
        raise DataError(
            f"{sidecar_path(prefix)}: is missing or from another tool, so the inputs of {prefix} are unknown; "
            "move the dataset away, or remove data.rebuild"
        )
    if not wanted.inputs:
        raise DataError(f"{prefix}: does not exist, and its inputs are unknown; set data.input")
    say(f"building {prefix} from {', '.join(wanted.inputs)}")
    options = BuildOptions(append_eod=wanted.append_eod is not False)
    return build_files(wanted.inputs, wanted.tokenizer, prefix, options, workers=workers)


def _how(prefix: str | Path, sidecar: dict[str, Any], wanted: Wanted) -> str:
    try:
        return f"it again (data.rebuild=auto does): {rebuild_command(prefix, sidecar, wanted)}"
    except DataError:  # the command is unknown
        return "it again with the options of the first build"


def changed_inputs(sidecar: dict[str, Any]) -> list[str]:
    """Return the inputs and evaluation files whose size or time differs from the record.

    Skips missing files, and those at addresses: a run asks no server.
    """
    changed = []
    for entry in [*sidecar["inputs"], *sidecar.get("overlap", {}).get("files", ())]:
        if isinstance(entry, dict) and entry["path"] != STDIN:
            path = str(idx_path(entry["path"])) if entry["kind"] == DATASET else entry["path"]
            file = InputFile(path, entry["kind"], size=entry["bytes"], mtime_ns=entry["mtime_ns"])
            if Path(file.path).exists() and file.has_changed():
                changed.append(file.path)
    return changed


def rebuild_command(prefix: str | Path, sidecar: dict[str, Any], wanted: Wanted) -> str:
    """Return the shell command that rebuilds the dataset as wanted."""
    inputs, options = _inputs(prefix, sidecar), _options(sidecar, wanted.append_eod)
    words = ["python", "data_tools/build_dataset.py"]
    for path in wanted.inputs or inputs:
        words += ["--input", path]
    words += ["--tokenizer", wanted.tokenizer.spec, "--output-prefix", build_prefix(prefix), "--overwrite"]
    if options.append_eod and wanted.tokenizer.eod_is_chosen:
        words += ["--eod-token", wanted.tokenizer.eod_token]
    words += _bos_words(wanted.tokenizer)
    if options.chat is not None:
        words += ["--chat-template", str(sidecar_path(prefix))]
    return shlex.join([*words, *options.to_words()])


def _bos_words(tokenizer: Tokenizer) -> list[str]:
    if tokenizer.bos_token is None:
        try:
            is_default = tokenizer.own_bos_id is None
        except DataError:
            is_default = False
        return [] if is_default else ["--bos-token", NONE]
    return ["--bos-token", tokenizer.bos_token]


def _options(sidecar: dict[str, Any], append_eod: bool | None) -> BuildOptions:
    options = replace(BuildOptions.from_json(sidecar["options"]), max_loss=sidecar.get("losses", {}).get("max_loss"))
    return options if append_eod is None else replace(options, append_eod=append_eod)


def _inputs(prefix: str | Path, sidecar: dict[str, Any]) -> Sequence[str]:
    paths = recorded_paths(sidecar)
    # A shard lists only the files that it read from: the same shard of those files would be a part of a part.
    if not paths or STDIN in paths or sidecar["options"].get("shard") != [0, 1]:
        raise DataError(
            f"{prefix}: was built from standard input, merged, made by a recipe, or is a shard, so it cannot be "
            f"rebuilt from {sidecar_path(prefix).name} alone; build it by hand with the right tokenizer"
        )
    return paths
