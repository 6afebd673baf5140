"""Near copies: as a plain search finds them, over batches, units, workers, shards and interruptions alike."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
from pathlib import Path

import datasketch
import numpy as np
import pytest

from megalm.data.analysis.dataset_info import verify
from megalm.data.builder import builder as builder_module
from megalm.data.builder import dedup as near_module
from megalm.data.builder.build_plan import BuildOptions
from megalm.data.builder.builder import Built, build_files
from megalm.data.builder.dedup import PERMUTATIONS, MinHashDeduplicator, Pair, Values, bands_of
from megalm.data.builder.merge import merge_datasets
from megalm.data.indexed.dataset import IndexedDataset, sidecar_path
from megalm.data.indexed.metadata import DocumentSources
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import DataError
from tests.messages import assert_names

THRESHOLD = 0.6
UNIT = 4000
FILES = (".bin", ".idx", ".sources", ".minhash")


def families(generator: np.random.Generator, count: int) -> Values:
    """[count, P]: many documents that are some way alike, and some bands that very many share."""
    values = generator.integers(0, 1 << 32, (count, PERMUTATIONS), dtype=np.uint32)
    parents = values[: count // 10][generator.integers(0, count // 10, count)]
    values = np.where(generator.random((count, PERMUTATIONS)) < generator.random((count, 1)), parents, values)
    values[generator.random(count) < 0.3, :24] = 7
    return values.astype(np.uint32)


def plain_search(values: Values, threshold: float) -> tuple[list[bool], list[Pair]]:
    bands, rows = bands_of(threshold)
    kept: list[int] = []
    new, pairs = [], []
    for number, row in enumerate(values):
        cut = row[: bands * rows].reshape(bands, rows)
        others = values[kept]
        shared = (others[:, : bands * rows].reshape(-1, bands, rows) == cut).all(axis=2).any(axis=1)
        alike = (others == row).mean(axis=1)
        near = np.flatnonzero(shared & (alike >= threshold))
        new.append(not len(near))
        if len(near):
            pairs.append(Pair(number, kept[near[0]], float(alike[near[0]])))
        else:
            kept.append(number)
    return new, pairs


@pytest.mark.parametrize("batch", [1, 7, 4096])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
def test_as_a_plain_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, threshold: float) -> None:
    monkeypatch.setattr(near_module, "BATCH", batch)
    values = families(np.random.default_rng(5), 600)
    values[500:] = np.where(np.arange(600 - 500)[:, None] % 2, values[:100], values[500:])
    new, pairs = plain_search(values, threshold)
    assert 0 < sum(new) < len(new)
    seen = MinHashDeduplicator(tmp_path / "seen", threshold)
    found = np.concatenate([seen.add(values[:250]), seen.add(values[:0]), seen.add(values[250:])])
    assert found.tolist() == new
    assert seen.pairs == pairs[: near_module.KEPT_PAIRS]


def test_tables_grow(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 1 << 32, (9000, PERMUTATIONS), dtype=np.uint32)
    seen = MinHashDeduplicator(tmp_path / "seen", 0.8)
    assert seen.add(values).all()
    assert not seen.add(values).any()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / 9000 < 1100  # as docs/data.md has it


def test_a_full_disk_is_an_error_and_no_fault_of_memory(tmp_path: Path) -> None:
    """By a limit of the system, in place of a disk."""
    values = np.random.default_rng(1).integers(0, 1 << 32, (9000, PERMUTATIONS), dtype=np.uint32)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    seen = MinHashDeduplicator(tmp_path / "seen", 0.8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(DataError) as error:
            seen.add(values)
        assert_names(error.value, os.strerror(errno.EFBIG))
        assert str(tmp_path / "seen") in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_bands_are_those_of_the_library(threshold: float) -> None:
    known = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    assert bands_of(threshold) == (known.b, known.r)


def chains() -> list[tuple[str, ...]]:
    """Texts of which the second is near the first, and the third near the second only."""
    made, order = [], random.Random(2)
    for family in range(12):
        words = [f"w{family}x{order.randrange(10_000)}" for _ in range(100)]
        second = [*words[:-12], *(f"end{family}y{place}" for place in range(12))]
        third = [*(f"start{family}z{place}" for place in range(12)), *second[12:]]
        made.append(tuple(" ".join(text) for text in (words, second, third)))
    return made


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """First ones in a file, their copies, and the copies of those, in another; text like no other between."""
    folder, order = tmp_path / "corpus", random.Random(3)
    folder.mkdir()
    other = [" ".join(f"o{order.randrange(10**6)}" for _ in range(60)) for _ in range(30)]
    texts = [*[chain[0] for chain in chains()], *other[:15], *[chain[1] for chain in chains()], *other[15:]]
    (folder / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    texts = [*[chain[2] for chain in chains()], *other[:5], *[chain[0] for chain in chains()]]
    (folder / "b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return sorted(folder.iterdir())


def options(shard: tuple[int, int] = (0, 1)) -> BuildOptions:
    return BuildOptions(dedup="minhash", minhash_threshold=THRESHOLD, unit_bytes=UNIT, shard=shard)


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in FILES]


def sidecar(prefix: Path) -> dict[str, object]:
    facts: dict[str, object] = json.loads(sidecar_path(prefix).read_text())
    return facts | {"prefix": ""}


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_merged_are_the_single_build(tmp_path: Path, corpus: list[Path], shards: int) -> None:
    """Also where a copy's near one is in another shard and is left out itself, so that the copy stays."""
    (whole,) = build_files(corpus, ByteTokenizer(), tmp_path / "whole", options()).reports
    dataset = IndexedDataset(tmp_path / "whole")
    kept = {ByteTokenizer().decode(dataset[place].tolist()) for place in range(len(dataset))}
    stayed = [[text in kept for text in chain] for chain in chains()]
    assert stayed.count([True, False, True]) > 6
    for shard in range(shards):
        (part,) = build_files(corpus, ByteTokenizer(), tmp_path / f"{shard}", options((shard, shards))).reports
        assert (part.removed, part.minhash["awaits_merge"]) == ({}, True)
    prefixes = [tmp_path / f"{shard}" for shard in range(shards)]
    merged = merge_datasets(prefixes, tmp_path / "merged", dedup="minhash")
    for suffix in (".bin", ".idx", ".minhash"):  # a file of two shards has two numbers in .sources
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), suffix
    found, known = (DocumentSources(tmp_path / name, whole.documents) for name in ("merged", "whole"))
    assert [found[place] for place in range(whole.documents)] == [known[place] for place in range(whole.documents)]
    for fact in ("documents", "tokens", "removed", "near_copies", "minhash", "bin_sha256"):
        assert getattr(merged, fact) == getattr(whole, fact), fact
    assert merged.removed["minhash"] == sum(path.read_text().count("\n") for path in corpus) - merged.documents
    copies = {(pair["left_out"], pair["copy_of"]) for pair in merged.near_copies}
    assert (f"{corpus[0]}:28", f"{corpus[0]}:1") in copies
    verify(tmp_path / "merged")
    before = (tmp_path / "merged.bin").stat().st_mtime_ns
    assert merge_datasets(prefixes, tmp_path / "merged", dedup="minhash") == merged
    assert (tmp_path / "merged.bin").stat().st_mtime_ns == before


