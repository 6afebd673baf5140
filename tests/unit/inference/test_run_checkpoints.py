"""Which checkpoints of a run that trains are evaluated, and when it is over."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.inference import run_checkpoints
from megalm.inference.run_checkpoints import follow
from megalm.runs.run_lock import RunLock
from tests.inference_models import write_run


def test_each_good_checkpoint_is_met_once_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(step: int, **facts: object) -> Path:
        return write_run(tmp_path, ByteTokenizer(), step=step, **facts)

    told: list[str] = []
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        meanwhile.pop(0)()

    monkeypatch.setattr(run_checkpoints, "time", SimpleNamespace(sleep=nap))
    lock = RunLock(tmp_path)
    meanwhile = [lambda: save(40), lambda: save(40, attempt=2), lock.release]
    (tmp_path / "checkpoints").mkdir()
    first, second, gone = save(10), save(20), save(30)
    (tmp_path / "checkpoints" / "step-00000050").mkdir()  # without a manifest: it is not complete
    marked = save(35)
    manifest = marked / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    lock.take()
    met = []
    for path in follow(tmp_path, told.append):
        met.append(path)
        if path == second:
            shutil.rmtree(gone)  # as retention does it while another one is evaluated
    fourth = tmp_path / "checkpoints" / "step-00000040"
    assert met == [first, second, fourth, fourth], "a later attempt saves the same step again"
    assert len(naps) == 3
    assert [line.partition(":")[0] for line in told] == [marked.name]


def test_a_run_that_is_over_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_checkpoints, "time", SimpleNamespace(sleep=lambda seconds: pytest.fail("waits")))
    saved = write_run(tmp_path, ByteTokenizer(), step=10)
    assert list(follow(tmp_path, lambda line: None)) == [saved]
