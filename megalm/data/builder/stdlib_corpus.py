"""The quickstart corpus from Python's standard library: text, tokenizer and dataset, prepared once and cached.

CACHE/python-stdlib-FINGERPRINT/   tokenizer.model  tokenizer.model.json  corpus.bin .idx .json  recipe.json
CACHE/stamps/HASH.json             cheap facts about the inputs -> FINGERPRINT, so that a second run need not read them
CACHE/python-stdlib.lock           one process prepares, the others wait
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import sentencepiece

from megalm.data.builder.builder import build_dataset
from megalm.data.indexed.metadata import SIDECAR_VERSION
from megalm.data.readers.document_reader import Document
from megalm.data.readers.input_files import ReadReport
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer
from megalm.errors import ConfigError, DataError
from megalm.utils.atomic_files import CACHE_ADVICE, json_hash, read_json, sync_directory, write_json, writing_to
from megalm.utils.file_lock import take_lock

# Documents: sources and manual texts of the running Python's own standard library
#
# Every machine has this text, so the first run needs no download. The same Python gives the same documents in the same
# order, whatever the virtual environment or the install location.

# Not the library's text, or generated on the machine where Python was built.
LEFT_OUT_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload")
)
LEFT_OUT_FILES = frozenset(("sitecustomize.py", "usercustomize.py", "pydoc_data/topics.py"))
LEFT_OUT_STARTS = ("_sysconfigdata", "_sysconfig_vars")
FEWEST_FILES = 100


def standard_library() -> Path:
    """Return the folder of the running Python's library, also inside a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path | None = None) -> dict[str, Path]:
    """Return name relative to the library (with "/") -> path of every source file in the corpus, sorted.

    Raises:
        DataError: this Python comes without its library's sources.
    """
    root = standard_library() if root is None else root
    found: dict[str, Path] = {}
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT_FOLDERS and not name.startswith("config-")]
        for name in names:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if name.endswith(".py") and not name.startswith(LEFT_OUT_STARTS) and relative not in LEFT_OUT_FILES:
                found[relative] = Path(folder) / name
    if len(found) < FEWEST_FILES:
        raise DataError(
            f"{root}: has only {len(found)} source files of the standard library; "
            "use a Python that has them, or set data.train"
        )
    return dict(sorted(found.items()))


def stdlib_documents(report: ReadReport | None = None) -> list[Document]:
    """Return all documents, ordered by a hash of their names, so that any contiguous part is a fair sample.

    Empty files give no document. A file that is not text in its declared encoding, and an exact copy of another
    document, are skipped and counted in `report`.
    """
    report = ReadReport() if report is None else report
    seen: set[str] = set()
    documents = []
    for document in (*_sources(report), *_topics()):
        if document.text in seen:
            report.duplicates += 1
        elif document.text:
            seen.add(document.text)
            documents.append(document)
    report.documents += len(documents)
    return sorted(documents, key=lambda document: hashlib.sha256(document.source.encode()).digest())


def _sources(report: ReadReport) -> Iterator[Document]:
    for name, path in source_files().items():
        try:
            with tokenize.open(path) as file:  # honors the encoding that the source declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            report.losses.skipped += 1
            report.note(f"{path}: is not text in its declared encoding ({error})")
            continue
        yield Document(_newlines(text), name)


def _topics() -> Iterator[Document]:
    """Yield the language reference that `help()` shows; a slim Python can lack it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield Document(_newlines(text), f"topics/{name}")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


RECIPE = "python-stdlib"  # the only one
RECIPE_VERSION = 1  # increase when the same inputs give other files
SPLIT = "95,5"
MAX_SENTENCES = 80_000
MANIFEST = "recipe.json"
Progress = Callable[[str], None]
Model = TypeVar("Model", bound=pydantic.BaseModel)


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus. `train_prefix` holds all documents; `split` separates the validation documents."""

    directory: Path
    fingerprint: str
    documents: int
    tokens: int
    split: str = SPLIT

    @property
    def train_prefix(self) -> Path:
        return self.directory / "corpus"

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / "tokenizer.model"


