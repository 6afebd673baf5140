"""Rules across the run configuration and the DeepSpeed JSON: a function for each subject, one line for each problem.

They run before any process group exists, so that a run that cannot be right never takes a GPU. Rules about one value
are in the schemas. Rules of the data are in data_checks.py, of the model in model_checks.py, of the JSON in
engine_checks.py, and of the parallel degrees in parallel_checks.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from megalm.checkpoint.copies.copy_store import COPY_SCHEMES
from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, named_json, read_deepspeed_json
from megalm.config.deepspeed.unsupported_keys import DEEPSPEED_NAMES
from megalm.config.loading import RUN_LENGTH, LoadedConfig, value_of
from megalm.config.schema import ParallelSection, RunConfig
from megalm.config.validation import leaf_fields
from megalm.errors import ConfigError, MegalmError
from megalm.planning.batch_size import RunBatch, TrainingStages, nearest_multiples, plan_batch
from megalm.planning.data_checks import DATA_FILE_RULES, DATA_RULES, NAME, data_is_configured
from megalm.planning.diagnostics import profiled_steps
from megalm.planning.engine_checks import DEEPSPEED_RULES, CheckContext, Need, Rule, broken_by, unmet
from megalm.planning.lr_schedule import ENDLESS
from megalm.planning.model_checks import MODEL_RULES
from megalm.planning.parallel_checks import PARALLEL_RULES
from megalm.rank_environment import JOB_FIELDS
from megalm.utils.addresses import public_address
from megalm.utils.did_you_mean import likeness
from megalm.utils.process_setup import require_extra
from megalm.utils.remote_files import check_address, is_remote

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def check_run(
    loaded: LoadedConfig, ds: DeepSpeedConfig, world_size: int, device: DeviceFacts, data_needed: bool = True
) -> CheckContext:
    """Return the run with what its JSON implies; refuse it for all rules that it breaks, and all problems of its files.

    Args:
        data_needed: whether to refuse a run without data; a plan needs none.

    Raises:
        ConfigError: the value, its place, and what to use instead, of each problem.
        DataError: a file of the data, where nothing else is wrong.
    """
    loaded = loaded.with_implied(ds.run_settings, ds.path)
    case = CheckContext(loaded, ds, world_size, device)
    problems = [ConfigError(line) for line in (*loaded.problems.values(), *ds.problems)]
    named = {*loaded.problems, *(outcome.key for outcome in ds.outcomes if outcome.action == "refused")}
    _raise_all([*problems, *_broken(case, _rules(case, data_needed), named)])
    return case


def _raise_all(found: Sequence[MegalmError]) -> None:
    if len(found) == 1:
        raise found[0]
    if found:
        lines = (error.problems if isinstance(error, ConfigError) else (str(error),) for error in found)
        raise ConfigError(*chain.from_iterable(lines))


def _rules(case: CheckContext, data_needed: bool) -> list[Rule]:
    """Return the rules but for those of what the run does not have."""
    absent: list[Rule] = [] if data_needed else [data_is_configured]
    if not has_grid(case):
        absent += PARALLEL_RULES
    return [rule for rule in RULES if rule not in absent]


def has_grid(case: CheckContext) -> bool:
    """Return whether ranks have other roles than data parallelism alone, or are to."""
    return case.config.parallel != ParallelSection() or case.zero.secondary_ranks > 0


def _broken(case: CheckContext, rules: Iterable[Rule], named: set[str]) -> Iterator[MegalmError]:
    """Yield what breaks a rule, unless all keys in its message are `named`; adds those keys."""
    for rule in rules:
        here: set[str] = set()
        for error in broken_by(rule, case):
            # A rule about keys that already have a problem follows from it: the rule sees defaults in their place.
            keys = set(re.findall(r"[a-z]\w*(?:\.\w+)*", str(error))) & _KEYS
            if not keys or keys - named:
                yield error
            here |= keys
        named |= here


def with_steps(case: CheckContext, stages: TrainingStages, parameters: int) -> tuple[LoadedConfig, list[str]]:
    """Derive train.steps from train.tokens or train.tokens_per_parameter, and check them; a notice says how.

    The configuration itself changes, so that the run folder's YAML starts the same run.

    Args:
        parameters: of the model.

    Raises:
        ConfigError: the schedule does not fit into these steps.
    """
    loaded, train = case.loaded, case.config.train
    key = next((key for key in RUN_LENGTH[1:] if value_of(case.config, key) is not None), None)
    if key is None:
        return loaded, []
    tokens = train.tokens or math.ceil((train.tokens_per_parameter or 0) * parameters)
    steps = stages.steps_for(tokens)
    source = f"{key}, {loaded.sources[key]}"
    of_parameters = f" = {train.tokens_per_parameter:g} x {parameters:,} parameters" if train.tokens is None else ""
    per_step = " to ".join(f"{stage.tokens:,}" for stage in dict.fromkeys((stages.at(1), stages.at(steps))))
    notice = f"train.steps={steps} ({source}): {tokens:,} tokens{of_parameters} / {per_step} per step"
    changed = train.model_copy(update={"steps": steps, "tokens": None, "tokens_per_parameter": None})
    sources = loaded.sources | dict.fromkeys(RUN_LENGTH, "default") | {"train.steps": source}
    loaded = replace(loaded, config=loaded.config.model_copy(update={"train": changed}), sources=sources)
    _raise_all(list(broken_by(schedule_fits_training, replace(case, loaded=loaded))))
    return loaded, [notice]


# --- the run and its optimizer groups ---------------------------------------------------------------------------------


def run_name(case: CheckContext) -> Iterator[str]:
    name = case.config.run.name
    if name is None:
        return
    for field, variable in JOB_FIELDS.items():
        if field in name:
            yield f"run.name={name}: {field} is of a Slurm job, and {variable} is not set; use megalm submit or sbatch"
            return
    if not NAME.fullmatch(name):
        yield f"run.name={name!r} is not a folder name: use letters, digits, '.', '_' and '-'; run.root is the parent"


def parameter_groups(case: CheckContext) -> Iterator[str]:
    """Refuse patterns that no parameter is left for; a later group takes what no earlier one matches."""
    rules = case.config.train.parameter_groups
    if not rules:
        return
    key, names, keys = "train.parameter_groups", list(case.shape.parameters()), case.group_keys.values()
    for pattern in (rule.match for index, rule in enumerate(rules) if index not in {key.rule for key in keys}):
        why = "matches only parameters of earlier groups; move it before them, or remove it"
        if not any(fnmatchcase(name, pattern) for name in names):
            why = f"matches no parameter; near names are {', '.join(_near_patterns(pattern, names))}"
        yield f"{key}: match={pattern!r} {why}"
    if all(key.frozen for key in keys):
        patterns = ", ".join(repr(rules[index].match) for index in sorted({key.rule for key in keys}))
        yield (
            f"{key}: frozen=true of match={patterns} freezes every parameter; leave some to train, or measure the "
            "model with megalm evaluate"
        )
    for rule in rules:
        given = [name for name in ("learning_rate_scale", "weight_decay") if name in rule.model_fields_set]
        if rule.frozen and given:
            yield (
                f"{key}: match={rule.match!r} is frozen=true and has {' and '.join(given)}, which act on no update; "
                "remove one or the other"
            )


def _near_patterns(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the three likest patterns that match parameters: names, in any block, and beginnings of names."""
    whole = [re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in names]
    beginnings = [f"{name.rsplit('.', level)[0]}.*" for name in whole for level in (1, 2)]
    return sorted(dict.fromkeys([*whole, *beginnings]), key=lambda other: -likeness(pattern, other))[:3]


