"""A sweep as its user writes it, and the runs that it stands for.

A sweep is lists of values for keys of the run configuration, and the arguments of launch/pretrain.py that all its runs
share. The lists come from words (`train.seed=1,2,3`), from a YAML file (keys -> lists), or from both:

    schedule.peak_learning_rate: [3e-4, 1e-3]
    train.seed: [1, 2, 3]
    zip:                                      # these go together: two combinations, not four
      model.hidden_size: [256, 384]
      model.num_attention_heads: [4, 6]

A value that is no list holds for all runs. Keys of the DeepSpeed JSON begin with `deepspeed.`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.deepspeed.json_reader import named_json, parse_deepspeed_json
from megalm.config.loading import parse_override
from megalm.config.schema import RunConfig, RunSection
from megalm.config.validation import parse_yaml, validate_valid_values
from megalm.errors import ConfigError
from megalm.utils.formatting import flatten_mapping

IN_JSON = "deepspeed."  # opens the keys of the DeepSpeed JSON
SEED = "train.seed"
_ZIP = "zip"
_JSON_OPTION = "--deepspeed_config"
_NO_AXES = ("run.", "resume.", "documented.", "tracking.sweep", "preset")  # the sweep sets them, or they are no setting
_WITH_COMMAS = ("data.split",)  # one value has commas
_NO_ARGUMENTS = ("--resume", "--extend-steps", "--extend-strategy", "--skip-steps", "--dry-run")
_MOST_RUNS = 1000
_LONGEST_NAME = 120
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        name: its `run.name`, made of the sweep's name and the values: the same values always give the same run.
        values: swept key -> value as text.
    """

    name: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Sweep:
    """A sweep, checked.

    Attributes:
        root: the folder of the run folders.
        axes: swept key -> its values as text, in the order in which they were given.
        arguments: of launch/pretrain.py, the same for all runs.
        runs: in the order in which they start.
    """

    name: str
    root: Path
    axes: Mapping[str, tuple[str, ...]]
    arguments: tuple[str, ...]
    runs: tuple[SweptRun, ...]

    @property
    def folder(self) -> Path:
        """The folder of the sweep itself."""
        return sweep_folder(self.root, self.name)

    def arguments_of(self, run: SweptRun) -> list[str]:
        """Return the arguments of launch/pretrain.py that start the run, or resume it.

        A run with keys of the DeepSpeed JSON reads `json_of(run)`, which `SweepFolder.write` makes.
        """
        words = list(self.arguments)
        if any(key.startswith(IN_JSON) for key in run.values):
            words = _with_json(words, str(self.json_of(run)))
        settings = [f"{key}={value}" for key, value in run.values.items() if not key.startswith(IN_JSON)]
        return [*words, *settings, f"run.name={run.name}", f"tracking.sweep={self.name}", "--resume", "auto"]

    def json_of(self, run: SweptRun) -> Path:
        """The DeepSpeed JSON of a run with keys of its own in there."""
        return self.folder / f"{run.name}.json"

    def json_content(self, run: SweptRun) -> dict[str, Any] | None:
        """Return what `json_of` is to hold; None for a run that reads the JSON of all."""
        changes = {key.removeprefix(IN_JSON): value for key, value in run.values.items() if key.startswith(IN_JSON)}
        given = _json_option(self.arguments)
        if not changes or given is None:
            return None
        content = dict(parse_deepspeed_json(named_json(given)))
        for key, text in changes.items():
            *sections, name = key.split(".")
            place = content
            for section in sections:
                inner = place.get(section)
                place[section] = dict(inner) if isinstance(inner, Mapping) else {}
                place = place[section]
            place[name] = parse_yaml(text, key)
        return content


def root_of(arguments: Sequence[str]) -> Path:
    """Return the folder of the run folders by the arguments of launch/pretrain.py."""
    stated = [word.partition("=")[2] for word in arguments if word.startswith("run.root=")]
    return Path(stated[-1] if stated else RunSection().root).expanduser()


def sweep_folder(root: Path, name: str) -> Path:
    """The folder of a sweep: its record and its page; the runs are beside all others, under `root`."""
    return root / "sweeps" / name


