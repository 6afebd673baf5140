"""Strict reading of nested settings into a pydantic model, for the run YAML and for the DeepSpeed JSON alike.

Both are first flattened to dotted keys, so that a message names an unknown key or a bad value in full, with its file.
Validation is strict: a quoted number is text, and true is not 1. So is YAML: a repeated key is an error.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megalm.errors import ConfigError
from megalm.utils.did_you_mean import did_you_mean

Model = TypeVar("Model", bound=BaseModel)

# YAML 1.1, which PyYAML follows, reads `1e-3` as text, `no` as false and `010` as eight; these rules replace its own.
# Tag, pattern, and the characters that it may begin with.
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


_MOST_VALUES = 100_000  # in one file


class _Loader(yaml.SafeLoader):
    """SafeLoader with these scalars, and an error for a repeated key."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            mark, key = key_node.start_mark, repr(self.construct_object(key_node, deep=True))
            if key in lines:
                text = f"{key} occurs twice (first on line {lines[key]})"
                raise yaml.constructor.ConstructorError(None, None, text, mark)
            lines[key] = mark.line + 1
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _Loader would read as a number."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` contains: `1e-3` is a number, `no` and `12:30` are text.

    Args:
        where: the file's name or "command line", for the message.

    Raises:
        ConfigError: a syntax error or a repeated key, with the line; aliases that contain themselves, or that stand for
            more than 100,000 values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}, line {line}: {error.problem or 'not YAML'}; fix this line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    finally:
        loader.dispose()


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values that a node stands for, with each alias in full.

    Args:
        sizes: by the identity of the nodes that are counted; 0 while one is being counted.

    Raises:
        yaml.MarkedYAMLError: the node contains itself, or stands for too many values.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)], size = 0, 1
    children = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
    for child in children:
        size += sum(_check_size(part, sizes) for part in (child if isinstance(child, tuple) else (child,)))
        if size > _MOST_VALUES:
            text = f"aliases stand for more than {_MOST_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size


def to_yaml(value: Any) -> str:
    """Text that `parse_yaml` and other YAML readers read as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}  # of annotated_types
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def members(annotation: Any) -> Iterator[Any]:
    """The member types of a union, optional or annotated type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from members(part)
    else:
        yield annotation


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, or None for a value."""
    for member in members(field.annotation):
        # In Python 3.10 tuple[str] is an instance of type.
        if get_origin(member) is None and isinstance(member, type) and issubclass(member, BaseModel):
            return None if getattr(member, "is_value", False) else member
    return None


@functools.cache  # asked for several times by each command
def leaf_fields(model: type[BaseModel], prefix: str = "") -> Mapping[str, FieldInfo]:
    """Dotted key -> field of every value in the model and its sections."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        section = section_of(field)
        leaves |= leaf_fields(section, f"{prefix}{name}.") if section else {f"{prefix}{name}": field}
    return leaves


