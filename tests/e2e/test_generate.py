"""`megalm generate` as people use it: prompts, files, checkpoints along the run, and a terminal of its own."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import SmallData
from tests.e2e.jobs import MEGALM, Finished, finish, megalm, pretrain

pytestmark = pytest.mark.e2e

# Runs a command in a terminal of its own: what comes in is typed there, what is shown there goes out. A shell lets its
# background jobs ignore Ctrl-C, tests as well.
IN_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TERM": "dumb"}


@pytest.fixture(scope="module")
def folder(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with four checkpoints."""
    folder = tmp_path_factory.mktemp("generated")
    words = small_data.changed("train.steps=8", "checkpoint.interval_steps=2", "run.name=mine")
    finished = finish(folder, pretrain(*words))
    assert finished.code == 0, finished.explain()
    return folder


def generate(folder: Path, *words: object) -> Finished:
    return finish(folder, megalm("generate", "mine", *words))


def text(folder: Path, *words: object) -> str:
    finished = generate(folder, *words)
    assert finished.code == 0, finished.explain()
    return finished.stdout


class Terminal:
    """What a person sees and types."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.shown = b""
        self._read = 0  # bytes of it

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def press_until(self, key: str, words: str) -> None:
        """Press a key as often as it takes: Python overlooks a Ctrl-C between its prompt and its wait for keys."""
        for _ in range(12):
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.wait_for(words, seconds=10.0)
                return
        self.wait_for(words, seconds=0.0)

    def wait_for(self, words: str, seconds: float = 240.0) -> str:
        """Read on to the end of the next `words`; what was read now."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while (found := self.shown.find(words.encode(), self._read)) < 0:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {words!r} at the end of {self.shown.decode(errors='replace')}"
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            assert piece, f"it ended without {words!r}: {self.shown.decode(errors='replace')}"
            self.shown += piece
        before, self._read = self._read, found + len(words.encode())
        return self.shown[before : self._read].decode(errors="replace")


@contextmanager
def terminal(folder: Path, words: Sequence[str]) -> Iterator[Terminal]:
    command = [sys.executable, "-c", IN_TERMINAL, str(MEGALM), "generate", "mine", *words]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Terminal(process)
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_a_terminal_shows_text_as_it_is_drawn_and_can_stop_it(folder: Path) -> None:
    alone = text(folder, "--prompt", "def read(", "--seed", 7, "--max-new-tokens", 8)
    with terminal(folder, ["--interactive", "--seed", "7", "--max-new-tokens", "8"]) as person:
        person.wait_for("> ")
        person.type("def read(\n")
        shown = person.wait_for("\n> ").replace("\r\n", "\n")
        assert shown == f"def read(\n{alone}\n> "
        person.type("/tokens 1000000\n")
        person.wait_for("tokens 1000000")
        person.wait_for("> ")
        person.type("class A\n")
        person.wait_for("class A")  # as it was typed
        person.wait_for("class A")  # the beginning of the text, which goes on
        for _ in range(2):
            person.wait_for("\n")
        assert b"(stopped)" not in person.shown, "it appears piece by piece"
        person.type("\x03")
        person.wait_for("(stopped)")
        person.wait_for("> ")
        person.type("/tokens 2\n")
        person.wait_for("tokens 2,")
        person.wait_for("> ")
        person.type("x = 1\n")
        person.wait_for("x = 1")
        person.wait_for("\n> ")
        person.press_until("\x03", "Ctrl-D")  # at the prompt
        person.wait_for("> ")
        person.type("\x04")
        assert person.process.wait(timeout=120) == 0
        assert b"Traceback" not in person.shown


def test_a_pipe_is_read_line_by_line(folder: Path) -> None:
    lines = "def read(\n/temperature 0\nclass größer\n/nonsense\n"
    command = [str(MEGALM), "generate", "mine", "--interactive", "--max-new-tokens", "6"]
    process = subprocess.run(
        command, cwd=folder, env={**os.environ, **ENVIRONMENT}, input=lines.encode(), capture_output=True, check=True
    )
    first = text(folder, "--prompt", "def read(", "--max-new-tokens", 6)
    second = text(folder, "--prompt", "class größer", "--max-new-tokens", 6, "--temperature", 0)
    shown = process.stdout.decode()
    assert shown.startswith(f"{first}\n")
    settings, _, rest = shown.removeprefix(f"{first}\n").partition("\n")
    assert {"temperature 0", "tokens 6", "top-k 50", "seed 1"} <= set(settings.split(", "))
    assert rest.startswith(f"{second}\n")
    (answer,) = rest.removeprefix(f"{second}\n").splitlines()
    assert "/nonsense" in answer
    assert "/help" in answer


def test_prompts_of_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("def f(a):\n    return a\n", encoding="utf-8")
    (tmp_path / "two.jsonl").write_text('{"prompt": "x ="}\n\n"größer"\n', encoding="utf-8")
    limits = ("--max-new-tokens", 5, "--temperature", 0)
    files = ("--prompt-file", tmp_path / "one.txt", "--prompt-file", tmp_path / "two.jsonl")
    prompts = ("--prompt", "def f(a):\n    return a", "--prompt", "x =", "--prompt", "größer")
    assert text(folder, *files, *limits) == text(folder, *prompts, *limits)


def test_checkpoints_along_the_run(folder: Path) -> None:
    words = ("--prompt", "def ", "--max-new-tokens", 5)
    found = text(folder, *words, "--at", "25,50,55,100")
    expected = ""
    for step in (2, 4, 8):
        path = f"runs/mine/checkpoints/step-{step:08d}"
        finished = finish(folder, megalm("generate", path, *words))
        expected += f"=== step {step}: {path}\n{finished.stdout}"
    assert found == expected


def test_what_makes_no_sense_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": 1}\n')
    refused: dict[tuple[object, ...], str] = {
        (): "--prompt",
        ("--interactive", "--prompt", "a"): "--interactive",
        ("--prompt", "a", "--at", "25;50"): "25;50",
        ("--prompt", "a", "--at", "120"): "120",
        ("--prompt-file", tmp_path / "absent"): "absent",
        ("--prompt-file", tmp_path / "broken.jsonl"): "broken.jsonl:1",
    }
    for words, message in refused.items():
        finished = generate(folder, *words)
        assert (finished.code, finished.stdout) == (2, ""), finished.explain()
        assert finished.stderr.startswith("megalm: error: "), finished.explain()
        assert message in finished.stderr, finished.explain()
        assert len(finished.stderr.splitlines()) == 1, finished.explain()


def test_neither_deepspeed_nor_the_compiler_is_loaded(folder: Path) -> None:
    """They take longer to load than a short text takes to draw."""
    command = megalm("generate", "mine", "--prompt", "def read(", "--max-new-tokens", 1, using="python")
    finished = finish(folder, command, environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert finished.code == 0, finished.explain()
    loaded = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "megalm.inference.inference_model" in loaded
    assert not {"deepspeed", "mlflow", "torch._dynamo"} & loaded
