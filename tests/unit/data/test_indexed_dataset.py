"""The indexed format: bytes that the peers write and read, and every kind of damage refused by name."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed import dataset as indexed_module
from megalm.data.indexed.dataset import IndexedDataset, best_dtype
from megalm.data.indexed.token_counts import TokenCounter
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.errors import DataError
from tests.messages import assert_names

# Documents [1, 2, 3] and [4, 5] as u16, byte for byte as Megatron-LM writes them.
GOLDEN_BIN = bytes.fromhex("01000200030004000500")
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000"
    "0100000000000000"
    "08"
    "0200000000000000"
    "0300000000000000"
    "03000000"
    "02000000"
    "0000000000000000"
    "0600000000000000"
    "0000000000000000"
    "0100000000000000"
    "0200000000000000"
)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    prefix = tmp_path / "golden"
    prefix.with_suffix(".bin").write_bytes(GOLDEN_BIN)
    prefix.with_suffix(".idx").write_bytes(GOLDEN_IDX)
    return prefix


def test_writes_the_golden_bytes(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "out", np.uint16) as writer:
        writer.append([1, 2, 3])
        writer.append([4, 5])
    assert (tmp_path / "out.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "out.idx").read_bytes() == GOLDEN_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx"]


def test_reads_the_golden_bytes(golden: Path) -> None:
    dataset = IndexedDataset(golden)
    assert [row.tolist() for row in (dataset[0], dataset[1])] == [[1, 2, 3], [4, 5]]
    assert dataset.sequence_lengths.tolist() == [3, 2]
    assert dataset.sequence_pointers.tolist() == [0, 6]
    assert dataset.document_index.tolist() == [0, 1, 2]
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5]
    assert (len(dataset), dataset.document_count, dataset.dtype) == (2, 2, np.uint16)


def test_accepts_modes(golden: Path) -> None:
    golden.with_suffix(".idx").write_bytes(GOLDEN_IDX + b"\x00\x01")
    assert IndexedDataset(golden).document_count == 2


def test_reads_documents_of_several_sequences(tmp_path: Path) -> None:
    body = np.array([2, 1, 1], "<i4").tobytes() + np.array([0, 4, 6], "<i8").tobytes()
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 3)
    (tmp_path / "many.idx").write_bytes(header + body + np.array([0, 2, 3], "<i8").tobytes())
    (tmp_path / "many.bin").write_bytes(np.array([7, 8, 9, 10], "<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "many")
    assert (len(dataset), dataset.document_count, dataset[2].tolist()) == (3, 2, [10])


@pytest.mark.parametrize(
    ("suffix", "content", "names"),
    [
        (".bin", GOLDEN_BIN + b"\0\0", ["golden.idx", 10, 12]),
        (".idx", b"TNTIDX\0\0" + GOLDEN_IDX[8:], ["TNTIDX"]),
        (".idx", b"PK" + GOLDEN_IDX[2:], ["b'PKIDIDX\\x00\\x00'"]),
        (".idx", GOLDEN_IDX[:9] + b"\x02" + GOLDEN_IDX[10:], [2, 1]),
        (".idx", GOLDEN_IDX[:17] + b"\x09" + GOLDEN_IDX[18:], [9, [1, 2, 3, 4, 5, 8]]),
        (".idx", GOLDEN_IDX[:-8] + struct.pack("<q", 1), [0, 2]),
        (".idx", GOLDEN_IDX[:17] + b"\x06" + GOLDEN_IDX[18:], ["float64"]),
        (".idx", GOLDEN_IDX[:17] + b"\x07" + GOLDEN_IDX[18:], ["float32"]),
        (".idx", GOLDEN_IDX[:34] + struct.pack("<2i", 3, -2) + GOLDEN_IDX[42:], [1]),
        (".idx", GOLDEN_IDX[:34] + struct.pack("<2i", 2**31 - 1, 2) + GOLDEN_IDX[42:], [1]),
        (".idx", GOLDEN_IDX[:50] + struct.pack("<q", 5) + GOLDEN_IDX[58:], [1]),
    ],
)
def test_refuses_damage_at_opening(golden: Path, suffix: str, content: bytes, names: list[object]) -> None:
    golden.with_suffix(suffix).write_bytes(content)
    with pytest.raises(DataError) as error:
        IndexedDataset(golden)
    assert_names(error.value, golden.with_suffix(suffix), *names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", range(len(GOLDEN_IDX)))
def test_refuses_an_index_cut_anywhere(golden: Path, size: int) -> None:
    golden.with_suffix(".idx").write_bytes(GOLDEN_IDX[:size])
    with pytest.raises(DataError) as error:
        IndexedDataset(golden)
    assert_names(error.value, golden.with_suffix(".idx"), size, 34 if size < 34 else len(GOLDEN_IDX))


@pytest.mark.parametrize("size", range(len(GOLDEN_BIN)))
def test_refuses_tokens_cut_anywhere(golden: Path, size: int) -> None:
    golden.with_suffix(".bin").write_bytes(GOLDEN_BIN[:size])
    with pytest.raises(DataError) as error:
        IndexedDataset(golden)
    assert_names(error.value, golden.with_suffix(".bin"), "golden.idx", 10, size)


def test_refuses_absent_files(golden: Path) -> None:
    golden.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"golden\.bin"):
        IndexedDataset(golden)


def test_verify_finds_a_negative_length_that_fits_its_offsets(golden: Path) -> None:
    lengths, offsets = struct.pack("<2i", 8, -3), struct.pack("<2q", 0, 16)
    golden.with_suffix(".idx").write_bytes(GOLDEN_IDX[:34] + lengths + offsets + GOLDEN_IDX[58:])
    with pytest.raises(DataError) as error:
        IndexedDataset(golden)
    assert_names(error.value, golden.with_suffix(".idx"), 1)


@pytest.mark.parametrize("entries", [1, 2, 3, 100])
def test_verify_names_the_entry_wherever_it_reads_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(indexed_module, "CHECKED_ENTRIES", entries)
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.append_documents(np.arange(15), [3, 1, 4, 0, 5, 2])
    whole = (tmp_path / "x.idx").read_bytes()
    IndexedDataset(tmp_path / "x")
    pointers, documents = 34 + 4 * 6, 34 + 12 * 6
    for place, number in (*((pointers + 8 * n, n) for n in range(5)), *((documents + 8 * n, n) for n in range(1, 6))):
        damaged = whole[:place] + struct.pack("<q", 99) + whole[place + 8 :]
        (tmp_path / "x.idx").write_bytes(damaged)
        with pytest.raises(DataError) as error:
            IndexedDataset(tmp_path / "x")
        assert_names(error.value, tmp_path / "x.idx", number)


def test_a_token_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError) as error,
        IndexedDatasetWriter(tmp_path / "out", np.uint16) as writer,
    ):
        writer.append([1, 65536])
    assert_names(error.value, tmp_path / "out.bin", 65536, "uint16")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """By a limit of the system. What is still buffered cannot be written when the file is closed, either."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    def write() -> None:
        with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
            for _ in range(30_000):
                writer.append([1, 2, 3])

    try:
        with pytest.raises(DataError) as error:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_names(error.value, tmp_path / "x.bin", os.strerror(errno.EFBIG))
    assert list(tmp_path.iterdir()) == []


