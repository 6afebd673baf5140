"""The batch script of a job: sbatch's options, the ranks that they give, and the text. It runs slurm/train.sh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalm.errors import ConfigError

_LONG_NAMES = {
    "A": "account",
    "a": "array",
    "b": "begin",
    "c": "cpus-per-task",
    "C": "constraint",
    "d": "dependency",
    "D": "chdir",
    "e": "error",
    "F": "nodefile",
    "G": "gpus",
    "H": "hold",
    "i": "input",
    "J": "job-name",
    "k": "no-kill",
    "L": "licenses",
    "M": "clusters",
    "m": "distribution",
    "N": "nodes",
    "n": "ntasks",
    "O": "overcommit",
    "o": "output",
    "p": "partition",
    "Q": "quiet",
    "q": "qos",
    "s": "oversubscribe",
    "S": "core-spec",
    "t": "time",
    "v": "verbose",
    "W": "wait",
    "w": "nodelist",
    "x": "exclude",
}
# Options that sbatch also reads from the environment; it would put that above the lines of a script.
_FROM_ENVIRONMENT = {
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_ARRAY_INX": "array",
    **{
        f"SBATCH_{name.upper().replace('-', '_')}": name
        for name in (
            *("account", "constraint", "export", "gpus", "gpus-per-node", "gpus-per-task", "gres"),
            *("job-name", "partition", "qos", "reservation"),
        )
    },
}
_OPPOSITES = {"requeue": "no-requeue", "no-requeue": "requeue"}
_KEY = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")
_REFUSED = {
    "wrap": "the script is that of megalm submit",
    "test-only": "--print shows the job and submits nothing",
    "chdir": "submit from the folder that the run belongs to",
}


@dataclass(frozen=True)
class SbatchOptions:
    """Options of sbatch: long name -> value, None for one without."""

    values: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: Sequence[str]) -> SbatchOptions:
        """Read the words of a command line or of the #SBATCH lines of a script.

        Raises:
            ConfigError: a word is no option of sbatch, or one that a script cannot have.
        """
        values: dict[str, str | None] = {}
        problems: list[str] = []
        last = ""  # the option that the next word may be the value of
        for word in words:
            name, value, last = *_option(word), last
            if name is None:
                if not last or _KEY.match(word) or word.endswith(".sh"):
                    problems.append(f"{word}: no option of sbatch; arguments of the run follow --")
                else:
                    values[last] = word
                last = ""
                continue
            if "_" in name:
                problems.append(f"{word}: no option of sbatch; arguments of the run follow --")
            if name in _REFUSED:
                problems.append(f"--{name}: not here: {_REFUSED[name]}")
            values.pop(_OPPOSITES.get(name, ""), None)
            values.pop(name, None)  # the last one counts, at its own place
            values[name] = value
            last = name if value is None else ""
        if problems:
            raise ConfigError(*problems)
        return cls(values)

    @classmethod
    def of_script(cls, text: str) -> SbatchOptions:
        """Read the #SBATCH lines of a script."""
        lines = re.findall(r"^#SBATCH[ \t]+(.*)$", text, re.MULTILINE)
        return cls.parse([word for line in lines for word in shlex.split(line, comments=True)])

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> SbatchOptions:
        return cls({option: environment[name] for name, option in _FROM_ENVIRONMENT.items() if environment.get(name)})

    def updated(self, other: SbatchOptions) -> SbatchOptions:
        """Return these options with those of `other` in their place."""
        kept = {
            name: value
            for name, value in self.values.items()
            if name not in other.values and _OPPOSITES.get(name) not in other.values
        }
        return SbatchOptions({**kept, **other.values})

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    def words(self) -> list[str]:
        return [f"--{name}" if value is None else f"--{name}={value}" for name, value in self.values.items()]


def without_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch where the script has what `SbatchOptions.of_environment` read."""
    return {name: value for name, value in environment.items() if name not in _FROM_ENVIRONMENT}


def _option(word: str) -> tuple[str | None, str | None]:
    """Return the long name and the value of an option's word; no name: the word is no option."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return name, value if equals else None
    if len(word) > 1 and word[0] == "-" and word[1] in _LONG_NAMES:
        return _LONG_NAMES[word[1]], word[2:] or None
    return None, None


