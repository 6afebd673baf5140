"""Text from files and people is shown on a terminal and in a log, never obeyed; for programs it stays as it is."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.data.tokenizers.tokenizer import ByteTokenizer
from megalm.errors import ConfigError
from megalm.train.console import RunConsole
from megalm.train.lifecycle.shutdown import RankSupervisor
from megalm.utils.terminal import echo_text
from tests.inference_models import write_run

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m \u202egpj.exe"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m \u202egpj.exe"
ACTING = set("\x1b\x07\x9b\u202e")


def generate(run: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["generate", str(run), "--prompt", EVIL, "--max-new-tokens", "1", "--temperature", "0"])
    assert left.value.code in (0, None)


def test_a_generated_text_is_shown_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", ByteTokenizer(), length=200)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate(tmp_path / "run")
    found = capsys.readouterr().out
    assert SHOWN in found
    assert not ACTING & set(found)


def test_a_generated_text_is_as_it_is_for_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", ByteTokenizer(), length=200)
    generate(tmp_path / "run")
    assert capsys.readouterr().out.startswith(EVIL)


def test_an_error_is_shown_wherever_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["checkpoint", "list", EVIL])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert SHOWN in error
    assert not ACTING & set(error)


def test_a_result_for_a_program_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    echo_text(json.dumps({"dataset": EVIL}, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == {"dataset": EVIL}


@pytest.fixture
def console(tmp_path: Path) -> Iterator[RunConsole]:
    log = logging.getLogger("megalm")
    before, propagate = list(log.handlers), log.propagate
    yield RunConsole(True, tmp_path / "log.txt")
    for handler in set(log.handlers) - set(before):
        handler.close()
        log.removeHandler(handler)
    log.propagate = propagate


def test_a_run_shows_samples_and_names_in_its_output_and_log(
    console: RunConsole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.info(f"    {EVIL}")
    logging.getLogger("megalm.data").warning("%s: cannot be read", EVIL)
    out, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert SHOWN in out
    assert log.count(SHOWN) == 2
    assert not ACTING & set(out + log)


def test_the_end_of_a_rank_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise ConfigError(f"{EVIL}: no such file")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with contextlib.suppress(SystemExit):
        RankSupervisor(rank=0).run(refuse)
    error = capsys.readouterr().err
    assert SHOWN in error
    assert not ACTING & set(error)
