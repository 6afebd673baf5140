"""A run that resumes on other ranks: its global batch stays; degrees and micro-batch that are not given now are fitted.

General over the axes: a degree is any integer of the section `parallel`, and the rules of a run say what is legal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts
from megalm.config.deepspeed.json_schema import DeepSpeedSettings
from megalm.config.loading import LoadedConfig
from megalm.config.schema import ParallelSection, RunConfig
from megalm.errors import ConfigError, MegalmError
from megalm.planning.batch_size import BatchPlan, RunBatch
from megalm.planning.engine_checks import DEEPSPEED_RULES, CheckContext, Rule, broken_by
from megalm.planning.model_checks import MODEL_RULES
from megalm.planning.parallel_checks import PARALLEL_RULES
from megalm.topology import divisors

_GRID_RULES: tuple[Rule, ...] = (*PARALLEL_RULES, *MODEL_RULES, *DEEPSPEED_RULES)


@dataclass(frozen=True)
class EarlierStarts:
    """What a run's folder records of its starts.

    Attributes:
        config: of the last start.
        ranks: of the last start; None: unknown.
        batches: of all starts, the last one first; empty: unknown.
        settings: of the DeepSpeed JSON of the last start, as given; None: unknown.
    """

    config: RunConfig
    ranks: int | None = None
    batches: tuple[BatchPlan, ...] = ()
    settings: DeepSpeedSettings | None = None

    @property
    def global_batch(self) -> int | None:
        return self.batches[0].global_batch if self.batches else None

    @property
    def largest_micro_batch(self) -> int | None:
        return max((batch.micro_batch for batch in self.batches), default=None)


def fit_to_ranks(
    loaded: LoadedConfig, ds: DeepSpeedConfig, ranks: int, device: DeviceFacts, earlier: EarlierStarts
) -> tuple[LoadedConfig, DeepSpeedConfig]:
    """Return both configurations of a resumed run for its ranks of now.

    Of the legal grids it takes the one that divides the model over the most ranks, and of those the one that changes
    the fewest keys of `parallel`. A micro-batch is never larger than before, unless other sizes are given now.

    Raises:
        ConfigError: the ranks, the degrees that are given now and the global batch do not fit together; it names the
            nearest numbers of ranks that do.
    """
    total, grid = _global_batch(loaded, ds, earlier), loaded.config.parallel
    settings = ds.settings.model_copy(update={} if total is None else {"train_batch_size": total})
    kept = replace(ds, settings=settings)
    if ranks != earlier.ranks or grid != earlier.config.parallel:
        search = _Search(loaded, kept, device, total)
        found = search.first(ranks)
        if found is None:
            if near := search.nearest(ranks):
                raise ConfigError(_refusal(search, ranks, near))
            return loaded, kept  # wrong on any number of ranks: the rules say why
        loaded = _with_parallel(loaded, found, f"fitted to {ranks} rank(s)")
    elif earlier.settings is not None and _sizes(ds.settings) != _sizes(earlier.settings):
        return loaded, ds if _give_another_batch(ds.settings, earlier) else kept
    topology = CheckContext(loaded, kept, ranks, device).topology
    return loaded, kept if total is None else _with_micro_batch(kept, [total, *_later(loaded)], topology.data, earlier)


def _global_batch(loaded: LoadedConfig, ds: DeepSpeedConfig, earlier: EarlierStarts) -> int | None:
    """Return the batch that is given now, else that of the last start."""
    batch = RunBatch.of(loaded, ds)
    return ds.settings.train_batch_size or (batch.sequences if batch.by_user else None) or earlier.global_batch


def _sizes(settings: DeepSpeedSettings) -> tuple[object, ...]:
    return (
        settings.train_batch_size,
        settings.train_micro_batch_size_per_gpu,
        settings.gradient_accumulation_steps,
    )


def _give_another_batch(settings: DeepSpeedSettings, earlier: EarlierStarts) -> bool:
    """Return whether sizes without train_batch_size contradict the batch of the last start, on its grid."""
    total, *others = _sizes(settings)
    given = [size for size in others if isinstance(size, int)]
    if total is not None or not given or not earlier.batches:
        return False
    last = earlier.batches[0]
    least = math.prod(given) * last.data_parallel
    return last.global_batch % least != 0 or (len(given) == len(others) and last.global_batch != least)


def _later(loaded: LoadedConfig) -> list[int]:
    return [stage.sequences for stage in loaded.config.schedule.batch]


def _with_micro_batch(
    ds: DeepSpeedConfig, batches: Sequence[int], data_ranks: int, earlier: EarlierStarts
) -> DeepSpeedConfig:
    """Return the JSON with the largest micro-batch that divides the batches and is not above the one so far."""
    micro, most = ds.settings.train_micro_batch_size_per_gpu, earlier.largest_micro_batch
    if not isinstance(micro, int) and ds.settings.gradient_accumulation_steps is None:
        return replace(ds, largest_micro_batch=most)  # the device's memory decides
    limit = micro if isinstance(micro, int) else most
    if limit is None or any(batch % data_ranks for batch in batches):
        return ds
    fitting = max(size for size in divisors(math.gcd(*batches) // data_ranks) if size <= limit)
    sizes = {"train_micro_batch_size_per_gpu": fitting, "gradient_accumulation_steps": None}
    return replace(ds, settings=ds.settings.model_copy(update=sizes))


# --- the grid ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """The legal grids of a run: degrees that divide those of its last start, or that are given now."""

    loaded: LoadedConfig
    ds: DeepSpeedConfig
    device: DeviceFacts
    total: int | None

    def first(self, ranks: int, given: bool = True) -> ParallelSection | None:
        """Return the best legal grid; None: there is none.

        Args:
            given: keep the values that are given now.
        """
        return next((grid for grid in self._grids(given) if self._is_legal(grid, ranks)), None)

    def nearest(self, ranks: int) -> list[int]:
        """Return the nearest numbers of ranks below and above that have a legal grid."""
        numbers = sorted({number for grid in self._grids(True) for number in self._numbers(grid, ranks)})
        below = (it for it in reversed(numbers) if it < ranks and self.first(it) is not None)
        above = (it for it in numbers if it > ranks and self.first(it) is not None)
        return [number for number in (next(below, None), next(above, None)) if number is not None]

    def _numbers(self, grid: ParallelSection, ranks: int) -> Iterator[int]:
        """Yield the numbers of ranks that the grid and the batches allow; without a batch those next to `ranks`."""
        fitted = _with_parallel(self.loaded, grid, "")
        copy = CheckContext(fitted, self.ds, math.prod(_degrees(grid).values()), self.device).topology.copy_ranks
        near = (ranks // copy, ranks // copy + 1)
        copies = near if self.total is None else divisors(math.gcd(self.total, *_later(self.loaded)))
        return (copy * count for count in copies if count)

    def _grids(self, given: bool) -> Iterator[ParallelSection]:
        parallel, standard = self.loaded.config.parallel, ParallelSection()
        fixed = {key for key in self.loaded.explicit_keys if given and key.startswith("parallel.")}
        degrees, choices = _degrees(parallel), []
        for name in ParallelSection.model_fields:
            value = getattr(parallel, name)
            others = divisors(value)[::-1] if name in degrees else [value, getattr(standard, name)]
            choices.append([value] if f"parallel.{name}" in fixed else list(dict.fromkeys(others)))
        grids = (dict(zip(ParallelSection.model_fields, values, strict=True)) for values in product(*choices))

        def preference(grid: dict[str, object]) -> tuple[int, int, int]:
            changed = [name in degrees for name, value in grid.items() if value != getattr(parallel, name)]
            divided = math.prod(int(str(grid[name])) for name in degrees)
            return -divided, sum(changed), len(changed)

        return (parallel.model_copy(update=grid) for grid in sorted(grids, key=preference))

    def _is_legal(self, grid: ParallelSection, ranks: int) -> bool:
        case = CheckContext(_with_parallel(self.loaded, grid, ""), self.ds, ranks, self.device)
        try:
            data_ranks = case.topology.data
            if self.total is not None and any(it % data_ranks for it in (self.total, *_later(self.loaded))):
                return False
        except MegalmError:
            return False
        return not any(any(broken_by(rule, case)) for rule in _GRID_RULES)


def _degrees(parallel: ParallelSection) -> dict[str, int]:
    """Return the parallel degrees by name."""
    return {name: value for name, value in parallel if type(value) is int}


def _with_parallel(loaded: LoadedConfig, grid: ParallelSection, origin: str) -> LoadedConfig:
    """Return the configuration on another grid.

    Args:
        origin: the source of the values that differ.
    """
    changed = [f"parallel.{name}" for name, value in grid if value != getattr(loaded.config.parallel, name)]
    config = loaded.config.model_copy(update={"parallel": grid})
    return replace(loaded, config=config, sources=loaded.sources | dict.fromkeys(changed, origin))


def _refusal(search: _Search, ranks: int, near: Sequence[int]) -> str:
    own = _degrees(search.loaded.config.parallel)
    is_given = any(key.startswith("parallel.") for key in search.loaded.explicit_keys)
    grid = search.first(ranks, given=False) if is_given else None
    batch = "" if search.total is None else f"{search.total} sequences a step"
    what = " and ".join(filter(None, (_words(own, own), batch)))
    legal = "" if grid is None else f", or give {_words(_degrees(grid), own)}, which is legal on {ranks}"
    return f"{ranks} rank(s) do not continue the run with {what}; start {' or '.join(map(str, near))} ranks{legal}"


def _words(degrees: Mapping[str, int], own: Mapping[str, int]) -> str:
    """Return the degrees of the axes that the run has."""
    return " ".join(f"parallel.{name}={value}" for name, value in degrees.items() if own[name] > 1)
