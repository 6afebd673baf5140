"""Translation of a DeepSpeed JSON to the settings that megalm supports, with one outcome for each key of the file.

Tables decide: json_schema.py has the supported keys, unsupported_keys.py the others, `OLDER` here the older spellings.
Nothing is raised: a refused key is an outcome like any other, so that all of them are reported at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from megalm.config.deepspeed.json_schema import MUON_PARAMS, DeepSpeedSettings
from megalm.config.deepspeed.scheduler import SchedulerTranslation, translate_scheduler
from megalm.config.deepspeed.unsupported_keys import (
    IGNORED,
    REMOVE,
    TYPED_PREFIXES,
    TYPED_SECTIONS,
    UNKNOWN,
    UNSUPPORTED,
    UnsupportedKey,
    has_no_effect,
    unknown_key,
)
from megalm.config.validation import bad_values, leaf_fields, members, nest, section_of, shown

Action = Literal["supported", "not set", "no effect", "translated", "refused"]

AUTO_KEYS = ("train_micro_batch_size_per_gpu", "bf16.enabled", "fp16.enabled")
OPTIMIZER_TYPES = ("adam", "adamw", "muon")
_LEAVES = leaf_fields(DeepSpeedSettings)
_STAGE, _OFFLOAD_OPTIMIZER, _OFFLOAD_PARAM = (
    f"zero_optimization.{name}" for name in ("stage", "offload_optimizer", "offload_param")
)
_NO_EFFECT = "this value has no effect"

# Sections that belong to the run configuration -> their translation to its settings.
SectionTranslator = Callable[[Mapping[str, Any]], SchedulerTranslation]
RUN_SETTINGS: dict[str, SectionTranslator] = {"scheduler": translate_scheduler}


@dataclass(frozen=True)
class Outcome:
    """The fate of one key, or of a whole section.

    Attributes:
        key: dotted, as the file spells it.
        why: the reason; "" without one.
        instead: the advice; "" without one.
        group: outcomes of one group are reported in one line.
    """

    key: str
    value: Any
    action: Action
    why: str = ""
    instead: str = ""
    group: str = ""

    def __str__(self) -> str:
        named = "" if self.key in RUN_SETTINGS and self.why.startswith(self.key) else f"{self.named}: "
        return "; ".join(part for part in (f"{named}{self.why}", self.instead) if part)

    @property
    def is_ignored(self) -> bool:
        """Whether it is an unknown key that DeepSpeed ignores, and that resembles no supported key."""
        return self.why.startswith(UNKNOWN) and self.instead.startswith(IGNORED)

    @property
    def named(self) -> str:
        """The key with its value, or a section with the keys in it."""
        if not isinstance(self.value, Mapping):
            return f"{self.key}={shown(self.value)}"
        return f"{self.key} ({', '.join(_names_in(self.value))})" if self.value else f"{self.key}={{}}"


@dataclass(frozen=True)
class Translation:
    """A DeepSpeed JSON in megalm's terms.

    Attributes:
        settings: the supported values, and DeepSpeed's defaults for missing keys.
        explicit_keys: the supported dotted keys of the file, by the names in DeepSpeedSettings.
        run_settings: dotted key of the run configuration -> the value that the file implies.
        outcomes: one for each key of the file, in its order.
    """

    settings: DeepSpeedSettings
    explicit_keys: frozenset[str]
    run_settings: dict[str, Any] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each refused key, section or group of keys."""
        return tuple(_lines(self.outcomes, "refused"))

    @property
    def notices(self) -> tuple[str, ...]:
        """One line for each key, section or group of keys that is ignored or read as another."""
        return tuple(line for action in get_args(Action)[1:4] for line in _lines(self.outcomes, action))


