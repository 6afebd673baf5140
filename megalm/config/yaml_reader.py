"""YAML without its traps: a key stated twice is an error, `1e-3` is a number, `no` and `12:30` are text.

YAML 1.1, which PyYAML follows, reads `1e-3` as text, `no` as false and `010` as eight. A training
configuration means none of these.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from megalm.errors import ConfigError

# Tag, pattern, and the characters that it may begin with.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above and no key twice in a mapping."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            mark, key = key_node.start_mark, repr(self.construct_object(key_node, deep=True))
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is stated twice (first on line {lines[key]})", mark
                )
            lines[key] = mark.line + 1
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text that _Loader would take for a number."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
# PyYAML's own would read 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` states.

    Args:
        where: the file's name or "command line", for the message.

    Raises:
        ConfigError: a syntax error or a key stated twice, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}, line {line}: {error.problem or 'not YAML'}; mend that line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from None


def to_yaml(value: Any) -> str:
    """Text that `parse_yaml` reads as the same value, and other readers of YAML too."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
