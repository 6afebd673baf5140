"""`megalm generate`: continue prompts with checkpoints, or with a model in Hugging Face format."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from pydantic import ValidationError

from megalm.checkpoint.discovery import step_of
from megalm.cli.find_run import checkpoint_at, good_checkpoints_at, verify, warn
from megalm.cli.options import Ema, ModelPlace, Tokenizer
from megalm.communicator import SingleProcessCommunicator
from megalm.config.schema import SampleSection
from megalm.errors import ConfigError, DataError
from megalm.inference.run_checkpoints import nearest
from megalm.utils.did_you_mean import did_you_mean
from megalm.utils.progress import ProgressBar, watched
from megalm.utils.terminal import echo, echo_text

if TYPE_CHECKING:
    from megalm.inference.inference_model import InferenceModel

_HINT = "Type a prompt; Ctrl-C stops a text, Ctrl-D exits. /help lists the settings."
_HELP = """/temperature X         0: always the most likely token
/tokens N              maximum number of new tokens
/top-k N               sample from the N most likely tokens; 0: from all
/top-p X               sample from the fewest tokens with this probability
/min-p X               sample no token less likely than X times the likeliest
/repetition-penalty X  above 1: tokens of the text become less likely
/seed N                seed of the next text; each later text adds 1
/settings              show the settings
//...                  a prompt that starts with /
...\\                   the prompt continues in the next line"""
_FIELDS = {
    "temperature": "temperature",
    "tokens": "max_new_tokens",
    "top-k": "top_k",
    "top-p": "top_p",
    "min-p": "min_p",
    "repetition-penalty": "repetition_penalty",
}
_WORDS = (*_FIELDS, "seed", "settings", "help")
_DEFAULTS = SampleSection()


class PromptLoop:
    """Reads prompts from standard input, a terminal or a pipe, and continues each.

    Args:
        stream: `stream` of generation.py for a model; takes prompt, settings and seed.
        seed: of the first text; each later text adds 1.
    """

    def __init__(self, stream: Callable[..., Iterator[str]], settings: SampleSection, seed: int) -> None:
        self._stream, self._settings, self._seed = stream, settings, seed
        self._terminal = sys.stdin.isatty()

    def run(self) -> None:
        if self._terminal:
            echo(_HINT)
        for line in self._lines():
            if line.startswith("/") and not line.startswith("//"):
                echo(self._command(line[1:].strip()))
            elif line:
                self._continue(line.removeprefix("/") if line.startswith("//") else line)

    def _lines(self) -> Iterator[str]:
        if self._terminal:
            with contextlib.suppress(ImportError):  # a Python without readline
                importlib.import_module("readline")  # line editing and history
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        begun = ""  # the lines of a prompt that continues
        while True:
            try:
                line = input(("... " if begun else "> ") if self._terminal else "")
            except EOFError:
                if self._terminal:
                    echo()
                if begun:
                    yield begun.removesuffix("\n")
                return
            except KeyboardInterrupt:
                begun = ""
                echo("\n(Ctrl-D exits)")
                continue
            if line.endswith("\\"):
                begun += f"{line[:-1]}\n"
            else:
                yield begun + line
                begun = ""

    def _continue(self, prompt: str) -> None:
        seed, self._seed = self._seed, self._seed + 1
        try:
            for piece in self._stream(prompt, self._settings, seed=seed):
                echo_text(piece, end="")
            echo("\n")
        except KeyboardInterrupt:
            echo("\n(stopped)\n")

    def _command(self, words: str) -> str:
        """Run a command, the words after /, and return the answer."""
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
            return f"no /{words}{meant}; /help lists the settings"
        values = {word: getattr(self._settings, field) or 0 for word, field in _FIELDS.items()}
        return ", ".join(f"{word} {value:g}" for word, value in {**values, "seed": self._seed}.items())


def command(
    place: ModelPlace,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt. May be repeated.")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help='A text file is one prompt; each line of a .jsonl file is one, "TEXT" or {"prompt": "TEXT"}. '
            "May be repeated.",
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts line by line, and show each text as it grows.")
    ] = False,
    at: Annotated[
        str,
        typer.Option(metavar="25,50,100", help="Use the good checkpoints nearest to these percentages of the run."),
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = _DEFAULTS.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the most likely token.")
    ] = _DEFAULTS.temperature,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from the k most likely tokens; 0: from all.")
    ] = _DEFAULTS.top_k or 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the fewest tokens with this probability; 1: from all.")
    ] = _DEFAULTS.top_p,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample no token less likely than this times the likeliest one.")
    ] = _DEFAULTS.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.0, help="Above 1: tokens that the text already has become less likely.")
    ] = _DEFAULTS.repetition_penalty,
    samples: Annotated[int, typer.Option(min=1, help="The number of texts for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tokenizer: Tokenizer = "",
    ema: Ema = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON line for each text: prompt, continuation, why it ends.")
    ] = False,
) -> None:
    """Continue prompts with a checkpoint or a Hugging Face model, in fp32, on the GPU if there is one.

    \b
    megalm generate runs/mine --prompt "Once upon" --prompt "The end of"
    megalm generate runs/mine --interactive
    megalm generate runs/mine --prompt-file questions.jsonl --at 25,50,75,100
    megalm generate runs/mine --prompt "Once" --samples 5 --top-p 0.9 --json
    megalm generate downloads/gpt2 --prompt "Once"
    """
    from megalm.engine.deepspeed_patches import limit_openmp_spin

    limit_openmp_spin()  # before torch is imported
    from megalm.inference.generation import CachedModel, stream
    from megalm.train.text_samples import extend, prompt_tokens

    prompts = [*map(_typed, prompt or ()), *(text for file in prompt_file or () for text in _read_prompts(file))]
    if interactive and (prompts or at or json or samples > 1):
        raise ConfigError(
            "--interactive reads its prompts itself; remove --prompt, --prompt-file, --at, --json and --samples"
        )
    if not interactive and not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompt-file FILE or --interactive")
    for option, value in (("--top-p", top_p), ("--repetition-penalty", repetition_penalty)):
        if not value > 0:
            raise ConfigError(f"{option} {value:g}: give a number above 0")
    settings = SampleSection(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    for path in _checkpoints(place, at) if at else [checkpoint_at(place)]:
        model = _load(path, tokenizer, ema)
        cached, length = CachedModel(model), model.shape.max_position_embeddings
        if interactive:
            PromptLoop(partial(stream, cached, model.tokenizer, sequence_length=length), settings, seed).run()
            return
        if at and not json:
            echo(f"=== step {step_of(path):,}: {path}")
        asked = [text for text in prompts for _ in range(samples)]
        begun = prompt_tokens(model.tokenizer, asked)
        texts = [list(tokens) for tokens in begun]
        with ProgressBar("generating tokens", max_new_tokens) as bar:
            for _ in extend(cached, SingleProcessCommunicator(), texts, model.tokenizer, settings, length, seed):
                bar.advance()
        for number, (question, tokens, text) in enumerate(zip(asked, begun, texts, strict=True)):
            whole = model.tokenizer.decode(text)
            if not json:
                echo_text(whole)
                continue
            new = len(text) - len(tokens)
            facts = {
                "checkpoint": str(path),
                "step": model.facts.manifest.step,
                "prompt": question,
                "sample": number % samples,
                "text": whole.removeprefix(model.tokenizer.decode(tokens)),
                "tokens": new,
                "finish": "length" if new == max_new_tokens else "end_of_document",
            }
            echo_text(orjson.dumps(facts).decode())


def _load(path: Path, tokenizer: str, ema: bool) -> InferenceModel:
    """The model of a checkpoint; warns if the checkpoint is marked."""
    from megalm.inference.inference_model import InferenceModel

    model = InferenceModel(path, tokenizer or None, verify=verify, watched=watched("loading"), ema=ema)
    if mark := model.facts.manifest.mark:
        warn(f"{path} is {mark}")
    return model


def _checkpoints(place: Path, at: str) -> list[Path]:
    """The good checkpoints of a run nearest to percentages of its newest one's step, each once."""
    try:
        percentages = [float(part) for part in at.split(",")]
    except ValueError:
        percentages = []
    if not percentages or not all(0 <= part <= 100 for part in percentages):
        raise ConfigError(f"--at {at}: give percentages of the run from 0 to 100, such as 25,50,100")
    by_step = {step_of(path): path for path in good_checkpoints_at(place, "--at")[1]}
    return [by_step[step] for step in nearest(list(by_step), percentages)]


def _typed(prompt: str) -> str:
    """Refuse a prompt from the shell that is not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # the shell gave other bytes
        raise ConfigError(f"--prompt {prompt!a}: is not UTF-8; correct the text or the terminal's encoding") from None
    return prompt


def _read_prompts(file: Path) -> Sequence[str]:
    """The prompts of a file, without its last newline."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read as text ({reason}); give a UTF-8 file") from None
    if file.suffix != ".jsonl":
        return [text.removesuffix("\n")]
    return [_prompt(line, f"{file}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _prompt(line: str, source: str) -> str:
    try:
        content = orjson.loads(line)
    except ValueError as error:
        raise DataError(f"{source} is not JSON ({error}); correct or remove the line") from None
    found = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(found, str):
        raise DataError(f'{source}: give "TEXT" or {{"prompt": "TEXT"}}')
    return found
