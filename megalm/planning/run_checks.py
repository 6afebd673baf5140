"""Rules across the run configuration and the DeepSpeed JSON: one function and one message each.

They run before any process group exists, so that a run that cannot be right never takes a GPU. Rules about one value
are in the schemas. Rules of the data are in data_checks.py, of the model in model_checks.py, of the JSON in
engine_checks.py, and of the parallel degrees in parallel_checks.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from megalm.checkpoint.copies.copy_store import COPY_SCHEMES
from megalm.config.deepspeed.json_reader import DeepSpeedConfig, DeviceFacts, named_json, read_deepspeed_json
from megalm.config.deepspeed.unsupported_keys import DEEPSPEED_NAMES
from megalm.config.loading import RUN_LENGTH, LoadedConfig, value_of
from megalm.config.schema import ParallelSection, RunConfig
from megalm.config.validation import leaf_fields
from megalm.errors import ConfigError, MegalmError
from megalm.planning.batch_size import BatchPlan, RunBatch, TrainingStages, plan_batch
from megalm.planning.data_checks import DATA_FILE_RULES, DATA_RULES, NAME, data_is_configured
from megalm.planning.diagnostics import profiled_steps
from megalm.planning.engine_checks import DEEPSPEED_RULES, CheckContext, Rule
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
        raise ConfigError(*(line for error in found for line in _lines_of(error)))


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
        try:
            rule(case)
        except MegalmError as error:
            # A rule about keys that already have a problem follows from it: the rule sees defaults in their place.
            keys = set(re.findall(r"[a-z]\w*(?:\.\w+)*", str(error))) & _KEYS
            if not keys or keys - named:
                yield error
            named |= keys


def _lines_of(error: MegalmError) -> tuple[str, ...]:
    return error.problems if isinstance(error, ConfigError) else (str(error),)


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
    of_steps = (warmup_ends_before_training, decay_fits_training)
    _raise_all(list(_broken(replace(case, loaded=loaded), of_steps, set())))
    return loaded, [notice]


# --- run and optimizer groups ----------------------------------------------------------------------------------------


def run_name(case: CheckContext) -> None:
    name = case.config.run.name
    for field, variable in JOB_FIELDS.items():
        if name is not None and field in name:
            raise ConfigError(
                f"run.name={name}: {field} is of a Slurm job, and {variable} is not set; use megalm submit or sbatch"
            )
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError(
            f"run.name={name!r} is not a folder name: use letters, digits, '.', '_' and '-'; run.root is the parent"
        )


def parameter_groups_match(case: CheckContext) -> None:
    """Refuse patterns that no parameter is left for; a later group takes what no earlier one matches."""
    rules, names = case.config.train.parameter_groups, list(case.shape.parameters())
    used = {key.rule for key in case.group_keys.values()}
    unused = [rule.match for index, rule in enumerate(rules) if index not in used]
    problems = []
    for pattern in unused:
        if any(fnmatchcase(name, pattern) for name in names):
            why = "matches only parameters of earlier groups; move it before them, or remove it"
        else:
            why = f"matches no parameter; near names are {', '.join(_near_patterns(pattern, names))}"
        problems.append(f"train.parameter_groups: match={pattern!r} {why}")
    if problems:
        raise ConfigError(*problems)


def some_parameters_train(case: CheckContext) -> None:
    rules, keys = case.config.train.parameter_groups, case.group_keys.values()
    if all(key.frozen for key in keys):
        patterns = ", ".join(repr(rules[index].match) for index in sorted({key.rule for key in keys}))
        raise ConfigError(
            f"train.parameter_groups: frozen=true of match={patterns} freezes every parameter; leave some to train, or "
            "measure the model with megalm evaluate"
        )


def frozen_groups_have_no_settings(case: CheckContext) -> None:
    for rule in case.config.train.parameter_groups:
        given = [name for name in ("learning_rate_scale", "weight_decay") if name in rule.model_fields_set]
        if rule.frozen and given:
            raise ConfigError(
                f"train.parameter_groups: match={rule.match!r} is frozen=true and has {' and '.join(given)}, which act "
                "on no update; remove one or the other"
            )


def _near_patterns(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the three likest patterns that match parameters: names, in any block, and beginnings of names."""
    whole = [re.sub(r"^layers\.\d+\.", "layers.*.", name) for name in names]
    beginnings = [f"{name.rsplit('.', level)[0]}.*" for name in whole for level in (1, 2)]
    return sorted(dict.fromkeys([*whole, *beginnings]), key=lambda other: -likeness(pattern, other))[:3]