# --- What the options give --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allocation:
    """The ranks of a job, as slurm/train.sh starts them.

    Attributes:
        gpus: whether a rank has a GPU.
        gpu_type: as the site names it; None where the options do not.
        tasks: of an array, with their numbers; None: the job is none.
        at_once: how many tasks of an array may run at once.
    """

    nodes: int
    ranks_per_node: int
    gpus: bool
    gpu_type: str | None = None
    tasks: tuple[int, ...] | None = None
    at_once: int | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @classmethod
    def of(cls, options: SbatchOptions) -> Allocation:
        """Work out the ranks of the job.

        Raises:
            ConfigError: an option leaves open how many ranks there will be.
        """
        problems: list[str] = []

        def number(option: str, text: str) -> int:
            if re.fullmatch(r"[1-9]\d*", text):
                return int(text)
            problems.append(f"--{option}={text}: state one number, which says how many ranks there will be")
            return 1

        def of_option(option: str) -> int | None:
            text = options.get(option)
            return None if text is None else number(option, text)

        low, _, high = (options.get("nodes") or "1").partition("-")
        nodes = number("nodes", low if high in ("", low) else f"{low}-{high}")
        per_node, tasks = of_option("ntasks-per-node"), of_option("ntasks")
        gpus_per_node, gpu_type = None, None
        for option, text in _gpus(options):
            *kind, count = text.split(":")
            if len(kind) > 1 or "," in text:
                problems.append(f"--{option}={text}: one kind of GPU in a job")
            gpus_per_node, gpu_type = 0 if count == "0" else number(option, count), kind[0] if kind else None
            if option == "gpus":
                if gpus_per_node % nodes:
                    problems.append(f"--gpus={text}: unequal shares of {nodes} nodes; use --gpus-per-node")
                gpus_per_node //= nodes
            elif option == "gpus-per-task":
                gpus_per_node *= per_node or (tasks or nodes) // nodes
        if options.get("gpus-per-socket"):
            problems.append("--gpus-per-socket does not say how many ranks a node gets; use --gpus-per-node")
        if not gpus_per_node and per_node is None and nodes > 1 and tasks not in (None, nodes):
            problems.append(f"--ntasks={tasks} does not say how many ranks each node gets; use --ntasks-per-node")
        array, at_once = _array(options.get("array"), problems)
        if problems:
            raise ConfigError(*problems)
        ranks_per_node = gpus_per_node or per_node or (tasks or nodes) // nodes
        return cls(nodes, ranks_per_node, bool(gpus_per_node), gpu_type, array, at_once)


def _gpus(options: SbatchOptions) -> Iterator[tuple[str, str]]:
    """Options that ask for GPUs with `TYPE:NUMBER` or `NUMBER`; the last one counts."""
    for name in ("gpus", "gpus-per-task", "gpus-per-node"):
        if text := options.get(name):
            yield name, text
    for entry in (options.get("gres") or "").split(","):
        kind, _, text = entry.partition(":")
        if kind.removeprefix("gres/") == "gpu":
            yield "gres", text.partition("(")[0] if text else "1"


def _array(text: str | None, problems: list[str]) -> tuple[tuple[int, ...] | None, int | None]:
    """`0-3,8%2` -> (0, 1, 2, 3, 8), 2."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([\d,:-]+)(?:%(\d+))?", text)
    tasks: list[int] = []
    for part in match[1].split(",") if match else ():
        span = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if span:
            tasks += range(int(span[1]), int(span[2] or span[1]) + 1, int(span[3] or 1) or 1)
    if match is None or not tasks:
        problems.append(f"--array={text}: write it as 0-7 or 1,3,5, with %2 for two tasks at once")
        return None, None
    return tuple(tasks), int(match[2]) if match[2] else None


# --- The script -------------------------------------------------------------------------------------------------------


def render(
    options: SbatchOptions,
    home: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str] | None = None,
    by_task: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """Return the batch script of a run, or of an array of runs.

    Args:
        home: the checkout whose slurm/train.sh it runs.
        arguments: of launch/pretrain.py.
        variables: more of the environment.
        by_task: further arguments of each task of an array.
    """
    lines = ["#!/usr/bin/env bash", "# Written by megalm submit; slurm/train.sh of the checkout starts the ranks."]
    lines += [f"#SBATCH {_directive(word)}" for word in options.words()]
    lines += ["", f"export MEGALM_HOME={shlex.quote(str(home))}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    rest = ""
    if by_task is not None:
        tasks = (f"    {task}) set -- {shlex.join(words)} ;;" for task, words in by_task.items())
        lines += ["", "case $SLURM_ARRAY_TASK_ID in", *tasks, "esac"]
        rest = ' "$@"'
    run = f" {shlex.join(arguments)}" if arguments else ""
    return "\n".join([*lines, f'exec bash "$MEGALM_HOME/slurm/train.sh"{run}{rest}', ""])


def _directive(word: str) -> str:
    """Quote the value of a #SBATCH line where sbatch would change it; to it a backslash escapes within all quotes."""
    name, equals, value = word.partition("=")
    if not re.search(r"[\s'\"\\#]", value):
        return word
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'
