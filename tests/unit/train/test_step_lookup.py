"""What a step of a run has read, from its folder: over rollbacks, another batch, another sequence length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.data.builder.builder import build_files
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import DataError
from megalm.train.step_lookup import StepSamples, samples_of_step
from tests.messages import assert_names


@pytest.fixture
def data(tmp_path: Path) -> str:
    """40 documents of 100 bytes, each of one letter or sign."""
    lines = (json.dumps({"text": chr(33 + number) * 100}) + "\n" for number in range(40))
    (tmp_path / "my.jsonl").write_text("".join(lines))
    build_files([tmp_path / "my.jsonl"], ByteTokenizer(), tmp_path / "my")
    return str(tmp_path / "my")


def write_attempt(folder: Path, data: str, number: int, batch: int, suffix: str = "", **facts: Any) -> None:
    length = facts.pop("length", 8)
    section = {"train": data, "tokenizer": "bytes", "sequence_length": length, "split": None, "recipe": None}
    folder.mkdir(exist_ok=True)
    (folder / f"config{suffix}.yaml").write_text(json.dumps({"data": section, "train": {"steps": 20}}))
    for name in ("deepspeed", "deepspeed.resolved"):
        (folder / f"{name}{suffix}.json").write_text(json.dumps({"train_batch_size": batch}))
    (folder / f"environment{suffix}.json").write_text(json.dumps({"attempt": number, **facts}))


def write_rows(folder: Path, *rows: tuple[str, int, int, int]) -> None:
    """Events ("start", attempt, step, -) and steps ("train", attempt, step, samples)."""
    lines = []
    for kind, attempt, step, samples in rows:
        what = {"kind": "train", "samples": samples} if kind == "train" else {"kind": "event", "event": kind}
        lines.append(json.dumps({**what, "attempt": attempt, "step": step, "time": 0.0}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_rollbacks_and_another_batch(tmp_path: Path, data: str) -> None:
    run = tmp_path / "run"
    write_attempt(run, data, 1, 16, suffix=".attempt-1")
    write_attempt(run, data, 3, 8)
    write_rows(
        run,
        ("start", 1, 0, 0),
        *(("train", 1, step, 16 * step) for step in range(1, 7)),
        ("rollback", 2, 4, 0),  # in the same job; 32 samples are passed over
        ("train", 2, 6, 128),  # step 5 has no row: a log interval
        ("resume", 3, 6, 0),
        ("train", 3, 7, 136),
    )
    for step, first, end, trained in (
        (1, 0, 16, True),
        (4, 48, 64, True),
        (5, 96, 112, True),
        (6, 112, 128, True),
        (7, 128, 136, True),
        (9, 144, 152, False),
    ):
        read = samples_of_step(run, step)
        assert (read.first, read.end, read.trained) == (first, end, trained), step
        assert {piece.sample for piece in read.pieces} == set(range(first, end))


def tokens_of(read: StepSamples) -> set[tuple[int, int]]:
    """(document, token) of what is read; of each sample all but the last, which is the next one's first."""
    found = set()
    for sample in range(read.first, read.end):
        here = [
            (piece.document, token)
            for piece in read.pieces
            if piece.sample == sample
            for token in range(piece.first, piece.end)
        ]
        found |= set(here[:-1])
    return found


def test_another_sequence_length_goes_on_in_what_is_left(tmp_path: Path, data: str) -> None:
    run = tmp_path / "run"
    write_attempt(run, data, 1, 16, suffix=".attempt-1")
    write_attempt(run, data, 2, 16, length=16, sequence_lengths_before=[[8, 160]])
    write_rows(
        run,
        ("start", 1, 0, 0),
        *(("train", 1, step, 16 * step) for step in range(1, 11)),
        ("resume", 2, 10, 0),
        ("train", 2, 11, 16),
        ("train", 2, 12, 32),
    )
    before = [tokens_of(samples_of_step(run, step)) for step in range(1, 11)]
    after = [tokens_of(samples_of_step(run, step)) for step in (11, 12)]
    assert [len(tokens) for tokens in before] == [128] * 10
    assert [len(tokens) for tokens in after] == [256] * 2
    everything = set().union(*before, *after)
    assert len(everything) >= 1792 - 16  # where a cut falls, some tokens are read twice
    assert sum(len(tokens) for tokens in (*before, *after)) == 1792


def test_a_run_that_has_not_begun_and_none(tmp_path: Path, data: str) -> None:
    run = tmp_path / "run"
    write_attempt(run, data, 1, 4)
    read = samples_of_step(run, 3)
    assert (read.first, read.end, read.trained) == (8, 12, False)
    text = "".join(read.tokenizer.decode(piece.tokens) for piece in read.pieces)
    assert len(text) >= 4 * 8
    assert all(piece.source is not None and "my.jsonl:" in str(piece.source) for piece in read.pieces)
    with pytest.raises(DataError) as refused:
        samples_of_step(tmp_path, 3)
    assert_names(refused.value, tmp_path, "config.yaml", "deepspeed.resolved.json")