def translate(raw: Mapping[str, Any]) -> Translation:
    """Translate a parsed DeepSpeed JSON."""
    reading = _Reading()
    reading.section(_with_current_names(raw, reading), DeepSpeedSettings)
    if "schedule.peak_learning_rate" in reading.run_settings:
        for name in ("lr", "muon_lr", "adam_lr"):
            why = "the scheduler sets the rate, as in DeepSpeed"
            reading.outcomes += _drop(reading.leaves, f"optimizer.params.{name}", why)
    bad = reading.check_values()
    for adjust in (*_ADJUSTMENTS, *(() if _STAGE in bad else _STAGE_ADJUSTMENTS)):
        reading.outcomes += adjust(reading.leaves)
    leaves = {path: leaf.value for path, leaf in reading.leaves.items()}
    order = {key: place for place, (key, _) in enumerate(_items(raw))}
    changed = {outcome.key for outcome in reading.outcomes}
    kept = [leaf for leaf in reading.leaves.values() if leaf.spelled in order and leaf.spelled not in changed]
    supported = [Outcome(leaf.spelled, leaf.value, "supported") for leaf in kept]
    outcomes = sorted([*supported, *reading.outcomes], key=lambda outcome: order.get(outcome.key, len(order)))
    settings = DeepSpeedSettings.model_validate(nest(leaves))
    return Translation(settings, frozenset(leaves), reading.run_settings, tuple(outcomes))


@dataclass(frozen=True)
class _Leaf:
    spelled: str
    value: Any


_Leaves = dict[str, _Leaf]


class _Reading:
    """One pass over the file: supported keys go to `leaves`, all others to `outcomes`.

    Attributes:
        spellings: current spelling of a key -> the file's, if it is an older one.
    """

    def __init__(self) -> None:
        self.spellings: dict[str, str] = {}
        self.leaves: _Leaves = {}
        self.outcomes: list[Outcome] = []
        self.run_settings: dict[str, Any] = {}

    def section(self, raw: Mapping[str, Any], model: type[BaseModel], prefix: str = "", spelled: str = "") -> None:
        names = {it.alias: name for name, it in model.model_fields.items() if it.alias}
        for key, value in raw.items():
            name = names.get(key, key)
            self._key(f"{prefix}{name}", self.spellings.get(f"{prefix}{key}", f"{spelled}{key}"), value, model, name)

    def _key(self, path: str, spelled: str, value: Any, model: type[BaseModel], name: str) -> None:
        rule = UNSUPPORTED.get(path)
        if _is_comment(name):
            self.add(Outcome(spelled, value, "no effect", "it is a comment", group="comment"))
        elif path in RUN_SETTINGS:
            self._run_settings(RUN_SETTINGS[path], spelled, value)
        elif path == "optimizer" and self._is_another_optimizer(value):
            kind = value.get("type")
            why = f"optimizer.type={shown(kind)} is not available"
            self.add(Outcome(spelled, value, "refused", why, 'use "AdamW", "Adam" or "Muon" with its own parameters'))
        elif rule is not None:
            self._unsupported(rule, spelled, value)
        elif name not in model.model_fields:
            self._unsupported(unknown_key(path), spelled, value, known=False)
        elif value == "auto" and path not in AUTO_KEYS:
            self.add(Outcome(spelled, value, "not set", '"auto" means that it is not set', group="auto"))
        elif value is None:
            self.add(Outcome(spelled, value, "not set"))
        elif (section := section_of(model.model_fields[name])) is None:
            self._leaf(path, spelled, value)
        elif not isinstance(value, Mapping):
            keys = ", ".join(list(section.model_fields)[:3])
            self.add(Outcome(spelled, value, "refused", "it must be a section", f"with keys such as {keys}"))
        elif not value:
            self.add(Outcome(spelled, value, "no effect", _NO_EFFECT))
        else:
            self.section(value, section, f"{path}.", f"{spelled}.")

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def _leaf(self, path: str, spelled: str, value: Any) -> None:
        if path in self.leaves:
            why = f"{self.leaves[path].spelled}={shown(self.leaves[path].value)} sets the same"
            self.add(Outcome(spelled, value, "refused", why, "keep one"))
        else:
            self.leaves[path] = _Leaf(spelled, value)

    @staticmethod
    def _is_another_optimizer(value: Any) -> bool:
        kind = value.get("type") if isinstance(value, Mapping) else None
        return kind is not None and str(kind).lower() not in OPTIMIZER_TYPES

    def _unsupported(self, rule: UnsupportedKey, spelled: str, value: Any, known: bool = True) -> None:
        if known and has_no_effect(rule, value):
            self.add(Outcome(spelled, value, "no effect", _NO_EFFECT, group="no effect"))
        elif rule.inert:
            self.add(Outcome(spelled, value, "no effect", rule.why, rule.instead and f"see {rule.instead}", rule.group))
        else:
            self.add(Outcome(spelled, value, "refused", rule.why, rule.instead, rule.group))

    def _run_settings(self, translator: SectionTranslator, spelled: str, value: Any) -> None:
        """Read a section that belongs to the run configuration."""
        section = _without_comments(value)
        if not section or section == "auto":
            self.add(Outcome(spelled, value, "no effect", _NO_EFFECT, group="no effect"))
            return
        if not isinstance(section, Mapping):
            self.add(Outcome(spelled, value, "refused", "it must be a section", "with type and params"))
            return
        found = translator(section)
        for problem in found.problems:
            self.add(Outcome(spelled, value, "refused", problem, group=f"{spelled}: {problem}"))
        if not found.problems:
            self.run_settings |= found.settings
            keys = " ".join(f"{key}={shown(it)}" for key, it in found.settings.items())
            why = "; ".join(found.notes) or f"read as {keys}"
            self.add(Outcome(spelled, value, "translated" if keys else "not set", why))

    def check_values(self) -> set[str]:
        """Read text as numbers and switches, as DeepSpeed does; remove values of a wrong type and return their keys."""
        for path, leaf in list(self.leaves.items()):
            value = _as_deepspeed_reads(path, leaf.value)
            if value is not leaf.value:
                self.leaves[path] = _Leaf(leaf.spelled, value)
                if not isinstance(leaf.value, float):
                    why = f"read as {shown(value)}, as in DeepSpeed"
                    self.add(Outcome(leaf.spelled, leaf.value, "translated", why))
        bad = bad_values(DeepSpeedSettings, {path: leaf.value for path, leaf in self.leaves.items()})
        for path, expected in bad.items():
            found = self.leaves.pop(path, None)
            if found is not None:
                self.add(Outcome(found.spelled, found.value, "refused", f"expected {expected}"))
            elif path == "optimizer.type":
                self.add(Outcome(path, None, "refused", "it is missing", 'add "type": "AdamW" to optimizer'))
                self.outcomes += _drop(self.leaves, "optimizer", "optimizer.type is missing", "", "refused")
        return set(bad)


