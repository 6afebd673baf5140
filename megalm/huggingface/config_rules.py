"""How keys of `config.json` and fields of `ModelConfig` become each other: the rules that families are made of.

A rule reads the keys that it owns into the fields of a model, and writes them from a model. What megalm's model does
not compute it reports as a problem, with key and value. Rules are read in a family's order: one may use the fields of
those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from megalm.config.schema import ROPE_SCALING_KEYS, RopeScaling
from megalm.model.model_config import ModelConfig

Config = Mapping[str, Any]
Values = dict[str, Any]  # fields of ModelConfig
REQUIRED = ...  # a key that has to be there, because classes or versions of transformers have different defaults


class Rule(Protocol):
    """Some keys of config.json, and the fields that they stand for."""

    @property
    def keys(self) -> frozenset[str]:
        """All keys that it reads."""

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        """Add the fields to `values`, and to `problems` what megalm's model does not compute."""

    def write(self, shape: ModelConfig) -> Values:
        """Key -> value; keys come back as the same fields, or the family has no place for them."""


@dataclass(frozen=True)
class Key:
    """A key that holds a number of the model as it is.

    Attributes:
        fields: one or more of ModelConfig that it sets; default: the key's name.
        default: of the transformers class for a key that is missing or null; a function computes it from the fields.
        nullable: null is a value of its own.
        also: further keys with the same number, which may not contradict it.
        spelling: the key's name in other versions of transformers, which is read in its place and written beside it.
    """

    name: str
    fields: tuple[str, ...] = ()
    default: Any = REQUIRED
    nullable: bool = False
    also: tuple[str, ...] = ()
    spelling: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._written)

    @property
    def _written(self) -> tuple[str, ...]:
        return (self.name, *self.also, *([self.spelling] if self.spelling else []))

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        value = config.get(self.name)
        if self.spelling:
            value = _one({key: config.get(key) for key in (self.name, self.spelling)}, {}, self.name, problems)
        is_missing = value is None and not (self.nullable and self.name in config)
        if is_missing and self.default is REQUIRED:
            problems.append(f"{self.name} is missing")
        elif is_missing:
            value = computed(self.default, values) if callable(self.default) else self.default
        for other in self.also:
            second = config.get(other, value if self.default is REQUIRED else self.default)
            if second != value:
                problems.append(f"{other}={second!r} contradicts {self.name}={value!r}")
        values |= dict.fromkeys(self.fields or (self.name,), value)

    def write(self, shape: ModelConfig) -> Values:
        return dict.fromkeys(self._written, getattr(shape, (self.fields or (self.name,))[0]))


