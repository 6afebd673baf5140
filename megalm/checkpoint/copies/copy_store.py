"""The copies of a run's checkpoints at an address or in a mounted folder, laid out as in the run folder.

    ADDRESS/RUN/checkpoints/step-XXXXXXXX/   a copy; it counts once its manifest is there, which is written last
    ADDRESS/RUN/config.yaml, ...             the run's small files, as of its last copy

A file counts as copied when the server states a hash of it that equals the local file's (the MD5 in an entity tag of
S3, of one part or of several), and else when it was read back with the right SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.discovery import PARTIAL_SUFFIX, Entry, is_step_name, write_order
from megalm.checkpoint.manifest import MANIFEST, Manifest, StoredFile, read_manifest
from megalm.checkpoint.retention import Retention, put_in_place, superfluous
from megalm.errors import CheckpointError
from megalm.utils.atomic_files import clear_away, make_directory, write_atomically, write_durably
from megalm.utils.formatting import format_bytes
from megalm.utils.remote_files import RemoteFile, RemoteVersion, is_remote, open_filesystem, put_file

COPY_SCHEMES = ("s3", "gs")  # each file of hf:// would be a commit
CHECKPOINTS = "checkpoints"
_BLOCK_BYTES = 1 << 25
_PART_BYTES = 1 << 24  # of an upload in parts, of which S3 allows 10,000
_MOST_PARTS = 9000
_DOWNLOADS = 4  # at once
_PROBE = ".write-test"

OnBytes = Callable[[int], None]


class LostCopy(Exception):
    """What the server holds is not what was sent; the next try sends it again."""


@dataclass(frozen=True)
class _Digest:
    """Hashes of a local file; `tags` has what a server may state about it."""

    sha256: str
    tags: frozenset[str]


class CopyStore:
    """The copies of one run. Methods raise what the server's package raises, unless they say otherwise.

    Args:
        address: s3://bucket/folder, gs://bucket/folder or a path.
        run: the run's name.
    """

    def __init__(self, address: str, run: str) -> None:
        self.address = f"{address.rstrip('/')}/{run}"
        self._is_local = not is_remote(address)
        self._files, self._root = open_filesystem(self.address)
        self._entries: dict[str, tuple[RemoteVersion, Entry]] = {}  # as last read

    # --- what is there ---

    def entries(self) -> list[Entry]:
        """Return the complete copies in write order; one whose manifest is damaged has a `problem`."""
        found: dict[str, tuple[RemoteVersion, Entry]] = {}
        for name, files in self._folders().items():
            version, known = files.get(MANIFEST), self._entries.get(name)
            if version is None:
                continue
            entry = known[1] if known and known[0] == version and version.tag else self._read_entry(name)
            if entry.manifest is not None and (file := _missing(entry.manifest, files)):
                entry = Entry(entry.path, None, f"{self.address}: {file} of {name} is missing or cut short")
            found[name] = version, entry
        self._entries = found
        return sorted((entry for _, entry in found.values()), key=write_order)

    def _folders(self) -> dict[str, dict[str, RemoteVersion]]:
        """Return the files of each copy and of each half of one, by name."""
        found: dict[str, dict[str, RemoteVersion]] = {}
        for place, info in self._list(CHECKPOINTS).items():
            folder, _, file = place.rpartition("/")
            if is_step_name(name := folder.rpartition("/")[2]):
                found.setdefault(name, {})[file] = RemoteVersion.of(info)
        return found

    def run_files(self) -> list[str]:
        """Return the names of the run's small files that are there."""
        prefix = f"{self._list_root()}/"
        names = (place.removeprefix(prefix) for place in self._list(""))
        return sorted(name for name in names if "/" not in name and not name.startswith("."))

    def read_run_file(self, name: str) -> bytes:
        content: bytes = self._files.cat_file(self._place(name))
        return content

    def _read_entry(self, name: str) -> Entry:
        content = self._files.cat_file(self._place(CHECKPOINTS, name, MANIFEST))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, CHECKPOINTS, name)
            path.mkdir(parents=True)
            (path / MANIFEST).write_bytes(content)
            entry = Entry.read(path)
        place = Path(self.address, CHECKPOINTS, name)  # only its name counts: the server has no paths
        return Entry(place, entry.manifest, entry.problem and f"{self.address}: {MANIFEST} of {name} is damaged")

    def _list(self, folder: str) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = self._files.find(self._place(folder), detail=True)
        return found

    def _list_root(self) -> str:
        return os.path.abspath(self._root) if self._is_local else self._root

    def _place(self, *names: str) -> str:
        return "/".join((self._root, *filter(None, names)))

    # --- copying to it ---

    def upload(self, checkpoint: Path, on_bytes: OnBytes = lambda _: None) -> int:
        """Copy a complete checkpoint, or the files of it that are not there yet; return the bytes sent.

        Args:
            on_bytes: called with numbers of bytes sent, or found there, as they come.

        Raises:
            FileNotFoundError: the checkpoint was deleted meanwhile.
            CheckpointError: a local file is damaged.
            LostCopy: the server holds something else than what was sent.
        """
        manifest, name = read_manifest(checkpoint), checkpoint.name
        content = (checkpoint / MANIFEST).read_bytes()
        by_name = self._folders().get(name, {})
        before, sent = self._entries.get(name), 0
        is_same = MANIFEST in by_name and before is not None and same_files(before[1].manifest, manifest)
        if MANIFEST in by_name and not is_same:  # an earlier attempt's, which does not count from here on
            self._files.rm_file(self._place(CHECKPOINTS, name, MANIFEST))
        for file, stored in () if is_same else manifest.files.items():
            sent += self._upload_file(checkpoint / file, stored, by_name.get(file), on_bytes)
        if file := _missing(manifest, self._folders().get(name, {})):  # another process tidied up there
            raise LostCopy(f"{file} of {name} is no longer there")
        self._put_bytes(self._place(CHECKPOINTS, name, MANIFEST), content)
        return sent

    def _upload_file(self, path: Path, stored: StoredFile, there: RemoteVersion | None, on_bytes: OnBytes) -> int:
        part_bytes = _PART_BYTES * max(1, math.ceil(stored.bytes / (_PART_BYTES * _MOST_PARTS)))
        digest = _digest(path, part_bytes)
        if digest.sha256 != stored.sha256:
            raise CheckpointError(f"{path} is damaged, so it is not copied; megalm checkpoint verify {path.parent}")
        place = self._place(CHECKPOINTS, path.parent.name, path.name)
        if there is not None and there.bytes == stored.bytes and self._holds(place, there, digest):
            on_bytes(stored.bytes)
            return 0
        if self._is_local:
            make_directory(Path(place).parent)
            with path.open("rb") as source:
                write_atomically(Path(place), lambda file: _copy(source.read, file.write, on_bytes))
        else:
            put_file(self._files, path, place, part_bytes, on_bytes)
        version = RemoteVersion.of(self._files.info(place))
        if version.bytes != stored.bytes or not self._holds(place, version, digest):
            raise LostCopy(f"{path.name} of {path.parent.name} arrived damaged")
        return stored.bytes

    def _holds(self, place: str, version: RemoteVersion, digest: _Digest) -> bool:
        if version.tag in digest.tags:
            return True
        sha256 = hashlib.sha256()
        for start in range(0, version.bytes, _BLOCK_BYTES):
            sha256.update(self._files.cat_file(place, start=start, end=min(start + _BLOCK_BYTES, version.bytes)))
        return sha256.hexdigest() == digest.sha256

    def _put_bytes(self, place: str, content: bytes) -> None:
        if self._is_local:
            make_directory(Path(place).parent)
            write_durably(Path(place), content)
        else:
            self._files.pipe_file(place, content)
        if self._files.cat_file(place) != content:
            raise LostCopy(f"{place.rpartition('/')[2]} arrived damaged")

    def upload_run_files(self, files: Iterable[Path]) -> None:
        """Copy small files of the run folder that exist; of a .jsonl file its whole lines."""
        for path in files:
            if path.is_file():
                content = path.read_bytes()
                whole = content[: content.rfind(b"\n") + 1] if path.suffix == ".jsonl" else content
                self._put_bytes(self._place(path.name), whole)

    # --- deleting from it ---

    def prune(self, retention: Retention, best: str | None) -> list[str]:
        """Delete the copies that are not to be kept; return their names."""
        gone = [entry.path.name for entry in superfluous(self.entries(), retention, best)]
        for name in gone:
            self.delete(name)
        return gone

    def delete(self, name: str) -> None:
        """Delete a copy, or what there is of it; its manifest first, so that half of it never counts."""
        place = self._place(CHECKPOINTS, name)
        if self._files.exists(f"{place}/{MANIFEST}"):
            self._files.rm_file(f"{place}/{MANIFEST}")
        self._files.rm(place, recursive=True)
        self._entries.pop(name, None)

    def delete_partial(self, keep: Sequence[str]) -> list[str]:
        """Delete copies without a manifest, which a killed job left, but those in `keep`; return their names."""
        left = (name for name, files in self._folders().items() if MANIFEST not in files)
        gone = sorted(name for name in left if name not in keep)
        for name in gone:
            self.delete(name)
        return gone

    # --- copying from it ---

    def download(self, entry: Entry, checkpoints: Path, on_bytes: OnBytes = lambda _: None) -> Path:
        """Copy a checkpoint into `checkpoints`, complete and verified; return its path.

        Raises:
            CheckpointError: the disk is too full, or a file does not have the SHA-256 of the manifest.
            DataError: the server gives no more.
        """
        name, manifest = entry.path.name, entry.manifest
        assert manifest is not None
        make_directory(checkpoints)
        partial = checkpoints / f"{name}{PARTIAL_SUFFIX}"
        if partial.exists():
            clear_away(partial)
        free = shutil.disk_usage(checkpoints).free
        if free < manifest.bytes:
            raise CheckpointError(
                f"{checkpoints} has {format_bytes(free)} free, {name} of {self.address} needs "
                f"{format_bytes(manifest.bytes)}; free space, or choose another run.root"
            )
        partial.mkdir()
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            for work in [
                pool.submit(self._download_file, file, partial, stored, on_bytes)
                for file, stored in manifest.files.items()
            ]:
                work.result()
        write_durably(partial / MANIFEST, self._files.cat_file(self._place(CHECKPOINTS, name, MANIFEST)))
        if read_manifest(partial).content != manifest.content:
            raise CheckpointError(f"{self.address}: {name} changed while it was read; start again")
        put_in_place(partial, checkpoints / name)
        return checkpoints / name

    def _download_file(self, file: str, folder: Path, stored: StoredFile, on_bytes: OnBytes) -> None:
        name = folder.name.removesuffix(PARTIAL_SUFFIX)
        sha256 = hashlib.sha256()

        def keep(block: bytes) -> None:
            sha256.update(block)
            target.write(block)

        with (folder / file).open("wb") as target, RemoteFile(f"{self.address}/{CHECKPOINTS}/{name}/{file}") as source:
            _copy(source.read, keep, on_bytes)
            target.flush()
            os.fsync(target.fileno())
        if sha256.hexdigest() != stored.sha256:
            raise CheckpointError(
                f"{self.address}: {file} of {name} is damaged: its SHA-256 is {sha256.hexdigest()[:16]}..., "
                f"the manifest says {stored.sha256[:16]}..."
            )