def test_any_workers_give_the_same(tmp_path: Path, corpus: list[Path]) -> None:
    for workers in (1, 3):
        build_files(corpus, ByteTokenizer(), tmp_path / f"{workers}", options(), workers)
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "1")
        assert sidecar(tmp_path / f"{workers}") == sidecar(tmp_path / "1")


class Stop(BaseException):
    """Stands for the end of the process: nothing may catch it."""


@pytest.mark.parametrize("step", [1, 5])
def test_broken_off_builds_end_the_same(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def build(stop_at: int, prefix: Path) -> Built:
        count = 0

        def add(*_: object) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(builder_module._Counts, "add", add)
            return build_files(corpus, ByteTokenizer(), prefix, options())

    build(0, tmp_path / "whole")
    with pytest.raises(Stop):
        build(step, tmp_path / "out")
    assert build(0, tmp_path / "out").resumed > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sidecar(tmp_path / "out") == sidecar(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("out*")) == sorted(f"out{end}" for end in (*FILES, ".json"))


def test_each_part_of_a_split_has_its_signatures(tmp_path: Path, corpus: list[Path]) -> None:
    build_files(corpus, ByteTokenizer(), tmp_path / "whole", options())
    split = BuildOptions(dedup="minhash", minhash_threshold=THRESHOLD, unit_bytes=UNIT, split=(80, 20))
    built = build_files(corpus, ByteTokenizer(), tmp_path / "x", split)
    parts = [Path(f"{tmp_path}/x-{name}.minhash").read_bytes() for name in ("train", "validation")]
    assert b"".join(parts) == (tmp_path / "whole.minhash").read_bytes()
    assert [len(part) for part in parts] == [4 * PERMUTATIONS * report.documents for report in built.reports]
    for name in ("train", "validation"):
        verify(tmp_path / f"x-{name}")


def test_datasets_built_apart_lose_what_is_near_in_another(tmp_path: Path, corpus: list[Path]) -> None:
    for path in corpus:
        build_files([path], ByteTokenizer(), tmp_path / path.stem, options())
    apart = [sidecar(tmp_path / name) for name in "ab"]
    merged = merge_datasets([tmp_path / name for name in "ab"], tmp_path / "out", dedup="minhash")
    left_out = sum(int(facts["removed"]["minhash"]) for facts in apart)  # type: ignore[index]
    assert merged.removed["minhash"] >= left_out + 12
    again = merge_datasets([tmp_path / "out", tmp_path / "b"], tmp_path / "more", dedup="minhash")
    assert again.documents == merged.documents
    build_files(corpus[:1], ByteTokenizer(), tmp_path / "c", BuildOptions(dedup="minhash"))
    with pytest.raises(DataError) as error:
        merge_datasets([tmp_path / "b", tmp_path / "c"], tmp_path / "two", dedup="minhash")
    assert_names(error.value, tmp_path / "b", 0.6, 0.8, "--minhash-threshold")
    stated = merge_datasets([tmp_path / "b", tmp_path / "c"], tmp_path / "two", dedup="minhash", minhash_threshold=0.9)
    assert stated.options["minhash_threshold"] == 0.9


def test_a_merge_that_loses_signatures_is_refused(tmp_path: Path, corpus: list[Path]) -> None:
    for shard in range(2):
        build_files(corpus, ByteTokenizer(), tmp_path / f"{shard}", options((shard, 2)))
    shards, out = [tmp_path / "0", tmp_path / "1"], tmp_path / "out"
    for dedup in ("none", "exact"):
        with pytest.raises(DataError) as error:
            merge_datasets(shards, out, dedup=dedup)  # type: ignore[arg-type]
        assert_names(error.value, shards[0], "--dedup minhash")
    build_files(corpus, ByteTokenizer(), tmp_path / "plain")
    with pytest.raises(DataError) as error:
        merge_datasets([*shards, tmp_path / "plain"], out, dedup="minhash")
    assert_names(error.value, tmp_path / "plain", "--dedup minhash")
    signatures = tmp_path / "1.minhash"
    whole = signatures.read_bytes()
    for damaged in (whole[:-4], b"x" + whole[1:]):
        signatures.write_bytes(damaged)
        for read in (lambda: merge_datasets(shards, out, dedup="minhash"), lambda: verify(tmp_path / "1")):
            with pytest.raises(DataError) as error:
                read()
            assert_names(error.value, signatures, tmp_path / "1.json", f"{len(whole):,}", f"{len(damaged):,}")
    signatures.unlink()
    with pytest.raises(DataError, match=str(signatures)):
        merge_datasets(shards, out, dedup="minhash")
    signatures.write_bytes(whole)
    facts = json.loads(sidecar_path(shards[1]).read_text())
    facts["minhash"]["shingle_words"] = 7
    sidecar_path(shards[1]).write_text(json.dumps(facts))
    with pytest.raises(DataError, match=str(signatures)):
        merge_datasets(shards, out, dedup="minhash")
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob(".*"))
    with pytest.raises(DataError, match=r"--minhash-threshold 1\.5"):
        merge_datasets(shards, out, dedup="minhash", minhash_threshold=1.5)


def test_signatures_of_an_older_dataset_do_not_stay(tmp_path: Path, corpus: list[Path]) -> None:
    build_files(corpus, ByteTokenizer(), tmp_path / "out", options())
    assert build_files(corpus, ByteTokenizer(), tmp_path / "out", options()).was_there
    (tmp_path / "out.minhash").unlink()
    with pytest.raises(DataError) as error:
        build_files(corpus, ByteTokenizer(), tmp_path / "out", options())
    assert_names(error.value, tmp_path / "out.bin", "--overwrite")
    build_files(corpus, ByteTokenizer(), tmp_path / "out", options(), overwrite=True)
    assert (tmp_path / "out.minhash").exists()
    build_files(corpus, ByteTokenizer(), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out.minhash").exists()
