"""How fast datasets are built, against the tokenizer's own ceiling in the same run.

    python -m benchmarks build_dataset [--megabytes 300] [--workers 2] [--rounds 3]
    python -m benchmarks build_dataset --tokenizers      a table: speed and compression of each kind, 8192 pieces
    python -m benchmarks build_dataset --samples         opening, sample orders, reading random samples

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

import numpy as np

from megalm.data.builder.stdlib_corpus import prepare_recipe, stdlib_documents
from megalm.data.indexed.dataset import HEADER, MAGIC, IndexedDataset
from megalm.data.sampling import packing, sample_order
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import TrainingSamples
from megalm.data.tokenizers.tokenizer import load_tokenizer
from megalm.data.tokenizers.training import train_tokenizer

VOCABULARY = 8192
STEP_SECONDS = 0.1


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


def train_huggingface(texts: list[str], path: Path) -> None:
    """Byte-level BPE as GPT-2's."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(path))


def compare_tokenizers(folder: Path) -> None:
    """Each kind trained on nine of ten documents of the standard library, measured on the others and on all."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = [document.text for document in stdlib_documents()]
    held_out, rest = texts[::10], [text for number, text in enumerate(texts) if number % 10]
    makers: dict[str, Any] = {
        "SentencePiece unigram": (lambda path: train_tokenizer(rest, path, VOCABULARY), "unigram.model"),
        "SentencePiece BPE": (lambda path: train_tokenizer(rest, path, VOCABULARY, "bpe"), "bpe.model"),
        "Hugging Face BPE": (lambda path: train_huggingface(rest, path), "tokenizer.json"),
        "bytes": (None, "bytes"),
    }
    print("kind                    training s  MB per second of a core  bytes per token, held out  exact of all")
    for name, (make, file) in makers.items():
        start = time.perf_counter()
        if make is not None:
            make(folder / file)
        training = time.perf_counter() - start
        tokenizer = load_tokenizer(folder / file if make else file)
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            rows = tokenizer.encode_batch(texts)
            best = min(best, time.process_time() - begin)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        exact = sum(tokenizer.is_exact(text, row) for text, row in zip(texts, rows, strict=True))
        tokens = sum(map(len, tokenizer.encode_batch(held_out)))
        packed = sum(len(text.encode()) for text in held_out) / tokens
        print(f"{name:<22}  {training:10.1f}  {megabytes / best:23.1f}  {packed:23.2f}  {exact:>5} of {len(texts)}")


def measure_samples(folder: Path) -> None:
    """A dataset of 10 GB that holds nothing but zeros, so that only the index is on disk."""
    documents, length = 5_000_000, 1000
    prefix = folder / "big"
    with Path(f"{prefix}.idx").open("wb") as index:
        index.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        index.write(np.full(documents, length, "<i4").data)
        index.write((np.arange(documents, dtype="<i8") * length * 2).data)
        index.write(np.arange(documents + 1, dtype="<i8").data)
    with Path(f"{prefix}.bin").open("wb") as tokens:
        tokens.truncate(documents * length * 2)
    for state in ("not cached", "cached"):
        start = time.perf_counter()
        dataset = IndexedDataset(prefix)
        samples = TrainingSamples(dataset, (0, documents), 1024, 1, cache=folder / "orders")
        samples.sample(0)
        print(f"opened with a first sample, {state}: {time.perf_counter() - start:.3f} s")
    numbers = np.random.default_rng(0).integers(0, int(samples.samples_per_epoch), 3000)
    start = time.perf_counter()
    for number in numbers:
        samples.sample(int(number))
    print(f"random samples: {len(numbers) * 1024 / (time.perf_counter() - start) / 1e6:.1f} M tokens/s")
    with BatchLoader(samples, BatchLayout(64, 8, 0, 1)) as loader:
        loader.batch(0)
        waits = []
        for step in range(1, 50):
            time.sleep(STEP_SECONDS)  # the training step, in which the next batches are read
            start = time.perf_counter()
            loader.batch(64 * step)
            waits.append(time.perf_counter() - start)
    print(f"a step of {STEP_SECONDS} s waits for its batch of 64 x 1024 tokens: {1000 * max(waits):.2f} ms at most")
    start = time.perf_counter()
    sample_order.permutation(np.random.RandomState(1), 10**9)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"order of 10^9 samples: {time.perf_counter() - start:.0f} s, {peak:.1f} GB")


def measure_packing(documents: int = 40_000_000, length: int = 2048) -> None:
    """Documents whose lengths are log-normal, of 400 tokens in the median and 830 on average."""
    lengths = np.exp(np.random.default_rng(0).normal(6.0, 1.2, documents)).astype("<i4") + 1
    start = time.process_time()
    state = np.random.RandomState(1)
    arrays = packing.pack(lengths, length, lambda: sample_order.permutation(state, documents))
    seconds, size = time.process_time() - start, sum(array.nbytes for array in arrays.values())
    packed = packing.Packing(packing.Pieces(np.zeros(documents, np.int64), lengths), length, arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{documents:,} documents packed into {len(packed):,} samples of {length}: {seconds:.1f} s, "
        f"{peak / 1e6:.1f} GB at most, {size / 1e9:.1f} GB kept, {packed.padding_share:.3%} padding"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizers", action="store_true")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--packing", action="store_true")
    arguments = parser.parse_args()
    if arguments.packing:
        measure_packing()
        return
    if arguments.tokenizers or arguments.samples:
        with tempfile.TemporaryDirectory() as folder:
            (compare_tokenizers if arguments.tokenizers else measure_samples)(Path(folder))
        return
    best: dict[str, Speed] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, speed in measure(arguments, Path(folder)):
            best[name] = Speed(*map(max, zip(best.get(name, speed), speed, strict=True)))
            print(f"{name:<18} {speed.clock:6.1f} MB/s  {speed.core:6.1f} MB per second of a core", flush=True)
    for name in ("bare loop, lists", "bare loop, arrays"):
        clock, core = (ours / theirs for ours, theirs in zip(best["build"], best[name], strict=True))
        print(f"build / {name}: {clock:.0%} by the clock, {core:.0%} by processor time (best of {arguments.rounds})")