def computed(function: Callable[[Values], Any], values: Values) -> Any:
    """None where a field that it needs is missing or no number, which is reported for that field."""
    try:
        return function(values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def divided_heads(values: Values) -> int:
    return int(values["hidden_size"] // values["num_attention_heads"])


@dataclass(frozen=True)
class Derived:
    """A field that follows from others in the class.

    Attributes:
        key: that some files state all the same; it may not contradict.
    """

    field: str
    value: Callable[[Values], Any]
    key: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        return frozenset([self.key] if self.key else [])

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        values[self.field] = computed(self.value, values)
        given = config.get(self.key) if self.key else None
        if given is not None and given != values[self.field]:
            problems.append(f"{self.key}={given!r} (supported: {values[self.field]!r})")

    def write(self, shape: ModelConfig) -> Values:
        return {}


# Spellings of transformers for the same function.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class ActivationKey:
    """The activation, by a family's key.

    Attributes:
        tanh: the family's spelling of GELU's tanh form.
        also: an older key for it.
    """

    name: str
    default: str
    tanh: str = "gelu_pytorch_tanh"
    also: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        return frozenset([self.name, *([self.also] if self.also else [])])

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        for key in sorted(self.keys, key=lambda key: key != self.name):
            value = config.get(key)
            known = _ACTIVATIONS.get(value) if isinstance(value, str) else None
            if value is not None and (known is None or values.get("hidden_act", known) != known):
                problems.append(f"{key}={value!r}")
            elif known is not None or key == self.name:
                values["hidden_act"] = known or _ACTIVATIONS[self.default]

    def write(self, shape: ModelConfig) -> Values:
        return {self.name: self.tanh if shape.hidden_act == "gelu_pytorch_tanh" else shape.hidden_act}


class QueryScalar:
    """Gemma's scale of scores, the inverse root of a number."""

    keys = frozenset(("query_pre_attn_scalar",))

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        scalar = _given(config, "query_pre_attn_scalar", 256)
        values["attention_scale"] = computed(lambda _: 1 / math.sqrt(scalar), values)
        if values["attention_scale"] is None:
            problems.append(f"query_pre_attn_scalar={scalar!r}")
        elif scalar == values.get("head_dim"):
            values["attention_scale"] = None

    def write(self, shape: ModelConfig) -> Values:
        scalar = shape.head_dim if shape.attention_scale is None else round(shape.attention_scale**-2)
        return {"query_pre_attn_scalar": scalar}


class NoRopeLayers:
    """SmolLM3: a 0 for each layer without rotation, else a 1; or every n-th."""

    keys = frozenset(("no_rope_layers", "no_rope_layer_interval"))

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        count, marks = layer_count(values), config.get("no_rope_layers")
        every = _given(config, "no_rope_layer_interval", 4)
        if marks is not None:
            if not isinstance(marks, list) or len(marks) < count or any(mark not in (0, 1) for mark in marks):
                problems.append(f"no_rope_layers={marks!r}")
                return
            values["no_rope_layers"] = tuple(layer for layer in range(count) if not marks[layer])
        elif isinstance(every, int) and every > 0:
            values["no_rope_layers"] = tuple(range(every - 1, count, every))
        else:
            problems.append(f"no_rope_layer_interval={every!r}")

    def write(self, shape: ModelConfig) -> Values:
        return {"no_rope_layers": [int(shape.rotates(layer)) for layer in range(shape.num_hidden_layers)]}


def _given(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def layer_count(values: Values) -> int:
    count = values.get("num_hidden_layers")
    return count if isinstance(count, int) else 0


class ExpertLayers:
    """Qwen3-MoE: every n-th layer has experts, but for the listed ones."""

    keys = frozenset(("decoder_sparse_step", "mlp_only_layers"))

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        every, dense = _given(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        if not isinstance(every, int) or every < 1:
            problems.append(f"decoder_sparse_step={every!r}")
        elif not isinstance(dense, list):
            problems.append(f"mlp_only_layers={dense!r}")
        else:
            layers = range(every - 1, layer_count(values), every)
            values["moe_layers"] = tuple(layer for layer in layers if layer not in dense)

    def write(self, shape: ModelConfig) -> Values:
        layers = range(shape.num_hidden_layers)
        return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n in layers if n not in shape.moe_layers]}


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class LayerTypes:
    """A window on some layers.

    Attributes:
        missing: the window of a file that has no such key.
        switch: whether `use_sliding_window` turns the windows on.
        period: without `layer_types` every n-th layer is full; 0: those below `max_window_layers`, None: all.
        period_keys: keys of config.json that hold n.
    """

    missing: int | None
    switch: bool = False
    period: int | None = None
    period_keys: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        switched = ("use_sliding_window", "max_window_layers") if self.switch else ()
        return frozenset(("layer_types", "sliding_window", *switched, *self.period_keys))

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        window = config.get("sliding_window", self.missing)
        types, count = config.get("layer_types"), layer_count(values)
        if types is not None and (
            not isinstance(types, list) or len(types) != count or any(kind not in (SLIDING, FULL) for kind in types)
        ):
            problems.append(f"layer_types={types!r}")
            return
        is_on = not self.switch or config.get("use_sliding_window") or False
        if is_on is not True and (is_on or SLIDING in (types or ())):
            problems.append(
                f"use_sliding_window={config.get('use_sliding_window')!r} contradicts layer_types={types!r}"
            )
            return
        pattern = self._pattern(config, values, count)
        is_stated = any(config.get(key) is not None for key in self.period_keys)
        if pattern is None or (is_stated and types is not None and types != pattern):
            stated = [key for key in sorted(self.keys) if key in config and key != "sliding_window"]
            problems.extend(f"{key}={config[key]!r}" for key in stated)
            return
        windowed = [kind == SLIDING for kind in types or pattern] if is_on and window is not None else []
        if is_on and window is None and SLIDING in (types or ()):
            problems.append(f"sliding_window=None contradicts layer_types={types!r}")
        values["sliding_window"] = window if any(windowed) else None
        values["full_attention_layers"] = tuple(
            layer for layer, is_windowed in enumerate(windowed) if any(windowed) and not is_windowed
        )

    def _pattern(self, config: Config, values: Values, count: int) -> list[str] | None:
        """The kinds of layers of a file without `layer_types`; None: they are not known."""
        if self.period is None:
            return [FULL if layer not in values.get("no_rope_layers", ()) else SLIDING for layer in range(count)]
        if self.period == 0:
            first = config.get("max_window_layers", 28)
            return [SLIDING if layer >= first else FULL for layer in range(count)] if isinstance(first, int) else None
        periods = {repr(config[key]): config[key] for key in self.period_keys if config.get(key) is not None}
        every = next(iter(periods.values()), self.period)
        if len(periods) > 1 or not isinstance(every, int) or every < 1:
            return None
        return [SLIDING if (layer + 1) % every else FULL for layer in range(count)]

    def write(self, shape: ModelConfig) -> Values:
        layers = range(shape.num_hidden_layers)
        full = [layer for layer in layers if shape.window(layer) is None]
        has_windows = len(full) < len(layers)
        # Their mask of windows is made even for a model without any.
        window = shape.sliding_window if has_windows or self.switch else shape.max_position_embeddings
        written: Values = {"layer_types": [FULL if layer in full else SLIDING for layer in layers]}
        written["sliding_window"] = window if has_windows or not self.switch else None
        if self.switch:
            written["use_sliding_window"] = has_windows
        if self.switch and full == list(range(len(full))):
            written["max_window_layers"] = len(full)
        every = full[0] + 1 if full else len(layers) + 1
        if self.period_keys and full == list(range(every - 1, len(layers), every)):
            written[self.period_keys[0]] = every  # of versions that do not know layer_types
        return written


_SCALINGS = {"default": ((), ()), **ROPE_SCALING_KEYS}
_SPELLINGS = ("rope_scaling", "rope_parameters")  # of transformers 4, and of 5
_OF_BASE = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base, share of a head, scaling. transformers 4 and 5 spell them differently; both are read.

    Attributes:
        theta: default of the base.
        theta_key: of transformers 4.
        partial: default of the share, and transformers 4's key for it; None: all of a head.
        by_layer_type: scaling and base of layers with a window are their own, else all layers have the same.
        local: default of the base of layers with a window, and transformers 4's key; None: that of the others.
    """

    theta: Any = 10_000.0
    theta_key: str = "rope_theta"
    partial: tuple[float, str] | None = None
    by_layer_type: bool = False
    local: tuple[float, str] | None = None

    @property
    def keys(self) -> frozenset[str]:
        own = [pair[1] for pair in (self.partial, self.local) if pair]
        return frozenset((self.theta_key, *own, *_OF_BASE, *_SPELLINGS))

    def read(self, config: Config, values: Values, problems: list[str]) -> None:
        found = len(problems)
        places = dict(self._places(config, problems))
        if len(problems) > found:
            return
        theta = _one({key: config.get(key) for key in (self.theta_key, "rope_theta")}, places, "rope_theta", problems)
        if theta is None and self.theta is REQUIRED:
            problems.append(f"{self.theta_key} is missing")
        values["rope_theta"] = self.theta if theta is None else theta
        share_keys = ["partial_rotary_factor", *([self.partial[1]] if self.partial else [])]
        share = _one({key: config.get(key) for key in share_keys}, places, "partial_rotary_factor", problems)
        default = self.partial[0] if self.partial else 1.0
        if not self.partial and share not in (None, 1):
            given = [key for key in (*share_keys, *_SPELLINGS) if config.get(key) is not None]
            problems.extend(f"{key}={config[key]!r}" for key in given)
        values["partial_rotary_factor"] = default if share is None else share
        self._read_scaling(config, places, values, problems)
        if self.by_layer_type:
            self._read_local(config, values, problems)
        elif values.get("rope_scaling") and values.get("sliding_window"):
            problems.append(
                f"rope_scaling={values['rope_scaling'].rope_type} with sliding_window={values['sliding_window']!r}: "
                "megalm scales no positions of layers with a window"
            )

    def _places(self, config: Config, problems: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The mappings with settings of layers without a window, by their place in the file."""
        for key in _SPELLINGS:
            value = config.get(key)
            if not value:
                continue
            nested = self.by_layer_type and key == "rope_parameters"
            inner = value.get(FULL) if nested and isinstance(value, Mapping) else value
            if not isinstance(inner or {}, Mapping) or (nested and not {FULL, SLIDING} >= value.keys()):
                problems.append(f"{key}={value!r}")
            elif inner:
                yield f"{key}.{FULL}" if nested else key, inner

    def _read_scaling(
        self, config: Config, places: Mapping[str, Mapping[str, Any]], values: Values, problems: list[str]
    ) -> None:
        found: list[RopeScaling | None] = []
        for place, value in places.items():
            try:
                found.append(_scaling(value))
            except ValueError:
                problems.append(f"{place.partition('.')[0]}={config[place.partition('.')[0]]!r}")
                return
            if "." in place and "truncate" in value and not value["truncate"]:
                problems.append(f"{place}.truncate={value['truncate']!r}, which transformers ignores there")
        if any(scaling != found[0] for scaling in found):
            problems.append(" contradicts ".join(f"{place}={dict(value)!r}" for place, value in places.items()))
        values["rope_scaling"] = found[0] if found else None

    def _read_local(self, config: Config, values: Values, problems: list[str]) -> None:
        nested = config.get("rope_parameters") or {}
        inner = nested.get(SLIDING) or {}
        given = {self.local[1]: config.get(self.local[1])} if self.local else {}
        theta = _one(given, {f"rope_parameters.{SLIDING}": inner}, "rope_theta", problems)
        if inner.get("partial_rotary_factor", 1) != 1 or _is_scaled(inner):
            problems.append(f"rope_parameters={nested!r}")
        if theta is None:
            theta = self.local[0] if self.local else values["rope_theta"]
        values["rope_local_theta"] = None if theta == values["rope_theta"] else theta

    def write(self, shape: ModelConfig) -> Values:
        scaling = _written(shape.rope_scaling)
        written: Values = {self.theta_key: shape.rope_theta}
        own: Values = {"rope_type": "default", "rope_theta": shape.rope_theta, **scaling}
        if self.partial:
            written[self.partial[1]] = own["partial_rotary_factor"] = shape.partial_rotary_factor
        if scaling:
            written["rope_scaling"] = scaling
        if not self.by_layer_type:
            return {**written, "rope_parameters": own}
        local = shape.rope_theta if self.local is None else shape.rope_local_theta or shape.rope_theta
        if self.local:
            written[self.local[1]] = local
        return {**written, "rope_parameters": {FULL: own, SLIDING: {"rope_type": "default", "rope_theta": local}}}


def _one(given: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]], key: str, problems: list[str]) -> Any:
    """The number that keys and places agree on; None: none states it."""
    found = {**given, **{f"{place}.{key}": value.get(key) for place, value in places.items()}}
    found = {place: value for place, value in found.items() if value is not None}
    values: Sequence[Any] = list(found.values())
    if any(value != values[0] for value in values):
        problems.append(" contradicts ".join(f"{place}={value!r}" for place, value in found.items()))
    return values[0] if values else None


