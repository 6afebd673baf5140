"""Render conversations with a chat template, a Jinja text as transformers has it, and tell which part is trained.

Only what the assistant says is trained: the `{% generation %}` blocks of the template, if it has them. Otherwise the
conversation is rendered up to each of the assistant's turns, and up to its end; what the turn adds is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalm.data.tokenizers.tokenizer import BYTES, TOKENIZER_CONFIG, token_name
from megalm.errors import DataError
from megalm.utils.atomic_files import read_json

ASSISTANT = "assistant"
TEMPLATE_FILE = "chat_template.jinja"
# Noncharacters, which Unicode keeps free for marks such as these.
BEGIN, END = "\ufdd0", "\ufdd1"


class Conversation(NamedTuple):
    """A rendered text, and the [start, end) characters of it that are trained."""

    text: str
    trained: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the tokens that it can name, such as `eos_token`.

    Time is no variable of it: `strftime_now` is undefined, because the same input gives the same dataset.
    """

    template: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        return ChatTemplate, (self.template, self.special_tokens)  # what is compiled cannot go to another process

    def check(self) -> None:
        """Raises DataError for a template that is not valid Jinja."""
        try:
            assert self._compiled
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            problem = str(error).rstrip(".")
            raise DataError(f"the chat template{where}: {problem}; correct it (--chat-template FILE)") from error

    def render(self, record: str) -> Conversation:
        """Render a JSON object of `messages` and perhaps `tools`.

        Raises:
            DataError: the template refuses the messages, or does not show where the assistant's turns are.
        """
        if BEGIN in record or END in record:
            raise DataError("has a noncharacter of Unicode (U+FDD0 or U+FDD1) in its messages")
        try:
            facts: dict[str, Any] = json.loads(record)
            messages, tools = facts["messages"], facts["tools"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError("is text, not a JSON object with messages") from error
        try:
            whole = self._text(messages, tools)
            if self._has_generation:
                return _without_marks(whole)
            return Conversation(whole, self._turns(messages, tools, whole))
        except DataError:
            raise
        except Exception as error:  # a template can fail as any program can
            raise DataError(f"cannot be rendered with the chat template ({' '.join(str(error).split())})") from error

    def _turns(self, messages: Sequence[dict[str, Any]], tools: Any, whole: str) -> list[tuple[int, int]]:
        trained = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._text(messages[:number], tools, prompt=True)
            through = self._text(messages[: number + 1], tools)
            if not (through.startswith(before) and whole.startswith(through)):
                raise DataError(
                    f"has a turn of the assistant (message {number}) that the chat template renders otherwise when "
                    "others follow, or that does not begin with its generation prompt; write {% generation %} and "
                    "{% endgeneration %} around the assistant's text in the template"
                )
            trained.append((len(before), len(through)))
        return trained

    def _text(self, messages: Sequence[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        return self._compiled.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.special_tokens
        )

    @cached_property
    def _has_generation(self) -> bool:
        return any(
            isinstance(call.call.node, nodes.ExtensionAttribute) and call.call.node.identifier == _Generation.identifier
            for call in _environment().parse(self.template).find_all(nodes.CallBlock)
        )

    @cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.template)


class _Generation(Extension):
    """Marks the text of {% generation %} ... {% endgeneration %}."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers renders chat templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _without_marks(marked: str) -> Conversation:
    parts, trained, length = [], [], 0
    for number, piece in enumerate(marked.split(BEGIN)):
        inside, end, after = piece.partition(END) if number else ("", "", piece)
        if (number and not end) or END in after:
            raise DataError("cannot be rendered: {% generation %} stands in another one, or its text is cut")
        if inside:
            trained.append((length, length + len(inside)))
        parts += [inside, after]
        length += len(inside) + len(after)
    return Conversation("".join(parts), trained)


def load_chat_template(file: str | Path | None, tokenizer: str) -> ChatTemplate:
    """Load a template: of `file`, or the one that the tokenizer's folder holds.

    Args:
        file: Jinja text; or a JSON with it, such as a tokenizer_config.json or the PREFIX.json of a dataset.
        tokenizer: path of the tokenizer, whose tokenizer_config.json names the tokens that templates use.

    Raises:
        DataError: there is no template, or it is no valid one.
    """
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    path = folder / TOKENIZER_CONFIG
    config = read_json(path) if path.is_file() and tokenizer != BYTES else {}
    config = config if isinstance(config, dict) else {}
    source = Path(file) if file is not None else folder / TEMPLATE_FILE
    if file is not None or (tokenizer != BYTES and source.is_file()):
        template = _template_in(source)
    else:
        template = _named(config)
        if not template:
            raise DataError(
                f"{tokenizer}: has no chat template, neither {TEMPLATE_FILE} nor in {TOKENIZER_CONFIG}; give one "
                "(--chat-template FILE)"
            )
    named = {name: token_name(token) for name, token in config.items() if name.endswith("_token")}
    found = ChatTemplate(template, {name: text for name, text in named.items() if text is not None})
    found.check()
    return found


def _template_in(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a Jinja template (--chat-template FILE)")
    if path.suffix != ".json":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text; give a Jinja template (--chat-template FILE)") from error
    else:
        facts = read_json(path)
        facts = facts if isinstance(facts, dict) else {}
        options = facts.get("options")
        recorded = options.get("chat") if isinstance(options, dict) else None
        text = recorded["template"] if isinstance(recorded, dict) else _named(facts)
    if not text.strip():
        raise DataError(f"{path}: has no chat template; give a file with one (--chat-template FILE)")
    return text


def _named(config: dict[str, Any]) -> str:
    """Return the template of a tokenizer_config.json; of several, the one named "default"; "" if there is none."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get("default")
    return found if isinstance(found, str) else ""