_NEEDS: tuple[Need, ...] = (
    ("evaluate.ema", "validates an average of the weights", "train.ema_decay", "0.999"),
    ("checkpoint.keep_every_steps", "spares checkpoints that keep_last deletes", "checkpoint.keep_last", "2"),
    ("checkpoint.copy_keep_last", "is of copies", "checkpoint.copy_to", "FOLDER"),
    ("guard.stop_above", "acts from a step on", "guard.after_step", "1000"),
    ("guard.after_step", "acts with a limit", "guard.stop_above", "7"),
    ("slurm.exclude_bad", "leaves the nodes that train.check_nodes finds", "train.check_nodes", "true"),
)


def keys_have_what_they_need(case: CheckContext) -> Iterator[str]:
    yield from unmet(case.config, _NEEDS)


# --- the schedule and the batch ---------------------------------------------------------------------------------------


def one_length_of_training(case: CheckContext) -> Iterator[str]:
    train, sources = case.config.train, case.loaded.sources
    values = (train.steps if sources["train.steps"] != "default" else None, train.tokens, train.tokens_per_parameter)
    given = [f"{key}={value}" for key, value in zip(RUN_LENGTH, values, strict=True) if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} each set the length of the run; keep one"


def schedule_fits_training(case: CheckContext) -> Iterator[str]:
    """Of a person's own warm-up and decay: a preset's give way to other settings, and DeepSpeed's are cut short."""
    schedule, steps = case.config.schedule, case.config.train.steps
    warmup, decay, end = schedule.warmup_steps, schedule.decay_steps, schedule.decay_end_step
    is_standard = schedule.step_convention == "standard"
    if case.knows_steps and warmup >= steps and case.is_given("schedule.warmup_steps") and is_standard:
        yield f"schedule.warmup_steps={warmup} is not below train.steps={steps}; shorten the warm-up"
    if end is not None and case.is_given("schedule.decay_end_step") and end <= warmup and is_standard:
        yield (
            f"schedule.decay_end_step={end} is not above schedule.warmup_steps={warmup}; raise it, or shorten the "
            "warm-up"
        )
    if decay is None or not case.is_given("schedule.decay_steps"):
        return
    if schedule.kind != "wsd":
        yield (
            f"schedule.decay_steps={decay} has no effect with schedule.kind={schedule.kind}; it is for wsd, remove it"
        )
        return
    name = "schedule.decay_end_step"
    if end is None and case.knows_steps:
        end, name = steps, "train.steps"
    if end is not None and warmup + decay > end:
        yield (
            f"schedule.warmup_steps={warmup} and schedule.decay_steps={decay} are more than {name}={end}; shorten one"
        )


