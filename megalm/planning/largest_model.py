"""The largest model that fits some GPUs and finishes in time, with the two files of its run. No torch.

Every candidate is judged by the plan of a whole run, so the files agree with `megalm plan`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress, count, product
from pathlib import Path
from typing import Any, Literal, get_args

from megalm.config.deepspeed.json_reader import (
    DS_CONFIGS_FOLDER,
    DeepSpeedConfig,
    DeviceFacts,
    parse_deepspeed_json,
)
from megalm.config.deepspeed.json_schema import ZeroSection
from megalm.config.deepspeed.translate import translate
from megalm.config.loading import LoadedConfig
from megalm.config.schema import OptimizerStateKind, Recompute, RunConfig
from megalm.config.validation import leaf_fields, nest, to_yaml, validate
from megalm.errors import ConfigError
from megalm.model.model_config import build_model_config
from megalm.planning.engine_checks import no_recomputation
from megalm.planning.memory_fit import USABLE_MEMORY
from megalm.planning.resolve import UNKNOWN_VOCAB_SIZE, expected_vocab_size, known_vocab_size, resolve
from megalm.planning.run_plan import ASSUMED_RATE, Plan, Rate, make_plan
from megalm.utils.atomic_files import write_json
from megalm.utils.formatting import format_duration

Settings = dict[str, Any]

# The search decides these keys.
_DECIDED = (
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.head_dim",
    "model.intermediate_size",
    "model.num_experts",  # its usual proportions are those of models with one MLP a layer
    "train.steps",
    "train.tokens",
    "train.tokens_per_parameter",
    "train.recompute",
    "train.checkpoint_activations_every",
    "batch.global_sequences",
    "schedule.batch",
    "data.stages",
    "parallel.",
    "documented.",
    "deepspeed_config",
)
_SEQUENCE_LENGTH = 2048
_WIDE = 2048  # from here on heads have 128 dimensions, below 64; either way their number is even
_WIDTHS = (*range(256, _WIDE, 128), *range(_WIDE, 16_384 + 1, 256))
# Parameters from which on -> tokens of a batch and peak learning rate: GPT-3's (Brown et al. 2020, table 2.1).
_BY_SIZE = (
    (0.0, 0.5e6, 6e-4),
    (350e6, 0.5e6, 3e-4),
    (760e6, 0.5e6, 2.5e-4),
    (1.3e9, 1e6, 2e-4),
    (2.7e9, 1e6, 1.6e-4),
    (6.7e9, 2e6, 1.2e-4),
    (13e9, 2e6, 1e-4),
    (175e9, 3.2e6, 6e-5),
)
_LEAST_STEPS = 10_000  # of a short run, whose batch is smaller for it
_LONGEST_WARMUP = 2000
_RECOMPUTATION: tuple[Recompute, ...] = ("none", "attention", "mlp", "full")  # the fastest first
_STATES = get_args(OptimizerStateKind)  # the most exact first
_NEIGHBOURS = 6  # larger shapes to try beyond the first that fails: deep and narrow ones need more memory


@dataclass(frozen=True)
class FitRequest:
    """The GPUs, the time, and the user's own settings.

    Attributes:
        given: dotted key -> value; the search decides none of them.
    """

    device: DeviceFacts
    ranks: int
    ranks_per_node: int
    hours: float
    tokens_per_parameter: float = 20.0
    rate: Rate = ASSUMED_RATE
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedRun:
    """The run of the largest model.

    Attributes:
        plan: of both files.
        run: dotted keys of the run configuration.
        deepspeed: the JSON.
        limit: why no larger model is possible.
    """

    plan: Plan
    run: Settings
    deepspeed: Settings
    limit: str

    @property
    def name(self) -> str:
        """The stem of the files: 1.3b-rtx-5090, 6.7b-8x-h100."""
        topology, device = self.plan.resolved.topology, self.plan.resolved.device
        count = f"{topology.world_size}x" if topology.world_size > 1 else ""
        gpu = (device.name or device.kind).lower().replace(" ", "-")
        return f"{short_count(self.plan.parameter_count).lower()}-{count}{gpu}"

    def write(self, stem: Path, made_by: str) -> tuple[Path, Path]:
        """Write STEM.yaml and STEM.json.

        Args:
            made_by: the command, for the first line of the YAML.

        Raises:
            ConfigError: one of the files exists.
        """
        refuse_existing(stem)
        yaml_file, json_file = _files_of(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        yaml_file.write_text(f"# Made by {made_by}\n{to_yaml(nest(self.run))}", encoding="utf-8")
        write_json(json_file, self.deepspeed)
        return yaml_file, json_file


def _files_of(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(f"{stem.name}.yaml"), stem.with_name(f"{stem.name}.json")


def _taken(stem: Path) -> list[Path]:
    return [path for path in _files_of(stem) if path.exists() or path.is_symlink()]


def refuse_existing(stem: Path) -> None:
    """Refuse to overwrite STEM.yaml or STEM.json.

    Raises:
        ConfigError: one of the files exists.
    """
    if taken := _taken(stem):
        raise ConfigError(f"{taken[0]} exists already; name other files with --write")


def free_stem(stem: Path) -> Path:
    """Return the stem, or STEM-2, STEM-3 and so on, of which neither file exists."""
    numbered = (stem.with_name(f"{stem.name}-{number}") for number in count(2))
    return next(it for it in chain([stem], numbered) if not _taken(it))


def short_count(count: float) -> str:
    """Return a number of parameters in three digits: 124M, 1.34B."""
    return f"{count / 1e9:.3g}B" if count >= 0.9995e9 else f"{count / 1e6:.3g}M"


def largest_model(request: FitRequest) -> FittedRun:
    """Return the run of the largest model that fits `USABLE_MEMORY` of the GPUs' memory and ends in time.

    Raises:
        ConfigError: not even the smallest model does, or a setting is invalid or is the search's to decide.
    """
    return _Search(request).largest()


@dataclass(frozen=True)
class _Shape:
    width: int
    depth: int
    parameters: int

    def leaves(self) -> Settings:
        return {
            "model.hidden_size": self.width,
            "model.num_hidden_layers": self.depth,
            "model.num_attention_heads": _heads(self.width),
        }


def _heads(width: int) -> int:
    return width // (128 if width >= _WIDE else 64)


def _depths(width: int) -> range:
    """The usual depths: a layer for each 64 features up to a width of 1,536 and for each 128 from 4,096 on."""
    usual = width / min(128.0, max(64.0, 64 + (width - 1536) / 40))
    return range(max(2, round(0.8 * usual)), round(1.25 * usual) + 1)


class _Search:
    def __init__(self, request: FitRequest) -> None:
        self._request = request
        self._given = dict(request.given)
        taken = [key for key in self._given if key.startswith(_DECIDED)]
        if taken:
            raise ConfigError(f"--fit decides {', '.join(taken)}; leave it out, or plan without --fit")
        self._given.setdefault("data.sequence_length", _SEQUENCE_LENGTH)
        config = _config(self._given)
        vocab_size = known_vocab_size(config.data)
        self._vocab_size = expected_vocab_size(config, vocab_size) or UNKNOWN_VOCAB_SIZE
        if vocab_size is None and config.data.tokenizer is None:
            self._given["model.vocab_size"] = self._vocab_size
        self._base = _config(self._given)
        given_states = self._given.get("train.optimizer_state")
        self._states = _STATES if given_states is None else (given_states,)
        heads_of_keys = self._base.model.num_key_value_heads or 1
        self._shapes = [shape for shape in self._all_shapes() if _heads(shape.width) % heads_of_keys == 0]
        if not self._shapes:
            raise ConfigError(f"model.num_key_value_heads={heads_of_keys} divides the heads of no usual width")

    def largest(self) -> FittedRun:
        """Bisect the shapes by size, then try a few larger ones: the memory does not grow with the size alone."""
        first = bisect_left(self._shapes, True, key=lambda shape: not self._is_possible(shape))
        best, failures = first - 1, 1
        for index in range(first + 1, len(self._shapes)):
            if failures > _NEIGHBOURS:
                break
            failures, best = (0, index) if self._is_possible(self._shapes[index]) else (failures + 1, best)
        if best < 0:
            raise ConfigError(self._impossible(self._shapes[0]))
        found = self._fastest([*self._candidates(self._shapes[best])])
        assert found is not None
        return self._with_micro_batch(found, self._limit(found))

    def _all_shapes(self) -> list[_Shape]:
        shapes = []
        for width in _WIDTHS:
            one, two = (self._count(width, depth) for depth in (1, 2))
            shapes += [_Shape(width, depth, one + (depth - 1) * (two - one)) for depth in _depths(width)]
        return sorted(shapes, key=lambda shape: shape.parameters)

    def _count(self, width: int, depth: int) -> int:
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": _heads(width)}
        model = self._base.model.model_copy(update=sizes)
        return build_model_config(model, self._vocab_size, self._base.data.sample_length).parameter_count()

    def _is_possible(self, shape: _Shape) -> bool:
        """Whether some settings of a shape fit and end in time."""
        candidates = [*self._candidates(shape)]
        if candidates[0].fits or self._is_late(candidates[0]):
            return not self._is_late(candidates[0])
        fits = False
        for it in self._smallest(candidates):
            if it.fits and not self._is_late(it):
                return True
            fits = fits or it.fits
        return fits and self._fastest(candidates) is not None

    def _fastest(self, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """The first that fits and ends in time."""
        return next((it for it in candidates if not self._is_late(it) and it.fits), None)

    def _smallest(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Those that need the least memory: all is computed again, and states are short or offloaded."""
        settings = (it.settings for it in candidates)
        least = (it.recompute == "full" and (it.states == self._states[-1] or it.offloads) for it in settings)
        return [*compress(candidates, least)]

    def _least(self, candidates: Sequence[_Candidate]) -> _Candidate:
        """The candidate that needs the smallest share of the memory."""
        return min(self._smallest(candidates), key=lambda it: it.plan.fit.share)

    def _candidates(self, shape: _Shape) -> Iterator[_Candidate]:
        """The most exact states first; of each the stage with the least traffic, and of that the fastest settings."""
        stages: tuple[Literal[2, 3], ...] = (2, 3) if self._request.ranks > 1 else (2,)
        for states, stage in product(self._states, stages):
            for kind in _RECOMPUTATION:
                if not no_recomputation(kind, self._base, self._request.device, ZeroSection(stage=stage)):
                    yield self._candidate(shape, _Settings(f"zero{stage}.json", states, kind))
        if self._request.device.host_memory_bytes is not None and "fp32" in self._states:
            for stage in (2, 3):  # a large micro-batch moves gradients and weights less often
                yield self._candidate(shape, _Settings(f"zero{stage}_offload.json", "fp32", "full"), "auto")

    def _candidate(self, shape: _Shape, settings: _Settings, micro_batch: int | str = 1) -> _Candidate:
        request, length = self._request, self._base.data.sample_length
        tokens = request.tokens_per_parameter * shape.parameters
        _, batch_tokens, rate = next(row for row in reversed(_BY_SIZE) if row[0] <= shape.parameters)
        per_sequence = length * request.ranks  # a power of two for each rank has micro-batches of many sizes
        usual = round(math.log2(batch_tokens / per_sequence))
        most = math.floor(math.log2(tokens / _LEAST_STEPS / per_sequence))
        batch = 2 ** max(0, min(usual, most)) * request.ranks
        steps = math.ceil(tokens / (batch * length))
        run: Settings = {
            **shape.leaves(),
            "train.steps": steps,
            "train.optimizer_state": settings.states,
            "train.recompute": settings.recompute,
            "schedule.peak_learning_rate": rate,
            "schedule.warmup_steps": min(_LONGEST_WARMUP, steps // 50),
            "evaluate.interval_steps": max(1, steps // 40),
            "checkpoint.interval_steps": max(1, steps // 20),
            "checkpoint.keep_last": 2,
        }
        deepspeed = {
            **parse_deepspeed_json(DS_CONFIGS_FOLDER / settings.base),
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro_batch,
        }
        if not request.device.bf16:
            deepspeed = {key: value for key, value in deepspeed.items() if key != "bf16"}
            deepspeed["fp16"] = parse_deepspeed_json(DS_CONFIGS_FOLDER / "fp16.json")["fp16"]
        return _Candidate(shape, settings, {**run, **self._given}, deepspeed, self)

    def plan(self, run: Settings, deepspeed: Settings) -> Plan:
        request = self._request
        sources = dict.fromkeys(leaf_fields(RunConfig), "default") | dict.fromkeys(run, "--fit")
        loaded = LoadedConfig(_config(run), sources, None, frozenset(run))
        ds = DeepSpeedConfig.of("--fit", translate(deepspeed))
        per_node = min(request.ranks, request.ranks_per_node)
        resolved = resolve(loaded, ds, request.ranks, request.device, self._vocab_size, per_node, data_needed=False)
        return replace(make_plan(resolved, self._vocab_size), rate=request.rate)

    def _is_late(self, candidate: _Candidate) -> bool:
        return candidate.hours > self._request.hours

    def _with_micro_batch(self, best: _Candidate, limit: str) -> FittedRun:
        """The run with the largest micro-batch that fits, as a number."""
        chosen = self._candidate(best.shape, best.settings, "auto").plan.resolved.batch.micro_batch
        final = self._candidate(best.shape, best.settings, chosen)
        final = final if final.fits else best
        return FittedRun(final.plan, final.run, final.deepspeed, limit)

    def _limit(self, best: _Candidate) -> str:
        larger = [shape for shape in self._shapes if shape.parameters > best.shape.parameters]
        if not larger:
            return "it is the largest shape of the search"
        candidates = [*self._candidates(larger[0])]
        size, first, least = short_count(larger[0].parameters), candidates[0], self._least(candidates)
        if self._is_late(first):
            return f"the time: {size} parameters take {format_duration(3600 * first.hours)}"
        if not least.fits:
            return f"the memory: with {size} parameters {least.plan.fit}, and {USABLE_MEMORY:.0%} are safe"
        return f"memory and time: {size} parameters fit with recomputation or offload only, and then they take too long"

    def _impossible(self, smallest: _Shape) -> str:
        """Say what would be possible instead."""
        request, candidates = self._request, [*self._candidates(smallest)]
        size = f"--fit: the smallest model of the search, {short_count(smallest.parameters)} parameters,"
        fastest = next((it for it in candidates if it.fits), None)
        if fastest is None:
            return (
                f"{size} does not fit: by the estimate {self._least(candidates).plan.fit}; use a GPU with more memory"
            )
        days, share = fastest.hours / 24, request.tokens_per_parameter * request.hours / fastest.hours
        return (
            f"{size} takes {format_duration(3600 * fastest.hours)} for {request.tokens_per_parameter:g} tokens per "
            f"parameter, more than {format_duration(3600 * request.hours)}; use --days {_two_digits(days, math.ceil)} "
            f"or --tokens-per-parameter {_two_digits(share, math.floor)}"
        )


def _two_digits(value: float, rounded: Callable[[float], int]) -> str:
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{rounded(value / unit) * unit:.2g}"


@dataclass(frozen=True)
class _Settings:
    """What trades speed or exactness for memory.

    Attributes:
        base: the shipped DeepSpeed JSON.
    """

    base: str
    states: OptimizerStateKind
    recompute: Recompute

    @property
    def offloads(self) -> bool:
        return self.base.endswith("_offload.json")


@dataclass(frozen=True)
class _Candidate:
    """A run of a shape; planned when it is asked for."""

    shape: _Shape
    settings: _Settings
    run: Settings
    deepspeed: Settings
    search: _Search

    @cached_property
    def plan(self) -> Plan:
        return self.search.plan(self.run, self.deepspeed)

    @property
    def fits(self) -> bool:
        return self.plan.fit.level == "fits"

    @property
    def hours(self) -> float:
        assert self.plan.hours is not None  # of a known GPU
        return self.plan.hours


def _config(leaves: Settings) -> RunConfig:
    return validate(RunConfig, leaves, lambda _: "command line")
