"""Run folders beside a real MLflow store on SQLite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run_dir(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as training leaves it before its first row, in a run root with an empty store.

    Experiments that a test creates itself have their files in the working directory, which is the run root too.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    folder = tmp_path / "first-001"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model: {hidden_size: 64, style: llama, vocab_size: null}\nrun: {name: null, root: runs}\n"
        "train: {steps: 4}\ntracking: {experiment: trials}\n"
        f"data: {{train: null, tokenizer: {'x' * 7000}}}\n"
    )
    (folder / "deepspeed.json").write_text('{"train_batch_size": 8}')
    (folder / "deepspeed.resolved.json").write_text(json.dumps({"train_batch_size": 8, "bf16": {"enabled": True}}))
    environment: dict[str, object] = {"git_commit": "0123abc", "host": "node1", "packages": {"torch": "2.13.0"}}
    environment |= {"parameters": 145216, "resolved": {"model": {"vocab_size": 600}}, "job": None}
    environment |= {"datasets": [{"prefix": "/data/tiny", "epochs": 2.0, "tokens_per_epoch": 24}]}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "samples" / "step-00000004.txt").write_text("Once upon a time")
    return folder
