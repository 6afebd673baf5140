"""Files at addresses such as s3://bucket/folder, and in folders, through fsspec; only this module imports fsspec.

Credentials come from where each service's own tools take them (AWS_ACCESS_KEY_ID, ~/.aws, HF_TOKEN, ...), never from an
address. Listings are not cached: another process may write to the same place.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megalm.errors import ConfigError, DataError
from megalm.utils.addresses import hide_credentials, public_address
from megalm.utils.formatting import format_duration
from megalm.utils.process_setup import require_extra

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

T = TypeVar("T")

# Scheme -> the package that reads it, and the extra of setup.py that installs it.
SCHEMES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "hf": ("huggingface_hub", "hf")}
# Scheme -> where its tools find credentials and server.
_SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN and HF_ENDPOINT",
}
_HF_KIND = "(?:datasets|models|spaces|buckets)/"
_HF_PLACE = re.compile(rf"(?:{_HF_KIND})?(?!{_HF_KIND})[\w.\-]+/[\w.\-]+(?:@[^/]+)?(?:/.*)?", re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_BLOCK_BYTES = 1 << 22
_SMALLEST_BLOCK_BYTES = 1 << 15
# How long a read is tried again without getting a byte, and the longest pause between two tries.
PATIENCE_SECONDS = 600.0
START_PATIENCE_SECONDS = 20.0  # at a start, while nothing is lost
_LONGEST_PAUSE_SECONDS = 30.0
# By class name: the classes are of packages that need not be there.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
_REFUSED = ("GatedRepoError", "RepositoryNotFoundError", "BucketNotFound", "ParamValidationError")


def is_remote(address: str) -> bool:
    """Whether this is an address, not a path."""
    return _SCHEME.fullmatch(address) is not None


def check_address(address: str, named: str, schemes: tuple[str, ...] = tuple(SCHEMES)) -> None:
    """Check the spelling of an address and that its package is there; asks no server. A path passes.

    Args:
        named: the key or option and its value, for the message.

    Raises:
        ConfigError: it is of another scheme, has no bucket or repository, holds credentials, or its package is missing.
    """
    match = _SCHEME.fullmatch(address)
    if match is None:
        return
    scheme, place, named = match[1], match[2], hide_credentials(named, address)
    if scheme not in schemes:
        known = ", ".join(f"{name}://" for name in schemes)
        raise ConfigError(f"{named}: {scheme}:// is not supported here; use {known} or a path")
    if public_address(address) != address:
        raise ConfigError(
            f"{named}: an address must not hold credentials or options; set them where the tools of {scheme}:// look, "
            f"as in {_SETTINGS[scheme]}"
        )
    if scheme == "hf" and _HF_PLACE.fullmatch(place) is None:
        raise ConfigError(f"{named}: the address names no repository; write hf://datasets/OWNER/NAME/FILE")
    if not place.strip("/"):
        raise ConfigError(f"{named}: the address names no bucket; write {scheme}://BUCKET/FOLDER")
    package, extra = SCHEMES[scheme]
    require_extra(package, named, extra)


def open_filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address or a path, and the place in it; asks no server."""
    import fsspec

    match = _SCHEME.fullmatch(address)
    if match is None:
        return fsspec.filesystem("file", auto_mkdir=True), address
    options: dict[str, Any] = {"use_listings_cache": False}
    if match[1] == "s3":
        # Short: whoever calls tries again. A dead server must not hold a process for minutes.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}
    filesystem = fsspec.filesystem(match[1], **options)
    if hasattr(filesystem, "retries"):
        filesystem.retries = 2
    return filesystem, match[2]


def put_file(
    filesystem: AbstractFileSystem, path: Path, place: str, part_bytes: int, on_bytes: Callable[[int], None]
) -> None:
    """Copy a local file to a server, in parts of `part_bytes` if it is larger than two of them.

    Args:
        on_bytes: called with the bytes of each part when it is sent.
    """
    from fsspec.callbacks import Callback

    class Counter(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            on_bytes(inc)

        def absolute_update(self, value: int) -> None:  # of gcsfs
            self.relative_update(value - self.value)

    options = {"max_concurrency": 2} if "s3" in filesystem.protocol else {}  # each part in work is in memory
    filesystem.put_file(str(path), place, callback=Counter(), chunksize=part_bytes, **options)


def lasting_problem(error: BaseException) -> str:
    """Return why trying again does not help: it does not exist, or access is refused; "" if it may help."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return "does not exist"
    if names & {*_NO_CREDENTIALS}:
        return "needs credentials, and none are set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PermissionError) or names & {*_REFUSED} or status in (401, 403):
        return f"access is refused ({short_reason(error)})"
    return ""


def short_reason(error: BaseException) -> str:
    """Return an error of a server in a few words, without credentials."""
    words = hide_credentials(" ".join(str(error).split())) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:197]}..."


def pause_seconds(failures: int, longest: float | None = None) -> float:
    """Return how long to wait before the next try."""
    return min(0.5 * 2.0 ** min(failures, 20), _LONGEST_PAUSE_SECONDS if longest is None else longest)


def tried_again(
    work: Callable[[], T],
    address: str,
    patience_seconds: float | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> T:
    """Call `work` until it succeeds, with growing pauses.

    Args:
        patience_seconds: give up after so long; None: after `PATIENCE_SECONDS`.
        warn: called once, with a line, if the first try fails.

    Raises:
        DataError: trying again does not help, or patience has ended.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if patience_seconds is None else patience_seconds)
    failures = 0
    while True:
        try:
            return work()
        except DataError:
            raise
        except Exception as error:
            if problem := lasting_problem(error):
                raise DataError(f"{address}: {problem}; check the address and the credentials") from error
            failures += 1
            if time.monotonic() + pause_seconds(failures) > deadline:
                spent = format_duration(PATIENCE_SECONDS if patience_seconds is None else patience_seconds)
                raise DataError(
                    f"{address}: does not answer, after tries for {spent} ({short_reason(error)}); start the same "
                    "command again when it does"
                ) from error
            if failures == 1:
                warn(f"{address}: {short_reason(error)}; trying again")
            time.sleep(pause_seconds(failures))