# --- data -------------------------------------------------------------------------------------------------------------


def batches_divide_into_samples(case: CheckContext) -> None:
    """A step reads whole samples, so that the order of samples is the same whatever they are cut into."""
    if len(set(case.config.data.sequence_lengths)) == 1:
        return
    for stage in TrainingStages.of(case.config, _batch(case).global_batch).stages:
        if stage.sequences % stage.parts:
            below = stage.sequences // stage.parts * stage.parts
            use = f"{below} or {below + stage.parts}" if below else f"{stage.parts}"
            raise ConfigError(
                f"schedule.batch: from step {stage.first_step}, {stage.sequences} sequences of {stage.sequence_length} "
                f"tokens are no whole samples of {case.config.data.sample_length}; use a batch of {use}"
            )


def average_exists(case: CheckContext) -> None:
    if case.config.evaluate.ema and case.config.train.ema_decay is None:
        raise ConfigError(
            "evaluate.ema=true validates an average of the weights, but the run keeps none; set train.ema_decay=0.999, "
            "or remove it"
        )


# --- schedule, checkpoints, batch -------------------------------------------------------------------------------------


def one_length_of_training(case: CheckContext) -> None:
    train, sources = case.config.train, case.loaded.sources
    values = (train.steps if sources["train.steps"] != "default" else None, train.tokens, train.tokens_per_parameter)
    given = [f"{key}={value}" for key, value in zip(RUN_LENGTH, values, strict=True) if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} each set the length of the run; keep one")


def warmup_ends_before_training(case: CheckContext) -> None:
    # resolve.py shortens a preset's warm-up with the run, but not a person's. DeepSpeed's may be cut short.
    schedule, steps = case.config.schedule, case.config.train.steps
    warmup, given = schedule.warmup_steps, "schedule.warmup_steps" in case.loaded.explicit_keys
    if case.knows_steps and warmup >= steps and given and schedule.step_convention == "standard":
        raise ConfigError(f"schedule.warmup_steps={warmup} is not below train.steps={steps}; shorten the warm-up")


def decay_fits_training(case: CheckContext) -> None:
    # As with the warm-up, a preset's decay gives way to a person's settings.
    schedule = case.config.schedule
    if schedule.decay_steps is None or "schedule.decay_steps" not in case.loaded.explicit_keys:
        return
    if schedule.kind != "wsd":
        raise ConfigError(
            f"schedule.decay_steps={schedule.decay_steps} has no effect with schedule.kind={schedule.kind}; "
            "it is for wsd, remove it"
        )
    end, name = schedule.decay_end_step, "schedule.decay_end_step"
    if end is None and case.knows_steps:
        end, name = case.config.train.steps, "train.steps"
    if end is not None and schedule.warmup_steps + schedule.decay_steps > end:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={schedule.decay_steps} are more "
            f"than {name}={end}; shorten one"
        )


def final_rate_has_effect(case: CheckContext) -> None:
    schedule = case.config.schedule
    for name in ("final_learning_rate", "final_ratio", "decay_end_step"):
        value, given = getattr(schedule, name), f"schedule.{name}" in case.loaded.explicit_keys
        if value is not None and given and schedule.kind in ENDLESS:
            raise ConfigError(f"schedule.{name}={value:g} has no effect with schedule.kind={schedule.kind}; remove it")


def decay_ends_after_warmup(case: CheckContext) -> None:
    schedule, given = case.config.schedule, "schedule.decay_end_step" in case.loaded.explicit_keys
    end = schedule.decay_end_step
    if end is not None and given and end <= schedule.warmup_steps and schedule.step_convention == "standard":
        raise ConfigError(
            f"schedule.decay_end_step={end} is not above schedule.warmup_steps={schedule.warmup_steps}; raise it, or "
            "shorten the warm-up"
        )