def test_abort_leaves_what_was_there(golden: Path) -> None:
    writer = IndexedDatasetWriter(golden, np.uint16)
    writer.append([9])
    writer.abort()
    assert IndexedDataset(golden).tokens.tolist() == [1, 2, 3, 4, 5]
    assert len(list(golden.parent.iterdir())) == 2


def test_empty_documents_and_empty_datasets(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "out", np.uint16) as writer:
        writer.append_documents([5], [0, 1, 0])
    dataset = IndexedDataset(tmp_path / "out")
    assert [dataset[index].tolist() for index in range(3)] == [[], [5], []]
    with IndexedDatasetWriter(tmp_path / "none", np.uint16):
        pass
    assert len(IndexedDataset(tmp_path / "none").tokens) == 0


def test_fingerprint_is_of_the_content(golden: Path, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "same", np.uint16) as writer:
        writer.append_documents([1, 2, 3, 4, 5], [3, 2])
    with IndexedDatasetWriter(tmp_path / "other", np.uint16) as writer:
        writer.append_documents([1, 2, 3, 4, 6], [3, 2])
    same, other = IndexedDataset(tmp_path / "same"), IndexedDataset(tmp_path / "other")
    assert IndexedDataset(golden).fingerprint == same.fingerprint != other.fingerprint


def test_best_dtype() -> None:
    assert [best_dtype(size).name for size in (257, 65_499, 65_500, 128_000)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int16])
def test_tokens_outside_the_vocabulary_are_found(tmp_path: Path, dtype: type[np.generic]) -> None:
    counter = TokenCounter(300, "x.bin")
    counter.add(np.array([0, 299, 7, 7], dtype=dtype))
    assert (counter.summary().tokens, counter.summary().largest_token, counter.counts[7]) == (4, 299, 2)
    wrong = [300] if dtype is np.uint16 else [300, 2**15 - 1, -1]
    for token in wrong:
        with pytest.raises(DataError) as error:
            counter.add(np.array([1, token], dtype=dtype))
        assert_names(error.value, "x.bin", token, 300)