def read_sweep(words: Sequence[str], arguments: Sequence[str] = (), name: str | None = None) -> Sweep:
    """Return the sweep that a user writes.

    Args:
        words: YAML files, and `key=a,b,c`, which replaces the same key of a file.
        arguments: of launch/pretrain.py, for all runs.
        name: of the sweep; None: the file's, or made of the keys.

    Raises:
        ConfigError: all that is wrong with the keys, the values and the arguments.
    """
    lists: dict[str, list[str]] = {}
    together: list[list[str]] = []  # the keys of each `zip`
    problems: list[str] = []
    stem = None
    for word in words:
        try:
            if "=" in word:
                key, values = _of_word(word)
                lists[key] = values
            else:
                found, groups = _of_file(Path(word).expanduser())
                stem, lists, together = Path(word).stem, {**lists, **found}, [*together, *groups]
        except ConfigError as error:
            problems += error.problems
    problems += [problem for key, values in lists.items() for problem in _problems_of(key, values)]
    fixed = {key: values[0] for key, values in lists.items() if len(values) == 1}
    axes = {key: tuple(values) for key, values in lists.items() if len(values) > 1}
    together = [[key for key in group if key in axes] for group in together]
    problems += _problems_of_groups(together, axes)
    problems += _problems_of_arguments(arguments, lists)
    if not axes and not problems:
        problems.append("a sweep needs a key with two or more values, such as train.seed=1,2,3 or a YAML file of lists")
    name = name or stem or "-".join(_short_names(axes).values())
    if axes and not _NAME.fullmatch(name):
        problems.append(f"--name {name!r} is not a folder name: use letters, digits, '.', '_' and '-'")
    blocks = _blocks(axes, together)
    count = math.prod(map(len, blocks))
    if count > _MOST_RUNS:
        problems.append(f"the sweep has {count:,} runs, more than {_MOST_RUNS:,}; give fewer values")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    words_of_all = [f"{key}={value}" for key, value in fixed.items()]
    return _named(name, axes, blocks, (*arguments, *words_of_all))


def make_sweep(
    name: str,
    root: Path,
    axes: Mapping[str, Sequence[str]],
    arguments: Sequence[str],
    runs: Iterable[Mapping[str, str]],
) -> Sweep:
    """Return a sweep whose runs are known by their values.

    Args:
        runs: swept key -> value, for each run.
    """
    short = _short_names(axes)
    named = {_run_name(name, {short[key]: value for key, value in values.items()}): values for values in runs}
    found = tuple(SweptRun(run, dict(values)) for run, values in named.items())
    return Sweep(name, root, {key: tuple(values) for key, values in axes.items()}, tuple(arguments), found)


def split_values(text: str) -> list[str]:
    """Return the values of `a,b,c`; a comma in quotes or brackets belongs to a value."""
    values, depth, quote, last = [""], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and last in ("", ",", " ", "[", "{", ":"):
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append("")
            last = ","
            continue
        values[-1] += character
        last = character
    return [value.strip() for value in values]


# --- Reading ----------------------------------------------------------------------------------------------------------


def _of_word(word: str) -> tuple[str, list[str]]:
    key, _, text = word.partition("=")
    parts = [text] if key in _WITH_COMMAS else split_values(text)
    if "" in parts:
        raise ConfigError(f"{word}: a value is empty; write {key or 'key'}=a,b,c")
    return _values_of(key, parts)


def _values_of(key: str, texts: Sequence[str]) -> tuple[str, list[str]]:
    """Return the key as the configuration names it, and the values in one spelling: 3e-4 and 0.0003 are one.

    Raises:
        ConfigError: there is no such key, or it is a section.
    """
    if key.startswith(IN_JSON):
        return key, [_text(parse_yaml(text, key)) for text in texts]
    values, names = [], {key}
    for text in texts:
        found = dict(parse_override(f"{key}={text}"))
        if key in RunConfig.model_fields and list(found) != [key]:
            raise ConfigError(f"{key} is a section; sweep one of its keys, such as {next(iter(found), key)}")
        names = set(found)
        values += [_text(value) for value in found.values()]
    return names.pop(), values