def deepspeed_has_the_kind(case: CheckContext) -> None:
    schedule = case.config.schedule
    if schedule.step_convention == "deepspeed" and schedule.kind not in ("constant", "linear", "cosine"):
        raise ConfigError(
            f"schedule.step_convention=deepspeed with schedule.kind={schedule.kind}, which DeepSpeed does not have; "
            "use constant, linear or cosine, or remove step_convention"
        )


def one_rate_at_each_end(case: CheckContext) -> None:
    schedule, sources = case.config.schedule, case.loaded.sources
    for end in ("initial", "final"):
        rate, ratio = getattr(schedule, f"{end}_learning_rate"), getattr(schedule, f"{end}_ratio")
        if rate is not None and ratio is not None:
            raise ConfigError(
                f"schedule.{end}_learning_rate={rate:g} ({sources[f'schedule.{end}_learning_rate']}) and "
                f"schedule.{end}_ratio={ratio:g} ({sources[f'schedule.{end}_ratio']}) set the same rate; remove one"
            )


def no_rate_above_peak(case: CheckContext) -> None:
    schedule, sources, given = case.config.schedule, case.loaded.sources, case.settings.peak_learning_rate
    peak, named = schedule.peak_learning_rate, "schedule.peak_learning_rate"
    source = sources[named]
    if given is not None:  # takes precedence over a preset's
        (named, peak), source = given, case.ds.path
    for name in ("initial_learning_rate", *(() if schedule.kind in ENDLESS else ("final_learning_rate",))):
        rate = getattr(schedule, name)
        if rate is not None and rate > peak:
            raise ConfigError(
                f"schedule.{name}={rate:g} ({sources[f'schedule.{name}']}) is above {named}={peak:g} ({source}); "
                "lower it"
            )


def kept_checkpoints_are_made(case: CheckContext) -> None:
    checkpoint = case.config.checkpoint
    every, interval = checkpoint.keep_every_steps, checkpoint.interval_steps
    if every is None:
        return
    if checkpoint.keep_last is None:
        raise ConfigError(
            f"checkpoint.keep_every_steps={every} has no effect without checkpoint.keep_last: all checkpoints are "
            "kept; set checkpoint.keep_last, or remove it"
        )
    if interval is None or every % interval:
        raise ConfigError(
            f"checkpoint.keep_every_steps={every} is not a multiple of checkpoint.interval_steps={interval}, so no "
            "checkpoint is saved there; change one of them"
        )


def batch_stages_follow_each_other(case: CheckContext) -> None:
    steps = [stage.from_step for stage in case.config.schedule.batch]
    for before, step in pairwise(steps):
        if step <= max(1, before):
            raise ConfigError(f"schedule.batch: from_step={step} is not after step {max(1, before)}; sort the stages")


def copies_go_elsewhere(case: CheckContext) -> None:
    checkpoint, run = case.config.checkpoint, case.config.run
    address, keep = checkpoint.copy_to, checkpoint.copy_keep_last
    if address is None:
        if keep is not None:
            raise ConfigError(
                f"checkpoint.copy_keep_last={keep} has no effect without checkpoint.copy_to; set it, or remove it"
            )
        return
    check_address(address, f"checkpoint.copy_to={public_address(address)}", COPY_SCHEMES)
    if not is_remote(address) and Path(address).resolve() == Path(run.root).resolve():
        raise ConfigError(
            f"checkpoint.copy_to={address} is run.root, where the run itself is; name a folder on another disk"
        )


def one_batch(case: CheckContext) -> None:
    batch, given = RunBatch.of(case.loaded, case.ds), "batch.global_sequences" in case.loaded.explicit_keys
    total, sequences, configured = case.settings.train_batch_size, batch.sequences, case.config.batch.global_sequences
    if batch.key == "schedule.batch" and given and configured != sequences:
        raise ConfigError(
            f"schedule.batch begins with {sequences} sequences, but batch.global_sequences={configured} "
            f"({case.loaded.sources['batch.global_sequences']}) sets the same value; remove one"
        )
    if batch.by_user and None not in (total, sequences) and total != sequences:
        raise ConfigError(
            f"{batch.key}{' begins with ' if batch.key == 'schedule.batch' else '='}{sequences} ({batch.source}) and "
            f"train_batch_size={total} ({case.ds.path}) set the same value; remove one"
        )


