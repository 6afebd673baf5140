"""A run that says what its dataset is built of: built once for all ranks, refused or built again when it differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.data.indexed.dataset import IndexedDataset
from tests.e2e.conftest import SmallData
from tests.e2e.jobs import Finished, finish, pretrain

pytestmark = pytest.mark.e2e


def train(folder: Path, data: SmallData, *words: str, ranks: int = 1) -> Finished:
    small = [word for word in data.words if not word.startswith(("data.", "schedule."))]
    own = ("data.train=my", "data.input=my.jsonl", "data.sequence_length=64", "data.split=null", "train.steps=2")
    return finish(folder, pretrain(*small, *own, "schedule.warmup_steps=1", *words, ranks=ranks))


def test_built_refused_and_built_again(small_data: SmallData, tmp_path: Path) -> None:
    lines = (json.dumps({"text": document.text}) + "\n" for document in small_data.documents)
    (tmp_path / "my.jsonl").write_text("".join(lines))
    trained = f"data.tokenizer={small_data.tokenizer}"
    first = train(tmp_path, small_data, trained, "data.rebuild=auto", ranks=2)
    assert first.code == 0, first.explain()
    assert first.stdout.count("building my from my.jsonl") == 1
    tokens = len(IndexedDataset(tmp_path / "my").tokens)
    refused = train(tmp_path, small_data, "data.tokenizer=bytes")
    assert refused.code == 2, refused.explain()
    for words in ("bytes", "257", "data.rebuild=auto", "python data_tools/build_dataset.py"):
        assert words in refused.stderr
    again = train(tmp_path, small_data, "data.tokenizer=bytes", "data.rebuild=auto", ranks=2)
    assert again.code == 0, again.explain()
    assert "tokenizer" in next(line for line in again.stdout.splitlines() if "building my" in line)
    assert len(IndexedDataset(tmp_path / "my").tokens) > 2 * tokens
    dry = train(tmp_path, small_data, trained, "--dry-run")
    assert (dry.code, "bytes" in dry.stderr) == (2, True), dry.explain()
    dry = train(tmp_path, small_data, trained, "data.rebuild=auto", "--dry-run")
    assert (dry.code, dry.stderr) == (0, ""), dry.explain()