def default_cache_dir() -> Path:
    """Return MEGALM_CACHE, or megalm/ in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("MEGALM_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "megalm"
    try:
        return Path.home() / ".cache" / "megalm"
    except RuntimeError:  # a user without an entry in passwd, as in many containers
        raise ConfigError(
            "this user has no home folder for the cache; set data.cache, or one of the variables HOME, XDG_CACHE_HOME"
        ) from None


def prepare_recipe(
    name: str, cache_dir: str | Path | None = None, vocab_size: int = 8192, progress: Progress | None = None
) -> PreparedData:
    """Make the corpus, train its tokenizer and build its dataset, or find all three in the cache.

    Of concurrent processes one prepares and the others wait; a killed one leaves nothing that looks complete.

    Args:
        cache_dir: default `default_cache_dir()`.
        progress: called with a progress line at each stage.

    Raises:
        DataError: an unknown recipe, a Python without its sources, a vocabulary too large for the text, or a cache
            that cannot be written.
    """
    if name != RECIPE:
        raise DataError(f"data.recipe: {name!r} is unknown; the known recipe is {RECIPE}")
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    say: Progress = progress or (lambda line: None)
    stamp = cache / "stamps" / f"{json_hash(_cheap_facts(vocab_size))}.json"
    if prepared := _find(cache, stamp):
        return prepared
    with writing_to(cache, CACHE_ADVICE):
        cache.mkdir(parents=True, exist_ok=True)
        # Without locks two processes can prepare at once: the first result is read, or replaced.
        lock = take_lock(
            cache / f"{RECIPE}.lock", on_wait=lambda: say("waiting for another process that prepares the same data")
        )
    with lock:
        if prepared := _find(cache, stamp):  # another process made it meanwhile
            return prepared
        say(f"reading the standard library of Python {platform.python_version()}")
        reading = ReadReport()
        documents = stdlib_documents(reading)
        facts = _decisive_facts(vocab_size, documents)
        fingerprint = json_hash(facts)
        directory = _directory(cache, fingerprint)
        if _prepared(directory) is None:
            _make(directory, documents, reading, vocab_size, facts, say)
        write_json(stamp, {"fingerprint": fingerprint})
        prepared = _prepared(directory)
        assert prepared is not None, directory
        return prepared


def _cheap_facts(vocab_size: int) -> dict[str, Any]:
    """Return facts that change whenever the inputs change, without reading them: 10 ms instead of a second."""
    root = standard_library()
    files = [(relative, path.stat()) for relative, path in source_files(root).items()]
    topics = root / "pydoc_data" / "topics.py"
    if topics.exists():
        files.append(("pydoc_data/topics.py", topics.stat()))
    return {
        **_options(vocab_size),
        "python": sys.version,
        "root": str(root),
        "files": [[relative, status.st_size, status.st_mtime_ns] for relative, status in files],
    }


def _decisive_facts(vocab_size: int, documents: list[Document]) -> dict[str, Any]:
    """Return all facts that determine the prepared files."""
    contents = hashlib.sha256()
    for document in documents:
        for part in document:
            encoded = part.encode()
            contents.update(len(encoded).to_bytes(8, "little") + encoded)
    return {**_options(vocab_size), "contents": contents.hexdigest()}


def _options(vocab_size: int) -> dict[str, Any]:
    return {
        "recipe": RECIPE,
        "recipe_version": RECIPE_VERSION,
        "sidecar_version": SIDECAR_VERSION,
        "vocab_size": vocab_size,
        "max_sentences": MAX_SENTENCES,
        "sentencepiece": sentencepiece.__version__,
    }


def _directory(cache: Path, fingerprint: str) -> Path:
    return cache / f"{RECIPE}-{fingerprint[:16]}"


class _Stamp(pydantic.BaseModel):
    """What stamps/HASH.json holds."""

    fingerprint: str


class _Manifest(_Stamp):
    """What is read of recipe.json."""

    documents: int
    tokens: int
    files: dict[str, int]  # name -> size


def _find(cache: Path, stamp: Path) -> PreparedData | None:
    """Return the corpus that the stamp points to, if it exists and is complete."""
    pointer = _read_or_none(stamp, _Stamp)
    return None if pointer is None else _prepared(_directory(cache, pointer.fingerprint))


def _prepared(directory: Path) -> PreparedData | None:
    """Return the corpus in a folder, if every file that its manifest lists has the recorded size."""
    manifest = _read_or_none(directory / MANIFEST, _Manifest)
    if manifest is None or not manifest.files:
        return None
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    if not manifest.files.items() <= sizes.items():
        return None
    return PreparedData(directory, manifest.fingerprint, manifest.documents, manifest.tokens)


def _read_or_none(path: Path, model: type[Model]) -> Model | None:
    """Read a JSON file of the cache; None if missing, damaged or of other content, because it is made again."""
    try:
        return model.model_validate(read_json(path))
    except (DataError, pydantic.ValidationError):
        return None


def _make(
    directory: Path,
    documents: list[Document],
    reading: ReadReport,
    vocab_size: int,
    facts: dict[str, Any],
    say: Progress,
) -> None:
    """Build all files in a temporary folder, then rename it, replacing any incomplete folder."""
    with writing_to(directory, CACHE_ADVICE):
        for old in directory.parent.glob(f"{directory.name}.*.tmp"):  # from a killed process: this one holds the lock
            shutil.rmtree(old)
        work = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        model = work / "tokenizer.model"
        say(f"training a tokenizer of {vocab_size} pieces on {len(documents)} documents")
        train_tokenizer(
            (document.text for document in documents), model, vocab_size=vocab_size, max_sentences=MAX_SENTENCES
        )
        say("tokenizing")
        built = build_dataset(documents, load_tokenizer(model), work / "corpus", inputs=[f"recipe:{facts['recipe']}"])
        manifest = {
            "fingerprint": json_hash(facts),
            "facts": facts,
            "python": platform.python_version(),
            "documents": built.documents,
            "tokens": built.tokens,
            "text_bytes": built.text_bytes,
            "skipped": reading.messages,
            "duplicates": reading.duplicates,
            "files": {file.name: file.stat().st_size for file in sorted(work.iterdir())},
        }
        write_json(work / MANIFEST, manifest)
        with writing_to(directory, CACHE_ADVICE):
            work.chmod(0o755)  # several users can share the cache
            shutil.rmtree(directory, ignore_errors=True)
            work.rename(directory)
            sync_directory(directory.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{built.documents} documents, {built.tokens:,} tokens in {directory}")
