"""Scanning finds what was put there; statistics and steps say what is there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megalm.data.analysis.anomaly_scan import scan, strange_stretches, write_scan
from megalm.data.analysis.dataset_info import statistics, verify
from megalm.data.analysis.sample_sources import spans_of
from megalm.data.builder.builder import build_dataset, build_files
from megalm.data.builder.merge import merge_datasets
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.readers.document_reader import Document
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import TrainingSamples
from megalm.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from tests.messages import assert_names

WINDOW = 256


@pytest.fixture
def strange(tmp_path: Path, source_texts: list[str], model_path: Path) -> IndexedDataset:
    """Source code with noise in document 40, one token over and over in 80, and bytes of characters in 120."""
    tokenizer = load_tokenizer(model_path)
    (code,) = tokenizer.encode_batch(["".join(source_texts)])
    rows = [code[start : start + 500] for start in range(0, 160 * 500, 500)]
    random = np.random.default_rng(0)
    rows[40] = random.integers(260, 600, 2000).astype(np.int32)
    rows[80] = np.full(2000, 300, dtype=np.int32)
    (rows[120],) = tokenizer.encode_batch(["".join(map(chr, random.integers(0x4E00, 0x9000, 700)))])
    with IndexedDatasetWriter(tmp_path / "strange", np.uint16) as writer:
        for row in rows:
            writer.append(row)
    return IndexedDataset(tmp_path / "strange")


def test_what_was_put_there_is_found_first(strange: IndexedDataset, model_path: Path, tmp_path: Path) -> None:
    fallback = load_tokenizer(model_path).fallback_ids()
    scanned = scan(strange, fallback, WINDOW)
    stretches = strange_stretches(strange, scanned)
    found: dict[int, tuple[int, str]] = {}
    for number in (40, 80, 120):
        start = int(strange.sequence_pointers[number]) // 2
        end = start + int(strange.sequence_lengths[number])
        for place, stretch in enumerate(stretches):
            if stretch.first < end and stretch.end > start:
                found.setdefault(number, (place, stretch.reason))
    # The code itself has strange places too, but none as strange as all three.
    assert set(found) == {40, 80, 120}
    assert min(place for place, _ in found.values()) == 0
    assert max(place for place, _ in found.values()) <= 5
    assert found[40][1] in ("unigram_loss", "entropy")
    assert found[80][1] in ("repetition", "entropy")
    assert found[120][1] == "unknown"
    picture, page = write_scan(scanned, stretches, "strange <&>", tmp_path / "report")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert_names(text, f"{stretches[0].first:,}", f"{stretches[0].end:,}")
    assert "strange &lt;&amp;&gt;" in text
    assert "http" not in text  # stands alone


def test_measures_by_hand(tmp_path: Path) -> None:
    rows = [[1, 2, 3, 4] * 4, [7] * 16, list(range(10, 26)), [1, 2]]
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for row in rows:
            writer.append(row)
    fallback = np.zeros(30, dtype=np.bool_)
    fallback[7] = True
    scanned = scan(IndexedDataset(tmp_path / "x"), fallback, 16)
    assert scanned.measures["entropy"].tolist() == pytest.approx([math.log(4), 0, math.log(16), math.log(2)], abs=1e-5)
    assert scanned.measures["repetition"].tolist() == pytest.approx([9 / 12, 1, 0, 0])
    assert scanned.measures["unknown"].tolist() == [0, 1, 0, 0]
    shares = {1: 5 / 50, 2: 5 / 50, 3: 4 / 50, 4: 4 / 50, 7: 16 / 50}
    losses = {token: -math.log(share) for token, share in shares.items()}
    assert scanned.measures["unigram_loss"][0] == pytest.approx(np.mean([losses[token] for token in (1, 2, 3, 4)]))
    assert scanned.measures["unigram_loss"][3] == pytest.approx(losses[1])


def test_how_far_it_is_adds_up_to_all_tokens(tmp_path: Path) -> None:
    """Each pass over the dataset tells of each token once; so do merging and verifying."""
    for name, texts in (("a", ["some text " * 200, "more"]), ("b", ["x"])):
        build_dataset([Document(text, name) for text in texts], ByteTokenizer(), tmp_path / name)
    dataset = IndexedDataset(tmp_path / "a")
    tokens, told = len(dataset.tokens), list[int]()
    scan(dataset, None, 64, told.append)
    assert sum(told) == 2 * tokens
    told.clear()
    statistics(dataset, tell=told.append)
    assert sum(told) == 2 * tokens
    for dedup in ("none", "exact"):
        told.clear()
        prefixes = [tmp_path / "a", tmp_path / "b"]
        merge_datasets(prefixes, tmp_path / dedup, dedup=dedup, tell=told.append)  # type: ignore[arg-type]
        assert sum(told) == tokens + 2
    told.clear()
    verify(tmp_path / "a", tell=told.append)
    assert sum(told) == tokens


def test_a_scan_of_nothing(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "none", np.uint16):
        pass
    dataset = IndexedDataset(tmp_path / "none")
    assert strange_stretches(dataset, scan(dataset)) == []


def test_statistics(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        for row in ([97, 97, 256], [98, 256], [97, 97, 256], []):
            writer.append(row)
    found = statistics(IndexedDataset(tmp_path / "x"), ByteTokenizer())
    assert found.length_histogram == [(0, 0, 1), (2, 3, 3)]
    assert found.frequent == [(97, 0.5), (256, 0.375), (98, 0.125)]
    assert found.tokens_per_byte == 8 / 5
    assert (found.fallback_share, found.duplicates) == (0.0, 1)


def test_the_documents_of_a_step(tmp_path: Path) -> None:
    texts = ["first document", "second", "the third document", "4th"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_files([path], ByteTokenizer(), tmp_path / "out")
    dataset = IndexedDataset(tmp_path / "out")
    samples = TrainingSamples(dataset, (0, 4), 8, seed=1)
    step, batch = 2, 2
    pieces = list(spans_of(BlendedSamples([samples], [MixtureStage(0, (1.0,))]), (step - 1) * batch, batch))
    for sample in range(2, 4):
        tokens, labels = samples.sample(sample)
        read = [token for piece in pieces if piece.sample == sample for token in piece.tokens]
        assert read == [*tokens.tolist(), labels[-1]]
    for piece in pieces:
        assert [*texts[piece.document].encode(), 256][piece.first : piece.end] == list(piece.tokens)
        assert piece.source is not None
        assert piece.source.name == f"{path}:{piece.document + 1}"
    assert [dataset.document_at(token) for token in (0, 14, 15, 21, 22)] == [0, 0, 1, 1, 2]