def batch_divides(case: CheckContext) -> None:
    _batch(case)


def recipe_keeps_its_batch(case: CheckContext) -> None:
    """A recipe preset is a documented run: with another batch it would be another run under the same name."""
    named = case.config.deepspeed_config
    if named is None:
        return
    own = read_deepspeed_json(named_json(named)).settings.train_batch_size
    total = case.settings.train_batch_size or _batch(case).global_batch
    if own != total:
        preset = f"preset {case.loaded.preset}" if case.loaded.preset else "this configuration"
        raise ConfigError(
            f"{case.ds.path} has train_batch_size={total}, but {preset} belongs to {named} "
            f"with train_batch_size={own}; remove --deepspeed_config to use that file, or set deepspeed_config=null "
            "for your own run"
        )


def _batch(case: CheckContext) -> BatchPlan:
    return plan_batch(case.settings, case.topology, case.ds.path, lambda _: True, RunBatch.of(case.loaded, case.ds))[0]


# --- guard and wall time ----------------------------------------------------------------------------------------------


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


def wall_time_is_a_duration(case: CheckContext) -> None:
    if (text := case.config.train.max_wall_time) is not None:
        wall_time_seconds(text)


def profiled_steps_are_steps(case: CheckContext) -> None:
    if case.config.profile.steps is not None:
        profiled_steps(case.config.profile.steps)


def trackers_are_installed(case: CheckContext) -> None:
    tracking = case.config.tracking
    for name, wanted in (("tensorboard", tracking.tensorboard), ("wandb", tracking.wandb)):
        if wanted:
            require_extra(name, f"tracking.{name}=true")


def guard_warms_up_in_its_window(case: CheckContext) -> None:
    guard = case.config.guard
    if guard.warmup_steps > guard.window:
        raise ConfigError(
            f"guard.warmup_steps={guard.warmup_steps} is more than guard.window={guard.window}, so the guard would "
            "never judge a step; shorten the one or widen the other"
        )


def guard_limit_has_both_numbers(case: CheckContext) -> None:
    guard = case.config.guard
    if (guard.stop_above is None) != (guard.after_step is None):
        given, absent = ("stop_above", "after_step") if guard.after_step is None else ("after_step", "stop_above")
        raise ConfigError(
            f"guard.{given}={getattr(guard, given):g} needs guard.{absent}, "
            "for example guard.stop_above=7 guard.after_step=1000"
        )


def rollback_has_a_checkpoint(case: CheckContext) -> None:
    if case.config.guard.policy == "rollback" and case.config.checkpoint.interval_steps is None:
        raise ConfigError("guard.policy=rollback needs checkpoints before the end; set checkpoint.interval_steps")


def excluded_nodes_are_checked(case: CheckContext) -> None:
    if case.config.slurm.exclude_bad and not case.config.train.check_nodes:
        raise ConfigError("slurm.exclude_bad=true leaves what train.check_nodes finds, which is false; set it to true")


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
    parameter_groups_match,
    some_parameters_train,
    frozen_groups_have_no_settings,
    *DATA_RULES,
    average_exists,
    one_length_of_training,
    warmup_ends_before_training,
    decay_fits_training,
    final_rate_has_effect,
    decay_ends_after_warmup,
    deepspeed_has_the_kind,
    one_rate_at_each_end,
    no_rate_above_peak,
    kept_checkpoints_are_made,
    copies_go_elsewhere,
    *PARALLEL_RULES,
    batch_stages_follow_each_other,
    one_batch,
    batch_divides,
    batches_divide_into_samples,
    recipe_keeps_its_batch,
    *DEEPSPEED_RULES,
    wall_time_is_a_duration,
    profiled_steps_are_steps,
    trackers_are_installed,
    guard_warms_up_in_its_window,
    guard_limit_has_both_numbers,
    rollback_has_a_checkpoint,
    excluded_nodes_are_checked,
    *DATA_FILE_RULES,
)
