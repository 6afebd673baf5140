"""How fast datasets are built, against the tokenizer's own ceiling in the same run.

    python benchmarks/build_dataset.py [--megabytes 300] [--workers 2] [--rounds 3]

The text is the Python standard library's, as often as it takes, one JSON object a document. The ceiling is
SentencePiece called in a bare loop over texts that are in memory already, in as many processes: once as people call it
(`encode`, lists of Python integers), once with arrays (`encode_as_numpy`). The build is the command from its start to
its end: Python's start, reading, parsing, encoding, checking that documents come back, writing, hashing.

Rounds alternate and the best of each counts. Beside the speed by the clock stands the speed by processor time (text for
each second of a core): it says the same when others use the machine.
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
from typing import Any, NamedTuple

from megalm.data.recipe import prepare_recipe
from megalm.data.stdlib import stdlib_documents


class Speed(NamedTuple):
    """MB/s, and MB for each second of a core."""

    clock: float
    core: float


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
    start, processor = time.perf_counter(), time.process_time()
    for text in texts:
        encode(text)
    seconds.put((time.perf_counter() - start, time.process_time() - processor))


def ceiling(model: Path, corpus: Path, processes: int, method: str, limit_bytes: int) -> Speed:
    """All processes together, each on its share of the texts."""
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
    times = [seconds.get() for _ in running]
    for process in running:
        process.join()
    return Speed(total / 1e6 / max(clock for clock, _ in times), total / 1e6 / sum(cores for _, cores in times))


def build(model: Path, corpus: Path, prefix: Path, workers: int, text_bytes: int) -> Speed:
    command = [sys.executable, str(ROOT / "data_tools" / "build_dataset.py"), "--input", str(corpus)]
    command += ["--tokenizer", str(model), "--output-prefix", str(prefix), "--workers", str(workers), "--overwrite"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        path.unlink()
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Speed(text_bytes / 1e6 / seconds, text_bytes / 1e6 / cores)


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Speed]]:
    model = prepare_recipe("python-stdlib").tokenizer_path
    corpus = folder / "corpus.jsonl"
    text_bytes = write_corpus(corpus, arguments.megabytes)
    limit = min(text_bytes, 60_000_000 * arguments.workers)
    for _ in range(arguments.rounds):
        yield "bare loop, lists", ceiling(model, corpus, arguments.workers, "encode", limit)
        yield "build", build(model, corpus, folder / "out", arguments.workers, text_bytes)
        yield "bare loop, arrays", ceiling(model, corpus, arguments.workers, "encode_as_numpy", limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    best: dict[str, Speed] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, speed in measure(arguments, Path(folder)):
            best[name] = Speed(*map(max, zip(best.get(name, speed), speed, strict=True)))
            print(f"{name:<18} {speed.clock:6.1f} MB/s  {speed.core:6.1f} MB per second of a core", flush=True)
    for name in ("bare loop, lists", "bare loop, arrays"):
        clock, core = (ours / theirs for ours, theirs in zip(best["build"], best[name], strict=True))
        print(f"build / {name}: {clock:.0%} by the clock, {core:.0%} by processor time (best of {arguments.rounds})")


if __name__ == "__main__":
    main()
