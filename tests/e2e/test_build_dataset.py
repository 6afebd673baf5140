"""The command that builds datasets, killed, starved and fed by a pipe, as it happens to people."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.data.analysis.dataset_info import verify
from megalm.data.builder.stdlib_corpus import stdlib_documents
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.tokenizers.training import train_tokenizer
from megalm.errors import DataError
from tests.messages import assert_names

pytestmark = pytest.mark.e2e
COPIES = 3
TOOLS = Path(__file__).resolve().parents[2] / "data_tools"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in stdlib_documents()][:300]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    train_tokenizer(texts[:5], path, vocab_size=600)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """About 12 MB: three units of work."""
    path = tmp_path_factory.mktemp("corpus") / "lines.jsonl"
    with path.open("w") as file:
        for copy in range(COPIES):
            file.writelines(json.dumps({"text": f"# {copy}\n{text}"}) + "\n" for text in texts)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, model: Path) -> tuple[Path, float]:
    """A build, and the seconds of the processor that it took."""
    prefix = tmp_path_factory.mktemp("whole") / "out"
    start = _seconds_of_children()
    assert build(corpus, model, prefix).returncode == 0
    return prefix, _seconds_of_children() - start


@pytest.fixture(scope="module")
def whole(undisturbed: tuple[Path, float]) -> Path:
    return undisturbed[0]


def command(corpus: Path | str, model: Path | str, prefix: Path, *more: str) -> list[str]:
    arguments = ["--input", str(corpus), "--tokenizer", str(model), "--output-prefix", str(prefix), *more]
    return [sys.executable, str(TOOLS / "build_dataset.py"), *arguments]


def build(corpus: Path | str, model: Path, prefix: Path, *more: str, **how: object) -> subprocess.CompletedProcess[str]:
    arguments = command(corpus, model, prefix, "--workers", "2", *more)
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300, **how)  # type: ignore[call-overload,no-any-return]


def _seconds_of_children() -> float:
    """Of the processor, and not of the clock, which runs on while others have it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".sources")]


@pytest.mark.parametrize("parts_before", [0, 1])
def test_killed_and_started_again(tmp_path: Path, corpus: Path, model: Path, whole: Path, parts_before: int) -> None:
    """kill -9 of the command alone: its workers must end by themselves, and the next start goes on."""
    prefix = tmp_path / "out"
    process = subprocess.Popen(command(corpus, model, prefix, "--workers", "2"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("out.building/*.json"))) < parts_before + 1:
        assert process.poll() is None, "the build was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(DataError):
        IndexedDataset(prefix)
    again = build(corpus, model, prefix)
    assert again.returncode == 0, again.stderr
    if parts_before:  # without, the first part may have been finished by the time of the kill
        assert re.search(r"[\d.]+ MB", again.stdout), "it says how much was done already"
    assert contents(prefix) == contents(whole)
    verify(prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json", "out.sources"]


def test_a_finished_build_takes_no_time(corpus: Path, model: Path, undisturbed: tuple[Path, float]) -> None:
    whole, seconds = undisturbed
    before = {path: path.stat().st_mtime_ns for path in whole.parent.iterdir()}
    least = float("inf")
    for _ in range(2):
        start = _seconds_of_children()
        again = build(corpus, model, whole)
        least = min(least, _seconds_of_children() - start)
        assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in whole.parent.iterdir()} == before
    assert least < seconds / 2, "most of it is Python's start"


def test_standard_input(tmp_path: Path, corpus: Path, model: Path, whole: Path) -> None:
    with corpus.open("rb") as piped:
        built = build("-", model, tmp_path / "out", stdin=piped)
    assert built.returncode == 0, built.stderr
    assert contents(tmp_path / "out") == contents(whole)
    packed = tmp_path / "lines.jsonl.gz"
    with packed.open("wb") as file:
        subprocess.run(["gzip", "-1", "-c", str(corpus)], stdout=file, check=True)
    assert build(packed, model, tmp_path / "packed").returncode == 0
    assert contents(tmp_path / "packed") == contents(whole)


def test_a_file_that_may_not_grow_on(tmp_path: Path, corpus: Path, model: Path, whole: Path) -> None:
    """What a full disk does, by a limit of the system: a line that says where, and nothing under the final name."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    failed = build(corpus, model, tmp_path / "out", preexec_fn=limit)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "File too large" in failed.stderr
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json", ".tmp")]
    assert build(corpus, model, tmp_path / "out").returncode == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_a_full_disk(tmp_path: Path, corpus: Path, model: Path, require: Callable[..., None]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*enter, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    able = shutil.which("unshare") and subprocess.run(probe, check=False, capture_output=True).returncode == 0
    require("namespaces", able, "no user namespaces with tmpfs here")
    inside = " ".join(command(corpus, model, disk / "out", "--workers", "2"))
    script = f"mount -t tmpfs -o size=8m none {disk}; {inside}; code=$?; ls -A {disk}; exit $code"
    failed = subprocess.run([*enter, "bash", "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert failed.returncode == 2
    assert "No space left on device" in failed.stderr
    assert set(failed.stdout.split()) <= {"out.building"}


def _largest_kilobytes(folder: Path, texts: list[str], copies: int) -> int:
    """What the largest process of a build held, of a packed line file of 4 MB a copy."""
    corpus = folder / f"{copies}.jsonl"
    with corpus.open("w") as file:
        for copy in range(copies):
            file.writelines(json.dumps({"text": f"# {copy}\n{text}"}) + "\n" for text in texts)
    measured = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    arguments = command(corpus, "bytes", folder / f"{copies}", "--workers", "2")
    done = subprocess.run(
        [sys.executable, "-c", measured, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    assert os.path.getsize(folder / f"{copies}.bin") > 4_000_000 * copies
    return int(done.stdout.splitlines()[-1])


def test_memory_is_bounded(tmp_path: Path, texts: list[str]) -> None:
    """Of 70 MB more text no process holds a tenth."""
    few, many = (_largest_kilobytes(tmp_path, texts, copies) for copies in (3, 20))
    assert many - few < 7_000, (few, many)
    assert 3 * many < 1_000_000, "three processes"


def test_evaluation_sets_are_kept_out(tmp_path: Path, corpus: Path, texts: list[str]) -> None:
    """By several workers, in words that name what was found, and by one line for what cannot be."""
    quoted = "The frabjous vorpal manxome mimsy slithy toves gyre and gimble in the wabe all day"
    marked = tmp_path / "marked.jsonl"
    with corpus.open() as source, marked.open("w") as file:
        for number, line in enumerate(source):
            text = json.loads(line)["text"]
            file.write(json.dumps({"text": f"{text}\n# {quoted}" if number % 400 == 5 else text}) + "\n")
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": quoted.lower()}) + "\n" + json.dumps({"question": "Why?"}) + "\n")
    built = build(marked, Path("bytes"), tmp_path / "out", "--exclude-overlap", str(exam))
    assert built.returncode == 0, built.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.overlaps").read_text().splitlines()]
    assert [row["document"] for row in rows] == [f"{marked}:{number}" for number in range(6, 300 * COPIES + 1, 400)]
    assert {row["evaluation"] for row in rows} == {f"{exam}:1"}
    assert len(IndexedDataset(tmp_path / "out")) == COPIES * len(texts) - len(rows)
    assert_names(built.stdout, exam, f"{exam}:2", 3, 13)
    again = build(marked, Path("bytes"), tmp_path / "other", "--exclude-overlap", str(exam), "--overlap-tokens", "0")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert_names(again.stderr, "--overlap-tokens", 0)