def _copy(read: Callable[[int], bytes | None], write: Callable[[bytes], object], on_bytes: OnBytes) -> None:
    while block := read(_BLOCK_BYTES):
        write(block)
        on_bytes(len(block))


def _digest(path: Path, part_bytes: int) -> _Digest:
    """Return the hashes of a file, read once; `tags` are MD5s as S3 states them, and as Google does."""
    sha256, whole, parts = hashlib.sha256(), hashlib.md5(usedforsecurity=False), []
    with path.open("rb") as file:
        while block := file.read(part_bytes):
            sha256.update(block)
            whole.update(block)
            parts.append(hashlib.md5(block, usedforsecurity=False).digest())
    of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    tags = {whole.hexdigest(), f"{of_parts}-{len(parts)}", base64.b64encode(whole.digest()).decode()}
    return _Digest(sha256.hexdigest(), frozenset(tags))


def check_writable(address: str) -> None:
    """Write a small file to an address or folder, and delete it; raises what the server's package raises."""
    files, root = open_filesystem(address)
    place = f"{root.rstrip('/')}/{_PROBE}"
    files.pipe_file(place, b"megalm\n")
    files.rm_file(place)


def _missing(manifest: Manifest, there: Mapping[str, RemoteVersion]) -> str:
    """Return the first file that is not there in its full size; "" if all are."""
    wrong = (file for file, stored in manifest.files.items() if file not in there or there[file].bytes != stored.bytes)
    return next(wrong, "")


def same_files(first: Manifest | None, second: Manifest | None) -> bool:
    return first is not None and second is not None and first.files == second.files


def copies_due(
    local: Sequence[Entry], copied: Sequence[Entry], retention: Retention, best: str | None
) -> Iterator[Entry]:
    """Yield the local checkpoints to copy, the newest first: good ones that the copies' retention would keep, and those
    whose manifest has changed since they were copied (a mark, a validation).

    Args:
        local, copied: in write order.
    """
    there = {entry.path.name: entry.manifest for entry in copied}
    good = {entry.path.name: entry for entry in local if entry.status == "good"}
    others = [entry for entry in copied if entry.path.name not in good]
    together = sorted([*others, *good.values()], key=write_order)
    gone = {entry.path.name for entry in superfluous(together, retention, best)}
    for entry in reversed(local):
        if entry.manifest is None:
            continue
        name, copy = entry.path.name, there.get(entry.path.name)
        is_changed = copy is not None and same_files(copy, entry.manifest) and copy.content != entry.manifest.content
        is_missing = name in good and name not in gone and not same_files(copy, entry.manifest)
        if is_changed or is_missing:
            yield entry