@dataclass(frozen=True)
class RemoteVersion:
    """A file at an address, as its server describes it.

    Attributes:
        tag: changes with the content: the server's entity tag, hash or time of change.
    """

    bytes: int
    tag: str

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> RemoteVersion:
        names = ("ETag", "md5Hash", "sha256", "etag", "blob_id", "oid", "mtime", "LastModified", "last_modified")
        tag = next((info[name] for name in names if info.get(name)), "")
        return cls(int(info["size"] or 0), str(tag).strip('"'))


def remote_version(address: str, warn: Callable[[str], None] = lambda _: None) -> RemoteVersion:
    """Ask for a file's version. Raises: DataError: it does not exist, or the server does not answer."""
    filesystem, place = open_filesystem(address)
    return RemoteVersion.of(tried_again(lambda: _info(filesystem, place), address, warn=warn))


def _info(filesystem: AbstractFileSystem, place: str) -> Mapping[str, Any]:
    """Ask the server about a file, whatever listings are kept."""
    # huggingface_hub keeps listings always, and names a file's version only in what it calls expanded.
    fresh = {"refresh": True, "expand_info": True} if "hf" in filesystem.protocol else {}
    info: Mapping[str, Any] = filesystem.info(place, **fresh)
    return info


def has_glob(address: str) -> bool:
    return any(character in address for character in "*?[")


def list_remote(address: str, warn: Callable[[str], None] = lambda _: None) -> dict[str, RemoteVersion]:
    """Return the files of an address, sorted: one file, those that a glob matches, or all below a folder.

    Raises:
        DataError: a bucket or file does not exist, access is refused, or the server does not answer.
    """
    filesystem, place = open_filesystem(address)
    scheme = address.partition("://")[0]

    def find() -> dict[str, Mapping[str, Any]]:
        filesystem.invalidate_cache()
        if has_glob(address):
            return filesystem.glob(place, detail=True)
        info = filesystem.info(place)
        return {place: info} if info["type"] == "file" else filesystem.find(place, detail=True)

    found = tried_again(find, address, START_PATIENCE_SECONDS, warn)
    return {
        f"{scheme}://{name}": RemoteVersion.of(info) for name, info in sorted(found.items()) if info["type"] == "file"
    }


class RemoteFile(io.RawIOBase):
    """A file at an address, read in blocks; use `open_remote_file`.

    A block whose connection drops is asked for again, a smaller one each time, so a reader continues where it was.

    Raises:
        DataError: it cannot be read, or changed while it was read.
    """

    def __init__(self, address: str, warn: Callable[[str], None] = lambda _: None) -> None:
        super().__init__()
        self.name = address
        self._filesystem, self._place = open_filesystem(address)
        self._warn = warn
        self.version = remote_version(address, warn)
        self._position = 0
        self._most = _BLOCK_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.version.bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        left = min(len(view), self.version.bytes - self._position)
        if left <= 0:
            return 0
        content = tried_again(lambda: self._read_block(left), self.name, warn=self._warn)
        view[: len(content)] = content
        self._position += len(content)
        if self._position == self.version.bytes and remote_version(self.name, self._warn) != self.version:
            raise self._changed()
        return len(content)

    def readall(self) -> bytes:
        blocks = []
        while block := self.read(_BLOCK_BYTES):
            blocks.append(block)
        return b"".join(blocks)

    def _read_block(self, most: int) -> bytes:
        start, end = self._position, self._position + min(most, self._most)
        # The file objects behind hf:// would read ahead, and drop what they read.
        exact = {"cache_type": "none"} if "hf" in self._filesystem.protocol else {}
        try:
            content: bytes = self._filesystem.cat_file(self._place, start=start, end=end, **exact)
            if len(content) != end - start:
                raise OSError(f"{len(content)} bytes came instead of {end - start}")
        except Exception:
            self._most = max(_SMALLEST_BLOCK_BYTES, self._most // 2)
            found = None
            with contextlib.suppress(Exception):  # it is asked again soon
                found = RemoteVersion.of(_info(self._filesystem, self._place))
            if found not in (None, self.version):
                raise self._changed() from None
            raise
        self._most = min(_BLOCK_BYTES, 2 * self._most)
        return content

    def _changed(self) -> DataError:
        return DataError(f"{self.name}: changed while it was read; start again when it is complete")


def open_remote_file(address: str, warn: Callable[[str], None] = lambda _: None) -> io.BufferedReader:
    """Open a file at an address for reading; errors as `RemoteFile`."""
    return io.BufferedReader(RemoteFile(address, warn), _BLOCK_BYTES)
