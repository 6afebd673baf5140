"""Raw text: each token of each document is scored exactly once, and as a plain loop over the model scores it."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megalm.data.sampling.batch_loader import ScoredSequence, SequenceBatches
from megalm.data.sampling.samples import IGNORE_INDEX, evenly
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import ConfigError, DataError
from megalm.inference.inference_model import InferenceModel
from megalm.inference.text_eval import TextTask, document_windows, read_text
from tests.inference_models import GPT2, LLAMA, write_run
from tests.messages import assert_names

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24
TEXTS = ("short", "a text of more than one window, whose last words are scored with context before them", "größer ❌")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    return InferenceModel(write_run(tmp_path_factory.mktemp("run"), ByteTokenizer(), LLAMA, LENGTH))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def plain_loss(model: InferenceModel, tokens: list[int], overlap: int) -> float:
    """A window at a time, one whole softmax each, in fp64."""
    total, scored, start = 0.0, 1, 0
    while scored < len(tokens):
        window = torch.tensor([tokens[start : start + LENGTH]])
        with torch.no_grad():
            logits = model.network(window)[0].double()
        targets = torch.tensor(tokens[start + 1 : start + LENGTH + 1])
        losses = functional.cross_entropy(logits[: len(targets)], targets, reduction="none")
        total += float(losses[scored - start - 1 :].sum())
        scored = start + len(targets) + 1
        start += LENGTH - overlap
    return total


@pytest.mark.parametrize("overlap", [0, 7, 12, 23])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss_is_that_of_a_plain_loop(model: InferenceModel, file: Path, overlap: int, batch_size: int) -> None:
    found = read_text(str(file), model.facts, overlap)
    beats: list[int] = []
    task = TextTask([found], model.tokenizer.token_bytes(), batch_size)
    (row,) = task.rows(model, lambda: beats.append(1))
    nats = sum(plain_loss(model, [256, *text.encode()], overlap) for text in TEXTS)
    sizes = sum(len(text.encode()) for text in TEXTS)
    words = sum(len(text.split()) for text in TEXTS)
    assert len(beats) == task.batches
    assert (row["targets"], row["text_bytes"], row["words"], row["documents"]) == (sizes, sizes, words, 3)
    assert row["loss"] == pytest.approx(nats / sizes, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(nats / sizes / math.log(2), rel=1e-6)
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)


def test_more_context_is_another_loss(model: InferenceModel, file: Path) -> None:
    """Or the test above would not see the overlap."""
    sizes = model.tokenizer.token_bytes()
    losses = [
        TextTask([read_text(str(file), model.facts, overlap)], sizes, 4).rows(model, int)[0]["loss"]
        for overlap in (0, 12)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("count", [1, 2, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 5 * LENGTH + 3])
@pytest.mark.parametrize("overlap", [0, 1, 12, LENGTH - 1])
def test_every_token_is_scored_once(model: InferenceModel, count: int, overlap: int) -> None:
    tokens = np.arange(count)
    windows = list(document_windows(tokens, model.facts, overlap))
    scored = [int(token) for window in windows for token in window.tokens[window.first :]]
    assert scored == list(range(count))
    assert all(1 <= window.first < len(window.tokens) <= LENGTH + 1 for window in windows)
    assert all(window.first > overlap for window in windows[1:]), "each carries so much context"


def test_documents_kept_apart_begin_without_an_end(tmp_path: Path, file: Path) -> None:
    model = InferenceModel(write_run(tmp_path, ByteTokenizer(), GPT2, LENGTH, document_mask=True))
    row = TextTask([read_text(str(file), model.facts)], model.tokenizer.token_bytes(), 4).rows(model, int)[0]
    nats = sum(plain_loss(model, list(text.encode()), 12) for text in TEXTS)
    targets = sum(len(text.encode()) - 1 for text in TEXTS)
    assert (row["targets"], row["text_bytes"]) == (targets, targets)
    assert row["loss"] == pytest.approx(nats / targets, rel=1e-6)


def test_several_have_a_total(model: InferenceModel, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("one more\n")
    sets = [read_text(str(path), model.facts) for path in (file, other)]
    first, second, total = TextTask(sets, model.tokenizer.token_bytes(), 4).rows(model, int)
    assert [row["dataset"] for row in (first, second, total)] == [str(file), str(other), "all"]
    assert total["targets"] == first["targets"] + second["targets"]
    nats = [row["loss"] * row["targets"] for row in (first, second, total)]
    assert nats[2] == pytest.approx(nats[0] + nats[1])
    assert total["bits_per_byte"] == pytest.approx(nats[2] / math.log(2) / total["text_bytes"])


def test_what_cannot_be_read_is_counted(model: InferenceModel, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": ""}\n{"other": 1}\n{"text": "good"}\n')
    found = read_text(str(path), model.facts)
    assert (found.documents, found.skipped) == (1, 2)
    assert_names(found.problem, f"{path}:2")
    path.write_bytes(path.read_bytes() * 100)
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()) + b"rubbish" * 5000)
    found = read_text(str(packed), model.facts)
    assert (found.documents, found.skipped) == (100, 201)
    assert_names(found.problem, f"{packed}:2", 1, 100, 300)
    path.write_text('{"text": ""}\n')
    for refused in (str(path), str(tmp_path / "absent.txt")):
        with pytest.raises(DataError) as caught:
            read_text(refused, model.facts)
        assert_names(caught.value, refused)
    with pytest.raises(ConfigError) as too_long:
        read_text(str(path), model.facts, overlap=LENGTH)
    assert_names(too_long.value, f"--overlap {LENGTH}", LENGTH - 1)


def test_samples_are_spread_evenly(model: InferenceModel, file: Path) -> None:
    assert evenly(10, None) == list(range(10))
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(10, 2) == [2, 7]
    assert read_text(str(file), model.facts, max_samples=1).words == len(TEXTS[1].split())


def test_batches_hold_like_lengths_and_lose_nothing() -> None:
    sequences = [ScoredSequence(np.arange(length) + 100 * length, 1 + length // 3) for length in (5, 9, 2, 7, 7)]
    batches = SequenceBatches(sequences, 2)
    seen = []
    for number, batch in enumerate(batches):
        (micro_batch,) = batch.micro_batches
        for row, index in enumerate(batches.indices(number)):
            tokens = sequences[index].tokens
            assert micro_batch.tokens[row, : len(tokens) - 1].tolist() == tokens[:-1].tolist()
            scored = micro_batch.labels[row][micro_batch.labels[row] != IGNORE_INDEX]
            assert scored.tolist() == tokens[sequences[index].first :].tolist()
            seen.append(index)
        assert batch.target_count == (micro_batch.labels != IGNORE_INDEX).sum()
    assert (len(batches), sorted(seen)) == (3, [0, 1, 2, 3, 4])
    assert [batch.micro_batches[0].tokens.shape for batch in batches] == [(2, 8), (2, 6), (1, 1)]