def schedule_has_its_rates(case: CheckContext) -> Iterator[str]:
    schedule, sources = case.config.schedule, case.loaded.sources
    if schedule.step_convention == "deepspeed" and schedule.kind not in ("constant", "linear", "cosine"):
        yield (
            f"schedule.step_convention=deepspeed with schedule.kind={schedule.kind}, which DeepSpeed does not have; "
            "use constant, linear or cosine, or remove step_convention"
        )
    peak, named = schedule.peak_learning_rate, "schedule.peak_learning_rate"
    source = sources[named]
    if case.settings.peak_learning_rate is not None:  # takes precedence over a preset's
        (named, peak), source = case.settings.peak_learning_rate, case.ds.path
    for end in ("initial", "final"):
        of_rate, of_ratio = f"schedule.{end}_learning_rate", f"schedule.{end}_ratio"
        rate, ratio = value_of(case.config, of_rate), value_of(case.config, of_ratio)
        if rate is not None and ratio is not None:
            yield (
                f"{of_rate}={rate:g} ({sources[of_rate]}) and {of_ratio}={ratio:g} ({sources[of_ratio]}) set the same "
                "rate; remove one"
            )
        elif rate is not None and rate > peak and not (end == "final" and schedule.kind in ENDLESS):
            yield f"{of_rate}={rate:g} ({sources[of_rate]}) is above {named}={peak:g} ({source}); lower it"
    for key in ("schedule.final_learning_rate", "schedule.final_ratio", "schedule.decay_end_step"):
        value = value_of(case.config, key)
        if value is not None and case.is_given(key) and schedule.kind in ENDLESS:
            yield f"{key}={value:g} has no effect with schedule.kind={schedule.kind}; remove it"


def batch_has_one_source(case: CheckContext) -> Iterator[str]:
    steps = [stage.from_step for stage in case.config.schedule.batch]
    for before, step in pairwise(steps):
        if step <= max(1, before):
            yield f"schedule.batch: from_step={step} is not after step {max(1, before)}; sort the stages"
    batch, own = RunBatch.of(case.loaded, case.ds), "batch.global_sequences"
    total, sequences, configured = case.settings.train_batch_size, batch.sequences, case.config.batch.global_sequences
    if batch.key == "schedule.batch" and case.is_given(own) and configured != sequences:
        yield (
            f"schedule.batch begins with {sequences} sequences, but {own}={configured} ({case.loaded.sources[own]}) "
            "sets the same value; remove one"
        )
    if batch.by_user and None not in (total, sequences) and total != sequences:
        yield (
            f"{batch.key}{' begins with ' if batch.key == 'schedule.batch' else '='}{sequences} ({batch.source}) and "
            f"train_batch_size={total} ({case.ds.path}) set the same value; remove one"
        )


