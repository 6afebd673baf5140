"""`megalm generate`: continue prompts with checkpoints."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import orjson
import typer
from pydantic import ValidationError

from megalm.checkpoint.discovery import step_of
from megalm.cli.find_run import checkpoint_at, find_place, verify
from megalm.cli.options import Place, Tokenizer
from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import SampleSection
from megalm.errors import ConfigError, DataError
from megalm.inference.generation import CachedModel, stream
from megalm.inference.inference_model import InferenceModel
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.progress import ProgressBar, watched

if TYPE_CHECKING:
    from megalm.inference.inference_model import InferenceModel
    from megalm.train.text_samples import Predictor


# Prompts line by line, from a terminal or a pipe, each continued as it is drawn.

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

    def __init__(self, model: InferenceModel, settings: SampleSection, seed: int) -> None:
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


_DEFAULTS = SampleSection()


def command(
    place: Place,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="May be repeated.")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help='Its whole text is a prompt; of a .jsonl file each line, "TEXT" or {"prompt": "TEXT"}. '
            "May be repeated.",
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts line by line; text appears as it is drawn.")
    ] = False,
    at: Annotated[
        str,
        typer.Option(
            metavar="25,50,100", help="With the good checkpoints nearest to these percentages of the run, one by one."
        ),
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = _DEFAULTS.max_new_tokens,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest.")] = _DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest; 0: from all.")] = _DEFAULTS.top_k or 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tokenizer: Tokenizer = "",
) -> None:
    """Continue prompts with a checkpoint, in fp32, on the GPU if there is one.

    \b
    megalm generate runs/mine --prompt "Once upon" --prompt "The end of"
    megalm generate runs/mine --interactive
    megalm generate runs/mine --prompt-file questions.jsonl --at 25,50,75,100
    """
    from megalm.engine.deepspeed_patches import limit_openmp_spin

    limit_openmp_spin()
    from megalm.train.text_samples import generate

    prompts = [*map(_typed, prompt or ()), *(text for file in prompt_file or () for text in _read_prompts(file))]
    if interactive and (prompts or at):
        raise ConfigError("--interactive reads its prompts itself; leave out --prompt, --prompt-file and --at")
    if not interactive and not prompts:
        raise ConfigError("nothing to continue: name --prompt TEXT or --prompt-file FILE, or take --interactive")
    settings = SampleSection(
        prompts=tuple(prompts), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k or None
    )
    found = find_place(place) if at else checkpoint_at(place)
    if interactive:
        PromptLoop(_load(found, tokenizer), settings, seed).run()
        return
    for path in _checkpoints(found, at) if at else [found]:
        model = _load(path, tokenizer)
        if at:
            typer.echo(f"=== step {step_of(path):,}: {path}")
        length = model.shape.max_position_embeddings
        with ProgressBar("drawing tokens", max_new_tokens) as counter:
            texts = generate(
                _Counted(CachedModel(model), counter),
                SingleProcessCommunicator(),
                model.tokenizer,
                settings,
                length,
                seed,
            )
        for text in texts:
            typer.echo(text)


@dataclass(frozen=True)
class _Counted:
    """A model whose tokens are counted; a text may end before the last."""

    model: Predictor
    counter: ProgressBar

    def next_token_logits(
        self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        found = self.model.next_token_logits(tokens, positions)
        self.counter.advance()
        return found


def _load(place: Path, tokenizer: str) -> InferenceModel:
    """A checkpoint's model; what it is marked as is told beside its text."""
    from megalm.inference.inference_model import InferenceModel

    model = InferenceModel(place, tokenizer or None, verify=verify, watched=watched("loading"))
    if model.facts.manifest.mark:
        typer.echo(f"megalm: {model.path} is {model.facts.manifest.mark}", err=True)
    return model


def _checkpoints(run: Path, at: str) -> list[Path]:
    """The good checkpoints of a run nearest to percentages of its newest one's step, each once."""
    from megalm.inference.run_checkpoints import good_checkpoints, nearest

    try:
        percentages = [float(part) for part in at.split(",")]
    except ValueError:
        percentages = []
    if not percentages or not all(0 <= part <= 100 for part in percentages):
        raise ConfigError(f"--at {at}: give percentages of the run, 0 to 100, as in 25,50,100")
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"--at takes a run folder; {run} has no folder checkpoints")
    good, others = good_checkpoints(run)
    for reason in others:
        typer.echo(f"megalm: left out {reason}", err=True)
    by_step = {step_of(path): path for path in good}
    return [by_step[step] for step in nearest(list(by_step), percentages)]


def _typed(prompt: str) -> str:
    """A prompt as it came from the shell."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that are no character
        raise ConfigError(f"--prompt {prompt!a}: is not UTF-8; mend the text or the terminal's encoding") from None
    return prompt


def _read_prompts(file: Path) -> Sequence[str]:
    """The prompts of a file; the newline that ends it belongs to none."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot be read as text ({reason}); give a UTF-8 file") from None
    if file.suffix != ".jsonl":
        return [text.removesuffix("\n")]
    return [_prompt(line, f"{file}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _prompt(line: str, source: str) -> str:
    try:
        content = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{source}: is not JSON ({error}); mend or remove the line") from None
    found = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(found, str):
        raise DataError(f'{source}: give "TEXT" or {{"prompt": "TEXT"}}')
    return found
