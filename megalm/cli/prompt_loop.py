"""Prompts line by line, from a terminal or a pipe, each continued as it is drawn."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator

import typer
from pydantic import ValidationError

from megalm.config.schema import SampleSection
from megalm.config.suggest import did_you_mean
from megalm.offline.cache import CachedModel
from megalm.offline.model import OfflineModel
from megalm.offline.stream import stream

_HINT = "A line is continued; Ctrl-C stops a text, Ctrl-D leaves. /help names the settings."
_HELP = """/temperature X   0: always the likeliest
/tokens N        at most so many new ones
/top-k N         draw from the N likeliest; 0: from all
/seed N          of the next text; each text after it takes the next seed
/settings        what they are now
//...            a prompt that begins with /"""
_FIELDS = {"temperature": "temperature", "tokens": "max_new_tokens", "top-k": "top_k"}
_WORDS = (*_FIELDS, "seed", "settings", "help")


class PromptLoop:
    """Reads prompts from standard input until it ends.

    Args:
        seed: of the first text; each text takes the next one.
    """

    def __init__(self, model: OfflineModel, settings: SampleSection, seed: int) -> None:
        self._cached, self._tokenizer = CachedModel(model), model.tokenizer
        self._length = model.shape.max_position_embeddings
        self._settings, self._seed = settings, seed
        self._terminal = sys.stdin.isatty()

    def run(self) -> None:
        if self._terminal:
            typer.echo(_HINT)
        for line in self._lines():
            if line.startswith("/") and not line.startswith("//"):
                typer.echo(self._command(line[1:].strip()))
            elif line:
                self._continue(line.removeprefix("/") if line.startswith("//") else line)

    def _lines(self) -> Iterator[str]:
        if self._terminal:
            with contextlib.suppress(ImportError):  # a Python that was built without it
                importlib.import_module("readline")  # editing, and earlier lines
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        while True:
            try:
                yield input("> " if self._terminal else "")
            except EOFError:
                if self._terminal:
                    typer.echo()
                return
            except KeyboardInterrupt:
                typer.echo("\n(Ctrl-D leaves)")

    def _continue(self, prompt: str) -> None:
        seed, self._seed = self._seed, self._seed + 1
        try:
            for piece in stream(self._cached, self._tokenizer, prompt, self._settings, self._length, seed):
                sys.stdout.write(piece)
                sys.stdout.flush()
            typer.echo("\n")
        except KeyboardInterrupt:
            typer.echo("\n(stopped)\n")

    def _command(self, words: str) -> str:
        """Do what a line after / says; the answer."""
        name, _, value = words.partition(" ")
        if name == "help":
            return _HELP
        if name == "seed" and value.strip().isdecimal():
            self._seed = int(value)
        elif name in _FIELDS:
            number: str | None = value.strip()
            if name == "top-k" and number == "0":
                number = None
            changed = {**self._settings.model_dump(), _FIELDS[name]: number}
            try:
                self._settings = SampleSection.model_validate(changed)
            except ValidationError as error:
                return f"/{name} {value}: {error.errors()[0]['msg']}"
        elif name != "settings":
            meant = did_you_mean(name, _WORDS) if name not in _WORDS else ": give a whole number"
            return f"no /{words}{meant}; /help names the settings"
        now = self._settings
        return (
            f"temperature {now.temperature:g}, tokens {now.max_new_tokens}, top-k {now.top_k or 0}, seed {self._seed}"
        )
