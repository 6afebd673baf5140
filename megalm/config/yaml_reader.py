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


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules below and no key twice in a mapping."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is stated twice (first on line {seen[key]})", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


def _resolver(tag: str, pattern: str, first_characters: list[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first_characters)


_resolver("bool", "true|True|TRUE|false|False|FALSE", list("tTfF"))
_resolver("null", "~|null|Null|NULL|", [*"~nN", ""])
_resolver("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789"))
_resolver("float", r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789"))
_resolver("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+."))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    # float() knows every spelling that the resolver lets through, once YAML's dots before inf and nan are gone.
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


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