def _is_comment(key: str) -> bool:
    """Whether a key serves as a comment: "_note", "//", "#", "comment"."""
    return key.startswith(("_", "//", "#")) or key.lower() in ("comment", "comments")


def _without_comments(section: Any) -> Any:
    if not isinstance(section, Mapping):
        return section
    return {key: _without_comments(value) for key, value in section.items() if not _is_comment(key)}


# --- older spellings --------------------------------------------------------------------------------------------------


def _cpu(value: Any) -> Any:
    return {"device": "cpu"} if value is True else None


# Older spelling -> the current key of the same section, and the value there. DeepSpeed ignores thread_count.
OLDER: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bfloat16": ("bf16", lambda value: value),
    "aio.thread_count": ("intra_op_parallelism", lambda value: value),
    "zero_optimization.cpu_offload": ("offload_optimizer", _cpu),
    "zero_optimization.cpu_offload_param": ("offload_param", _cpu),
}


def _with_current_names(raw: Mapping[str, Any], reading: _Reading, prefix: str = "") -> dict[str, Any]:
    """The file with the current names of DeepSpeed 0.19.8."""
    result: dict[str, Any] = {}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if path == "zero_optimization" and isinstance(value, bool):
            reading.add(Outcome(path, value, "translated", f"read as stage {int(value)}"))
            result[key] = {"stage": int(value)}
        elif path in OLDER:
            name, translated = OLDER[path][0], OLDER[path][1](value)
            if translated is None:
                reading.add(Outcome(path, value, "no effect", _NO_EFFECT, group="no effect"))
            elif raw.get(name) is not None and raw[name] != translated:
                reading.add(Outcome(path, value, "refused", f"{prefix}{name} sets the same", "keep one"))
            else:
                reading.add(Outcome(path, value, "translated", f"read as {prefix}{name}"))
                reading.spellings[f"{prefix}{name}"] = path
                result[name] = translated
        elif isinstance(value, Mapping) and path in (*TYPED_SECTIONS, "aio"):
            result[key] = _with_current_names(value, reading, f"{path}.")
        else:
            result.setdefault(key, value)
    return result