def _is_scaled(value: Mapping[str, Any]) -> bool:
    try:
        return _scaling(value) is not None
    except ValueError:
        return True


def _scaling(value: Mapping[str, Any]) -> RopeScaling | None:
    """Raises: ValueError: another scaling than megalm's, or an incomplete one."""
    kind = value.get("rope_type", value.get("type", "default"))
    given = {key: number for key, number in value.items() if key not in (*_OF_BASE, "rope_type", "type")}
    given = {key: number for key, number in given.items() if number is not None}
    if value.get("type", kind) != kind or kind not in _SCALINGS:
        raise ValueError
    needed, further = _SCALINGS[kind]
    if not set(needed) <= given.keys() <= {*needed, *further}:
        raise ValueError
    if kind == "default":
        return None
    try:
        return RopeScaling(rope_type=kind, **given)
    except ValidationError as error:
        raise ValueError from error


def plain_scaling(scaling: RopeScaling | None) -> RopeScaling | None:
    """The scaling without numbers that its kind does not use."""
    return None if scaling is None else _scaling(_written(scaling))


def _written(scaling: RopeScaling | None) -> Values:
    """As both versions of transformers read it, without the base."""
    if scaling is None:
        return {}
    needed, further = _SCALINGS[scaling.rope_type]
    kept = {key: getattr(scaling, key) for key in (*needed, *further)}
    given = {key: value for key, value in kept.items() if value is not None and (key, value) != ("truncate", True)}
    return {"rope_type": scaling.rope_type, **given}