def _of_file(path: Path) -> tuple[dict[str, list[str]], list[list[str]]]:
    """Return key -> values of a YAML file, and the groups of keys that go together.

    Raises:
        ConfigError: the file cannot be read, or does not hold keys.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"{path}: cannot be read ({reason}); name a YAML file of keys and lists, or key=a,b,c"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold keys and lists; write lines such as 'train.seed: [1, 2, 3]'")
    groups = content.pop(_ZIP, None) or []
    groups = groups if isinstance(groups, list) else [groups]
    if not all(isinstance(group, dict) for group in groups):
        raise ConfigError(f"{path}: {_ZIP} must hold keys and lists of one length")
    lists: dict[str, list[str]] = {}
    together: list[list[str]] = []
    problems: list[str] = []
    for part in (content, *groups):
        keys = []
        for key, value in flatten_mapping(part).items():
            try:
                name, values = _values_of(
                    key, [_text(item) for item in (value if isinstance(value, list) else [value])]
                )
            except ConfigError as error:
                problems += [f"{path}: {problem}" for problem in error.problems]
                continue
            if name in lists:
                problems.append(f"{path}: {name} occurs twice; keep one")
            lists[name] = values
            keys.append(name)
        if part is not content:
            together.append(keys)
    if problems:
        raise ConfigError(*problems)
    return lists, together


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- Checking ---------------------------------------------------------------------------------------------------------


def _problems_of(key: str, values: Sequence[str]) -> list[str]:
    if key.startswith(_NO_AXES):
        return [f"{key} cannot be swept: the sweep names its runs, and keeps them under one run.root"]
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    problems = [f"{key} has the value {value} twice; keep one" for value in twice]
    if not values:
        problems.append(f"{key} has no values; give it a list")
    if not key.startswith(IN_JSON):
        for value in values:
            problems += validate_valid_values(RunConfig, dict(parse_override(f"{key}={value}")), lambda _: "sweep")[
                1
            ].values()
    return problems


def _problems_of_groups(together: Sequence[Sequence[str]], axes: Mapping[str, Sequence[str]]) -> list[str]:
    problems = []
    for group in together:
        lengths = {key: len(axes[key]) for key in group}
        if len(set(lengths.values())) > 1:
            stated = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            problems.append(f"{_ZIP} needs lists of one length: {stated}")
    return problems


def _problems_of_arguments(arguments: Sequence[str], lists: Mapping[str, object]) -> list[str]:
    problems = [f"{word} is not for a sweep, whose runs resume by themselves; remove it" for word in arguments
                if word.partition("=")[0] in _NO_ARGUMENTS]  # fmt: skip
    stated = [word.partition("=")[0] for word in arguments if "=" in word and not word.startswith("-")]
    problems += [f"{key} is swept and in the arguments of all runs; remove one" for key in stated if key in lists]
    if "run.name" in stated:
        problems.append("run.name is made from the sweep's name and the values; remove it, and use --name")
    given = _json_option(arguments)
    if given is not None and "deepspeed_config" in lists:
        problems.append(f"deepspeed_config is swept, and {_JSON_OPTION} is given for all runs; remove one")
    own = [key for key in lists if key.startswith(IN_JSON)]
    if own and given is None:
        problems.append(f"{', '.join(own)}: name the file that the runs change: {_JSON_OPTION} FILE")
    return problems


def _json_option(arguments: Sequence[str]) -> str | None:
    for index, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option == _JSON_OPTION:
            return value if equals else next(iter(arguments[index + 1 : index + 2]), None)
    return None


def _with_json(arguments: Sequence[str], path: str) -> list[str]:
    words, skip = [], False
    for word in arguments:
        option, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif option == _JSON_OPTION:
            words += [_JSON_OPTION, path]
            skip = not equals
        else:
            words.append(word)
    return words


# --- Expanding --------------------------------------------------------------------------------------------------------


def _blocks(axes: Mapping[str, Sequence[str]], together: Sequence[Sequence[str]]) -> list[list[dict[str, str]]]:
    """Return the choices of each axis, where keys that go together are one axis; in the order of the keys."""
    of_key = {key: group for group in together for key in group}
    blocks, done = [], set()
    for key in axes:
        if key in done:
            continue
        group = of_key.get(key, [key])
        done |= set(group)
        columns = [axes[name] for name in group]
        blocks.append([dict(zip(group, row, strict=True)) for row in zip(*columns, strict=False)])
    return blocks


def _named(
    name: str,
    axes: Mapping[str, tuple[str, ...]],
    blocks: Sequence[Sequence[Mapping[str, str]]],
    arguments: tuple[str, ...],
) -> Sweep:
    # Seeds outermost: the first runs of a sweep then already compare the other values.
    ordered = sorted(blocks, key=lambda block: SEED not in block[0])
    runs = []
    for choice in itertools.product(*ordered):
        values = {key: value for part in choice for key, value in part.items()}
        runs.append({key: values[key] for key in axes})
    return make_sweep(name, root_of(arguments), axes, arguments, runs)


def _short_names(axes: Mapping[str, object]) -> dict[str, str]:
    """Key -> its last part, where no other key has the same one."""
    last = [key.rpartition(".")[2] for key in axes]
    return {key: name if last.count(name) == 1 else key for key, name in zip(axes, last, strict=True)}


def _run_name(sweep: str, values: Mapping[str, str]) -> str:
    name = "-".join([sweep, *(f"{key}_{_plain(value)}" for key, value in values.items())])
    if len(name) <= _LONGEST_NAME and all(_plain(value) == value for value in values.values()):
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{_digest(values)}"  # values may differ in what a name leaves out


def _plain(value: str) -> str:
    """Return a value as a part of a folder's name: of a path, its last part."""
    text = value.rpartition("/")[2] or value
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "none"


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()[:8]