# --- values -----------------------------------------------------------------------------------------------------------


def _as_deepspeed_reads(path: str, value: Any) -> Any:
    """The value as DeepSpeed's pydantic models read it: text becomes a number or a switch, 0 and 1 a switch."""
    kinds = set(members(_LEAVES[path].annotation))
    if any(0 in get_args(kind) for kind in kinds):
        kinds.add(int)  # the stage
    if path.startswith(TYPED_PREFIXES) and not isinstance(value, bool):
        for kind in (bool, int, float):
            if kind in kinds and (kind is bool or isinstance(value, str)):
                with contextlib.suppress(ValidationError):
                    return TypeAdapter(kind).validate_python(value)
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    return value


# --- values whose effect depends on others ----------------------------------------------------------------------------


def _drop(leaves: _Leaves, prefix: str, why: str, instead: str = "", action: Action = "no effect") -> Iterator[Outcome]:
    for path in [path for path in leaves if path == prefix or path.startswith(f"{prefix}.")]:
        leaf = leaves.pop(path)
        yield Outcome(leaf.spelled, leaf.value, action, why, instead, group=f"{prefix}: {why}")


def _value(leaves: _Leaves, path: str, default: Any = None) -> Any:
    return leaves[path].value if path in leaves else default


def _stage_zero(leaves: _Leaves) -> Iterator[Outcome]:
    """Stage 0 with fp16 or bf16 takes a dummy optimizer step at the start, so that it trains wrongly."""
    low = [name for name in ("fp16", "bf16") if _value(leaves, f"{name}.enabled") in (True, "auto")]
    if _value(leaves, _STAGE, 0) != 0:
        return
    yield from _drop(leaves, _OFFLOAD_OPTIMIZER, "it has no effect in stage 0")
    if low:
        spelled = leaves[_STAGE].spelled if _STAGE in leaves else _STAGE
        leaves[_STAGE] = _Leaf(spelled, 1)
        why = f"DeepSpeed 0.19.8 trains wrongly in stage 0 with {' or '.join(low)}"
        yield Outcome(spelled, 0, "translated", why, "read as stage 1, which has the same result")


def _offload_param(leaves: _Leaves) -> Iterator[Outcome]:
    stage = _value(leaves, _STAGE, 0)
    if stage != 3:
        yield from _drop(leaves, _OFFLOAD_PARAM, f"it has no effect in stage {stage}, only in stage 3")


def _loss_scale(leaves: _Leaves) -> Iterator[Outcome]:
    """0 has no meaning for a dynamic loss scale; DeepSpeed does not use these numbers otherwise."""
    dynamic = _value(leaves, "fp16.enabled", False) is True and not _value(leaves, "fp16.loss_scale", 0)
    for path, why in (
        ("fp16.min_loss_scale", "a dynamic loss scale would fall to 0"),
        ("fp16.hysteresis", "a dynamic loss scale would never fall"),
    ):
        if _value(leaves, path) != 0:
            continue
        if dynamic:
            yield from _drop(leaves, path, why, "use 1 or more", "refused")
        else:
            yield from _drop(leaves, path, "only a dynamic loss scale uses it")