def batch_divides(case: CheckContext) -> Iterator[str]:
    """A step reads whole samples, so that the order of samples is the same whatever they are cut into.

    Raises:
        ConfigError: the batch does not divide over the ranks.
    """
    config, ds = case.config, case.ds
    batch = plan_batch(case.settings, case.topology, ds.path, lambda _: True, RunBatch.of(case.loaded, ds))[0]
    for stage in TrainingStages.of(config, batch.global_batch).stages:
        if stage.sequences % stage.parts:
            yield (
                f"schedule.batch: from step {stage.first_step}, {stage.sequences} sequences of {stage.sequence_length} "
                f"tokens are no whole samples of {config.data.sample_length}; use a batch of "
                f"{nearest_multiples(stage.sequences, stage.parts)}"
            )
            break
    if (named := config.deepspeed_config) is None:
        return
    # A recipe preset is a documented run: with another batch it would be another run under the same name.
    own = read_deepspeed_json(named_json(named)).settings.train_batch_size
    total = case.settings.train_batch_size or batch.global_batch
    if own != total:
        preset = f"preset {case.loaded.preset}" if case.loaded.preset else "this configuration"
        yield (
            f"{ds.path} has train_batch_size={total}, but {preset} belongs to {named} with train_batch_size={own}; "
            "remove --deepspeed_config to use that file, or set deepspeed_config=null for your own run"
        )


# --- checkpoints, guard, wall time, packages --------------------------------------------------------------------------


def checkpoints(case: CheckContext) -> Iterator[str]:
    """Raises ConfigError for an address of copies that cannot be used."""
    checkpoint = case.config.checkpoint
    every, interval, address = checkpoint.keep_every_steps, checkpoint.interval_steps, checkpoint.copy_to
    if every is not None and checkpoint.keep_last is not None and (interval is None or every % interval):
        yield (
            f"checkpoint.keep_every_steps={every} is not a multiple of checkpoint.interval_steps={interval}, so no "
            "checkpoint is saved there; change one of them"
        )
    if case.config.guard.policy == "rollback" and interval is None:
        yield "guard.policy=rollback needs checkpoints before the end; set checkpoint.interval_steps"
    if address is None:
        return
    check_address(address, f"checkpoint.copy_to={public_address(address)}", COPY_SCHEMES)
    if not is_remote(address) and Path(address).resolve() == Path(case.config.run.root).resolve():
        yield f"checkpoint.copy_to={address} is run.root, where the run itself is; name a folder on another disk"


def guard_warms_up_in_its_window(case: CheckContext) -> Iterator[str]:
    guard = case.config.guard
    if guard.warmup_steps > guard.window:
        yield (
            f"guard.warmup_steps={guard.warmup_steps} is more than guard.window={guard.window}, so the guard would "
            "never judge a step; shorten the one or widen the other"
        )


def wall_time_seconds(text: str) -> float:
    """`4h` -> 14400; also `90m`, `1h30m`, `45s`, `2d`.

    Raises:
        ConfigError: anything else, or no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ConfigError(f"train.max_wall_time={text!r} is not a duration; write 30m, 4h, 1h30m or 2d")
    return seconds


def values_can_be_used(case: CheckContext) -> Iterator[str]:
    config, uses = case.config, list[Callable[[], object]]()
    if config.train.max_wall_time is not None:
        uses.append(partial(wall_time_seconds, config.train.max_wall_time))
    if config.profile.steps is not None:
        uses.append(partial(profiled_steps, config.profile.steps))
    packages = [name for name in ("tensorboard", "wandb") if getattr(config.tracking, name)]
    uses += [partial(require_extra, name, f"tracking.{name}=true") for name in packages]
    for use in uses:
        try:
            use()
        except ConfigError as error:
            yield from error.problems


_INTERVALS = (
    *("evaluate.interval_steps", "evaluate.tasks_interval_steps"),
    *("sample.interval_steps", "checkpoint.interval_steps"),
)


def length_notices(config: RunConfig) -> Iterator[str]:
    """Yield a notice of each interval that is longer than the run, and of each stage that begins after its end."""
    steps = config.train.steps
    for key in _INTERVALS:
        interval = value_of(config, key)
        if interval is not None and interval > steps:
            yield f"{key}={interval} is more than train.steps={steps}: once, at the end"
    stages = [("schedule.batch", stage.from_step) for stage in config.schedule.batch]
    stages += [("data.stages", stage.from_step) for stage in config.data.stages if stage.sequence_length]
    for key, first in stages:
        if first > steps:
            yield f"{key}: from_step={first} is after train.steps={steps}: no step is in that stage"


# Every key of both files, as a message names it.
_KEYS = {*leaf_fields(RunConfig), *DEEPSPEED_NAMES}

# Rules that read the disk come last.
RULES: tuple[Rule, ...] = (
    run_name,
    *MODEL_RULES,
    parameter_groups,
    *DATA_RULES,
    keys_have_what_they_need,
    one_length_of_training,
    schedule_fits_training,
    schedule_has_its_rates,
    checkpoints,
    *PARALLEL_RULES,
    batch_has_one_source,
    batch_divides,
    *DEEPSPEED_RULES,
    values_can_be_used,
    guard_warms_up_in_its_window,
    *DATA_FILE_RULES,
)