def flatten(
    raw: Any, model: type[BaseModel], where: str, unknown: Callable[[str], ConfigError], prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Dotted key -> value of a file's content, where aliases become field names; and one line for each problem.

    A problem is an unknown key, a section that is not a mapping, one setting under two spellings.

    Args:
        where: the file's name or "command line", for messages.
        unknown: returns the error for a key that the model does not have.
    """
    leaves: dict[str, Any] = {}
    problems: list[str] = []
    if raw is None:  # a section whose lines are all commented out
        return leaves, problems
    if not isinstance(raw, Mapping):
        keys, hint = ", ".join(list(model.model_fields)[:3]), getattr(model, "hint", "")  # of the run configuration
        return leaves, [f"{where}: {prefix.rstrip('.') or 'it'} must be a section, with keys such as {keys}{hint}"]
    names = {field.alias: name for name, field in model.model_fields.items() if field.alias}
    for key, value in raw.items():
        name = names.get(key, key)
        path = f"{prefix}{name}"
        if not isinstance(name, str) or name not in model.model_fields:
            problems += unknown(f"{prefix}{key}").problems
        elif key != name and name in raw:
            problems.append(f"{where}: {path} occurs twice, under two spellings; keep one")
        elif section := section_of(model.model_fields[name]):
            below = flatten(value, section, where, unknown, f"{path}.")
            leaves |= below[0]
            problems += below[1]
        else:
            leaves[path] = value
    return leaves, problems


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for path, value in leaves.items():
        *sections, name = path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested


def validate(model: type[Model], leaves: Mapping[str, Any], origin: Callable[[str], str]) -> Model:
    """The model with these values, the rest at its defaults.

    Args:
        origin: dotted key -> the source of its value, for the message.

    Raises:
        ConfigError: every bad value, with its source, key and expected type.
    """
    made, problems = validate_valid_values(model, leaves, origin)
    if problems:
        raise ConfigError(*problems.values())
    return made


def validate_valid_values(
    model: type[Model], leaves: Mapping[str, Any], origin: Callable[[str], str]
) -> tuple[Model, dict[str, str]]:
    """The model with the valid values, and dotted key -> one line for every other; arguments as of `validate`.

    Raises:
        ConfigError: a value without a default is missing.
    """
    fields = leaf_fields(model)
    tidy = {path: _whole(value, fields[path]) for path, value in leaves.items()}
    bad = bad_values(model, tidy)
    problems = {
        path: f"{origin(path)}: {path}={shown(tidy[path])}: expected {bad[path]}" for path in bad if path in tidy
    }
    if missing := [f"{origin(path)}: {path} is missing; add it" for path in bad if path not in tidy]:
        raise ConfigError(*missing)
    good = {path: value for path, value in tidy.items() if path not in bad}
    return model.model_validate_json(json.dumps(nest(good), default=str), strict=True), problems


def bad_values(model: type[BaseModel], leaves: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> the kind of value that it takes, of every value that is bad or missing."""
    fields = leaf_fields(model)
    by_alias = {_aliased(path, field): path for path, field in fields.items() if field.alias}
    bad: dict[str, str] = {}
    for path, value in leaves.items():
        infinite = isinstance(value, float) and not math.isfinite(value)
        # pydantic accepts true for a Literal[1].
        if problem := _unusable(value):
            bad[path] = problem
        elif infinite or (isinstance(value, bool) and not _takes_bool(fields[path])):
            bad[path] = expected(fields[path])
    try:
        good = {path: value for path, value in leaves.items() if path not in bad}
        model.model_validate_json(json.dumps(nest(good), default=str), strict=True)
    except ValidationError as error:
        for item in error.errors():
            parts = [str(part) for part in item["loc"]]
            prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
            paths = [by_alias.get(prefix, prefix) for prefix in prefixes]
            path = next((path for path in paths if path in fields), paths[0])
            if path not in fields:
                bad.setdefault(path, str(item["msg"]))
                continue
            bad.setdefault(path, expected(fields[path]))
            inside = _wrong_part(fields[path].annotation, parts[len(path.split(".")) :], item["type"] == "missing")
            if inside and path in leaves:
                bad[path] += f"; {inside}"
    return bad


def _wrong_part(annotation: Any, parts: Sequence[str], is_missing: bool) -> str:
    """Return which key of a mapping, also of one in a list, is wrong and how; "" where the value has no such part.

    Args:
        parts: keys, and places in lists, from the value to the part.
    """
    if parts and "[" in parts[0]:  # the member of a union, as pydantic names it
        parts = parts[1:]
    for member in members(annotation) if parts else ():
        first, *more = parts
        if get_origin(member) is tuple and first.isdigit():
            inside = _wrong_part(get_args(member)[0], more, is_missing)
            return inside and f"item {int(first) + 1}: {inside}"
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(first)
            if field is None:
                return f"unknown key {first}{did_you_mean(first, member.model_fields)}"
            inside = _wrong_part(field.annotation, more, is_missing)
            return inside or (f"{first} is missing" if is_missing else f"{first} has to be {expected(field)}")
    return ""


def _unusable(value: Any) -> str:
    """Return what to give in place of a value that no file system, number or file of UTF-8 can hold; "" if it can."""
    if isinstance(value, str):
        usable = "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
        return "" if usable else "text in UTF-8 without NUL"
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**64 else "a number of at most 64 bits"
    if isinstance(value, bytes):
        return "text"
    parts = (
        [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return next(filter(None, map(_unusable, parts)), "")


def _aliased(path: str, field: FieldInfo) -> str:
    return f"{path.rpartition('.')[0]}.{field.alias}".lstrip(".")


def expected(field: FieldInfo) -> str:
    """The values that a field takes, in words: "a whole number above 0 or null"."""
    return _expected(field.annotation, tuple(field.metadata))


def shown(value: Any) -> str:
    """A value as a user would write it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *constraints = get_args(annotation)
        return _expected(inner, (*constraints, *metadata))
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(part, metadata) for part in get_args(annotation))
    if origin is Literal:
        options = get_args(annotation)
        return ("one of " if len(options) > 1 else "") + ", ".join(shown(option) for option in options)
    if origin in (tuple, dict):
        return _expected_several(origin, get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _KINDS.get(annotation, str(annotation)) + (_bounds(metadata) if annotation in (int, float) else "")


def _expected_several(origin: Any, arguments: tuple[Any, ...]) -> str:
    if origin is dict:
        return f"a mapping of names to {_expected(arguments[1])}"
    kinds = [_expected(part) for part in arguments if part is not Ellipsis]
    return f"a list of {kinds[0]}" if Ellipsis in arguments else f"a list of {len(kinds)}: {kinds[0]}"


def _bounds(metadata: tuple[Any, ...]) -> str:
    bounds = [bound for item in metadata for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = [f"{_BOUNDS[name]} {getattr(bound, name)}" for bound in bounds for name in _BOUNDS if hasattr(bound, name)]
    return f" {' and '.join(words)}" if words else ""


def _takes_bool(field: FieldInfo) -> bool:
    return bool({bool, Any} & set(members(field.annotation)))


def _whole(value: Any, field: FieldInfo) -> Any:
    """5e8 for an integer field is 500000000, as DeepSpeed reads it too."""
    kinds = set(members(field.annotation))
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    return value
