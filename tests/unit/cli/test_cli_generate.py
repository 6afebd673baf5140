"""What `megalm generate` and `evaluate` say beside their results; the texts and figures are in tests/unit/inference."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from megalm.checkpoint import manifest
from megalm.checkpoint.checkpoint_reader import CheckpointReader
from megalm.checkpoint.manifest import hashed_blocks, set_status
from megalm.cli.main import main
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from tests.inference_models import write_run
from tests.messages import assert_names

WORDS = ("--prompt", "a", "--max-new-tokens", "2")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20):
        write_run(tmp_path / "run", ByteTokenizer(), step=step)
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    out, error = capsys.readouterr()
    return left.value.code or 0, out, error  # type: ignore[return-value]


def test_what_a_checkpoint_is_marked_as_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints/step-00000020"
    code, text, error = said(capsys, "generate", newest, *WORDS)
    assert (code, error) == (0, "")
    set_status(newest, "bad", "spoilt by a spike")
    code, same, error = said(capsys, "generate", newest, *WORDS)
    assert (code, same) == (0, text)
    (line,) = error.splitlines()
    assert_names(line, newest, "bad", "(spoilt by a spike)")
    code, other, error = said(capsys, "generate", run, *WORDS)
    assert (code, error) == (0, "")
    assert other != text, "of the good one"


def test_a_damaged_checkpoint_that_is_skipped_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = said(capsys, "generate", run / "checkpoints/step-00000010", *WORDS)
    manifest_file = run / "checkpoints/step-00000020/manifest.json"
    manifest_file.write_text(manifest_file.read_text().replace('"step": 20', '"step": 21'))
    code, text, error = said(capsys, "generate", run, *WORDS)
    assert (code, text) == older[:2]
    (line,) = error.splitlines()
    assert_names(line, manifest_file)
    assert "--resume" not in line


def test_every_block_that_is_hashed_is_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "HASH_BLOCK_BYTES", 1000)
    reader = CheckpointReader(run / "checkpoints/step-00000010")
    told: list[int] = []
    assert reader.verify(on_progress=lambda: told.append(1)) == ""
    assert len(told) == hashed_blocks(reader.manifest) > 100


def test_options_about_text_want_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--overlap", 3), ("--text-key", "body")):
        code, _, error = said(capsys, "evaluate", run, *words)
        assert code == 2
        assert_names(error, words[0], "--text")


def test_texts_that_are_skipped_are_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("some text")
    (tmp_path / "texts/b.txt").write_bytes(b"\xe9")
    code, _, error = said(capsys, "evaluate", run, "--text", tmp_path / "texts")
    assert code == 0
    (line,) = error.splitlines()
    assert_names(line, tmp_path / "texts", 1, tmp_path / "texts/b.txt", "UTF-8", "byte 0")


def test_a_prompt_that_is_no_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = said(capsys, "generate", run, "--prompt", b"\xe9t\xe9".decode(errors="surrogateescape"))
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert_names(line, "--prompt", "'\\udce9t\\udce9'", "UTF-8")


def test_a_terminal_without_the_characters(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    with pytest.raises(SystemExit) as left:
        main(["generate", str(run), "--prompt", "ö ❌", "--max-new-tokens", "1"])
    assert not left.value.code
    sys.stdout.flush()
    assert shown.getvalue().startswith(b"\xf6 \\u274c")


def test_figures_that_are_no_numbers_read_alike_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", ByteTokenizer(), spoilt={"final_norm.weight": 3e38, "head.weight": 3e38})
    (tmp_path / "text.txt").write_text("some text")
    code, out, _ = said(capsys, "evaluate", tmp_path / "run", "--text", tmp_path / "text.txt", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["loss"] == "NaN"
    assert shown == json.loads((tmp_path / "run/evaluations.jsonl").read_text())
    code, _, error = said(capsys, "generate", tmp_path / "run", *WORDS)
    assert code == 2
    assert_names(error, "step-00000010")


def test_a_prompt_can_have_several_lines(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\\\ntwo\n/top-p 0.5\n/min-p 2\nleft open\\\n"))
    code, out, _ = said(capsys, "generate", run, "--interactive", "--max-new-tokens", "1")
    assert code == 0
    assert "one\ntwo" in out
    assert "top-p 0.5," in out
    assert_names(out, "/min-p")  # refused, with its range
    assert "left open" in out
