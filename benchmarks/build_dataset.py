"""How fast datasets are built, against the tokenizer's own ceiling in the same run.

    python benchmarks/build_dataset.py [--megabytes 200] [--workers 2] [--rounds 3]

The text is the Python standard library's, as often as it takes, one JSON object a document. The ceiling is SentencePiece
called in a bare loop over texts that are in memory already, in as many processes: once as people call it
(`encode`, lists of Python integers), once with arrays (`encode_as_numpy`). The build is the command, from its start to
its end: Python's start, reading, parsing, encoding, checking that each document comes back, writing, hashing.
Rounds alternate, and the best of each is reported, so that other load on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalm.data.recipe import prepare_recipe
from megalm.data.stdlib import stdlib_documents

ROOT = Path(__file__).resolve().parents[1]


def write_corpus(path: Path, megabytes: int) -> int:
    """Documents as JSON lines; their UTF-8 bytes."""
    texts = [document.text for document in stdlib_documents()]
    total, copy = 0, 0
    with path.open("w") as file:
        while total < megabytes * 1_000_000:
            for text in texts:
                # A first line of its own, so that no two documents are equal.
                marked = f"# copy {copy}\n{text}"
                file.write(json.dumps({"text": marked}) + "\n")
                total += len(marked.encode())
            copy += 1
    return total


def bare_loop(model: str, texts: list[str], method: str, ready: Any, seconds: Any) -> None:
    import sentencepiece

    encode = getattr(sentencepiece.SentencePieceProcessor(model_file=model), method)
    encode(texts[0])
    ready.wait()
    start = time.perf_counter()
    for text in texts:
        encode(text)
    seconds.put(time.perf_counter() - start)


def ceiling(model: Path, corpus: Path, processes: int, method: str, limit_bytes: int) -> float:
    """MB/s of all processes together, each on its share of the texts."""
    context = multiprocessing.get_context("spawn")
    shares: list[list[str]] = [[] for _ in range(processes)]
    total = 0
    for number, line in enumerate(corpus.open("rb")):
        text = json.loads(line)["text"]
        shares[number % processes].append(text)
        total += len(text.encode())
        if total >= limit_bytes:
            break
    ready, seconds = context.Barrier(processes), context.Queue()
    running = [context.Process(target=bare_loop, args=(str(model), share, method, ready, seconds)) for share in shares]
    for process in running:
        process.start()
    slowest = max(seconds.get() for _ in running)
    for process in running:
        process.join()
    return total / 1e6 / slowest


def build(model: Path, corpus: Path, prefix: Path, workers: int, text_bytes: int) -> tuple[float, float]:
    """(MB/s of text, most memory of one of the processes in MB)."""
    command = [sys.executable, str(ROOT / "data_tools" / "build_dataset.py"), "--input", str(corpus)]
    command += ["--tokenizer", str(model), "--output-prefix", str(prefix), "--workers", str(workers), "--overwrite"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()
    return text_bytes / 1e6 / seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, float]]:
    model = prepare_recipe("python-stdlib").tokenizer_path
    corpus = folder / "corpus.jsonl"
    text_bytes = write_corpus(corpus, arguments.megabytes)
    limit = min(text_bytes, 60_000_000 * arguments.workers)
    for _ in range(arguments.rounds):
        yield "bare loop, lists", ceiling(model, corpus, arguments.workers, "encode", limit)
        yield "build", build(model, corpus, folder / "out", arguments.workers, text_bytes)[0]
        yield "bare loop, arrays", ceiling(model, corpus, arguments.workers, "encode_as_numpy", limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, speed in measure(arguments, Path(folder)):
            best[name] = max(best.get(name, 0.0), speed)
            print(f"{name:<20} {speed:7.1f} MB/s", flush=True)
    for name in ("bare loop, lists", "bare loop, arrays"):
        print(f"build / {name}: {best['build'] / best[name]:.1%} (best of {arguments.rounds})")


if __name__ == "__main__":
    main()