def _adam(leaves: _Leaves) -> Iterator[Outcome]:
    """Two switches without effect: DeepSpeed's CPU Adam has the same result, and AdamW is always AdamW."""
    offload = _value(leaves, f"{_OFFLOAD_OPTIMIZER}.device", "none") != "none"
    if offload and _value(leaves, "optimizer.params.torch_adam") is True:
        yield from _drop(
            leaves,
            "optimizer.params.torch_adam",
            "offload_optimizer uses DeepSpeed's CPU Adam, which has the same result",
        )
    kind = str(_value(leaves, "optimizer.type", "")).lower()
    if kind == "adamw" and _value(leaves, "optimizer.params.adam_w_mode") is False:
        yield from _drop(leaves, "optimizer.params.adam_w_mode", 'DeepSpeed ignores it with type "AdamW"')


def _muon(leaves: _Leaves) -> Iterator[Outcome]:
    """Muon's own keys mean nothing to Adam, and Adam beside Muon is AdamW."""
    params = "optimizer.params"
    if str(_value(leaves, "optimizer.type", "")).lower() != "muon":
        for name in MUON_PARAMS:
            yield from _drop(leaves, f"{params}.{name}", "only Muon has it", 'remove it, or use type "Muon"', "refused")
        return
    if _value(leaves, f"{params}.adam_w_mode") is False:
        why = "beside Muon, Adam subtracts weight decay from the weights"
        yield from _drop(leaves, f"{params}.adam_w_mode", why, "remove it", "refused")
    if f"{params}.muon_lr" in leaves and f"{params}.adam_lr" in leaves:
        yield from _drop(leaves, f"{params}.lr", "muon_lr and adam_lr set both rates")


def _gds(leaves: _Leaves) -> Iterator[Outcome]:
    """DeepSpeed refuses it without a GPU, even if no state is on a disk."""
    if "nvme" not in (_value(leaves, f"{section}.device") for section in (_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAM)):
        yield from _drop(leaves, "aio.use_gds", "only offload to nvme uses it")


def _sub_groups(leaves: _Leaves) -> Iterator[Outcome]:
    path = "zero_optimization.sub_group_size"
    if _value(leaves, path) == 0:
        yield Outcome(leaves[path].spelled, 0, "translated", "each parameter is a sub-group, as in DeepSpeed")


_ADJUSTMENTS: tuple[Callable[[_Leaves], Iterator[Outcome]], ...] = (
    _loss_scale,
    _adam,
    _muon,
    _gds,
    _sub_groups,
)
_STAGE_ADJUSTMENTS: tuple[Callable[[_Leaves], Iterator[Outcome]], ...] = (_stage_zero, _offload_param)


# --- lines ------------------------------------------------------------------------------------------------------------

_MOST_NAMES = 12


def _names_in(section: Mapping[str, Any]) -> list[str]:
    """The dotted keys in a section, shortened to one line."""
    names = [path for path, value in _items(section) if not isinstance(value, Mapping)]
    return names if len(names) <= _MOST_NAMES else [*names[:_MOST_NAMES], f"and {len(names) - _MOST_NAMES} more"]


def _items(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of a section and of the sections in it."""
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")


def _lines(outcomes: tuple[Outcome, ...], action: Action) -> Iterator[str]:
    """One line for each outcome or group of outcomes with a reason."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.action == action and outcome.why:
            groups.setdefault(outcome.group or outcome.key, []).append(outcome)
    for group in groups.values():
        if len(group) == 1:
            yield str(group[0])
            continue
        named = ", ".join(_named_in_group(outcome) for outcome in group)
        yield "; ".join(part for part in (f"{named}: {group[0].why}", _instead_of(group)) if part)


def _named_in_group(outcome: Outcome) -> str:
    return outcome.key if outcome.action != "refused" or isinstance(outcome.value, Mapping) else outcome.named


def _instead_of(group: list[Outcome]) -> str:
    """The advice for a group: once if it is the same for all."""
    instead = {outcome.instead for outcome in group}
    if len(instead) == 1:
        return group[0].instead
    known = [f"{it.instead} for {it.key}" for it in group if it.instead not in ("", REMOVE)]
    return ", ".join([*known, "remove the others"])
