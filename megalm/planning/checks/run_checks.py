"""Rules across the run configuration and the DeepSpeed JSON: one function and one message each.

They run before any process group exists, so that a run that cannot be right never takes a GPU. Rules about one
value alone are in the schemas.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from megalm.config.deepspeed.json_reader import DeepSpeedConfig, named_json, read_deepspeed_json
from megalm.config.loading import LoadedConfig
from megalm.config.precision import DeviceFacts
from megalm.errors import ConfigError
from megalm.planning.batch_size import plan_batch
from megalm.planning.checks.context import CheckContext
from megalm.planning.checks.data import DATA_FILE_RULES, DATA_RULES, data_is_brought
from megalm.planning.checks.deepspeed import DEEPSPEED_RULES
from megalm.planning.checks.parallel import PARALLEL_RULES
from megalm.planning.lr_schedule import ENDLESS, peak_learning_rate
from megalm.topology import Topology

# Rules about guarding, continuing and ending a run: one function and one message each as above.

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def wall_time_seconds(text: str) -> float:
    """`4h` -> 14400; also `90m`, `1h30m`, `45s`, `2d`.

    Raises:
        ConfigError: anything else, or no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ConfigError(f"train.max_wall_time={text!r} is no duration; write 30m, 4h, 1h30m or 2d")
    return seconds


def wall_time_is_a_duration(case: CheckContext) -> None:
    if (text := case.config.train.max_wall_time) is not None:
        wall_time_seconds(text)


def guard_warms_up_in_its_window(case: CheckContext) -> None:
    guard = case.config.guard
    if guard.warmup_steps > guard.window:
        raise ConfigError(
            f"guard.warmup_steps={guard.warmup_steps} is more than guard.window={guard.window}, so that nothing would "
            "ever be judged; shorten the one or widen the other"
        )


def guard_limit_has_both_numbers(case: CheckContext) -> None:
    guard = case.config.guard
    if (guard.stop_above is None) != (guard.after_step is None):
        stated, absent = ("stop_above", "after_step") if guard.after_step is None else ("after_step", "stop_above")
        raise ConfigError(
            f"guard.{stated}={getattr(guard, stated):g} needs guard.{absent}: a high loss counts after some steps "
            "only, for example guard.stop_above=7 guard.after_step=1000"
        )


def rollback_has_where_to_go(case: CheckContext) -> None:
    if case.config.guard.policy == "rollback" and case.config.checkpoint.interval_steps is None:
        raise ConfigError(
            "guard.policy=rollback goes back to a checkpoint, and none is written before the end; state "
            "checkpoint.interval_steps"
        )


GUARD_RULES: tuple[Callable[[CheckContext], None], ...] = (
    wall_time_is_a_duration,
    guard_warms_up_in_its_window,
    guard_limit_has_both_numbers,
    rollback_has_where_to_go,
)


def check_run(
    loaded: LoadedConfig, ds: DeepSpeedConfig, world_size: int, device: DeviceFacts, data_needed: bool = True
) -> None:
    """Raise the first rule that the run breaks.

    Args:
        data_needed: whether a run without data is refused; a plan needs none.

    Raises:
        ConfigError: what, where, and what to do instead.
    """
    case = CheckContext(loaded, ds, world_size, device)
    for rule in RULES:
        if data_needed or rule is not data_is_brought:
            rule(case)


def run_name(case: CheckContext) -> None:
    name = case.config.run.name
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"run.name={name!r} is no folder name: use letters, digits, '.', '_' and '-', and run.root for the folder"
        )


def hidden_divides_into_heads(case: CheckContext) -> None:
    model = case.config.model
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} does not divide into model.num_attention_heads="
            f"{model.num_attention_heads}; change one of them or state model.head_dim"
        )


def heads_divide_into_groups(case: CheckContext) -> None:
    model = case.config.model
    groups = model.num_key_value_heads
    if groups is not None and model.num_attention_heads % groups:
        raise ConfigError(
            f"model.num_attention_heads={model.num_attention_heads} does not divide into "
            f"model.num_key_value_heads={groups}; each key/value head serves equally many heads"
        )


def rotary_needs_even_heads(case: CheckContext) -> None:
    model = case.config.model
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    if model.style == "llama" and head_dim % 2:
        raise ConfigError(
            f"head_dim={head_dim} (model.hidden_size / model.num_attention_heads) is odd; rotary positions of style "
            "llama turn pairs of dimensions: use an even one"
        )


def sequence_fits_positions(case: CheckContext) -> None:
    length, positions = case.config.data.sequence_length, case.config.model.max_position_embeddings
    if positions is not None and length > positions:
        raise ConfigError(
            f"data.sequence_length={length} is longer than model.max_position_embeddings={positions}; "
            "shorten the one or raise the other"
        )


def warmup_ends_before_training(case: CheckContext) -> None:
    # A preset's warm-up is shortened with the run (resolve.py); a person's is not. DeepSpeed's may be cut short.
    schedule, steps = case.config.schedule, case.config.train.steps
    warmup = schedule.warmup_steps
    if schedule.step_convention == "deepspeed":
        return
    if warmup >= steps and "schedule.warmup_steps" in case.loaded.stated:
        raise ConfigError(f"schedule.warmup_steps={warmup} is not below train.steps={steps}; shorten the warm-up")


def decay_fits_training(case: CheckContext) -> None:
    # As with the warm-up, a preset's decay gives way to what a person states.
    schedule, steps = case.config.schedule, case.config.train.steps
    if schedule.decay_steps is None or "schedule.decay_steps" not in case.loaded.stated:
        return
    if schedule.kind != "wsd":
        raise ConfigError(
            f"schedule.decay_steps={schedule.decay_steps} has no effect with schedule.kind={schedule.kind}; "
            "it is for wsd, remove it"
        )
    end, name = (
        schedule.decay_end_step or steps,
        "schedule.decay_end_step" if schedule.decay_end_step else "train.steps",
    )
    if schedule.warmup_steps + schedule.decay_steps > end:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={schedule.decay_steps} are more "
            f"than {name}={end}; shorten one"
        )


def decay_end_fits_schedule(case: CheckContext) -> None:
    schedule, stated = case.config.schedule, "schedule.decay_end_step" in case.loaded.stated
    if schedule.decay_end_step is None or not stated:
        return
    if schedule.kind in ENDLESS:
        raise ConfigError(
            f"schedule.decay_end_step={schedule.decay_end_step} has no effect with schedule.kind={schedule.kind}; "
            "remove it"
        )
    if schedule.step_convention == "standard" and schedule.decay_end_step <= schedule.warmup_steps:
        raise ConfigError(
            f"schedule.decay_end_step={schedule.decay_end_step} is not above "
            f"schedule.warmup_steps={schedule.warmup_steps}; raise it, or shorten the warm-up"
        )


def deepspeed_steps_have_its_kinds(case: CheckContext) -> None:
    schedule = case.config.schedule
    if schedule.step_convention == "deepspeed" and schedule.kind not in ("constant", "linear", "cosine"):
        raise ConfigError(
            f"schedule.step_convention=deepspeed with schedule.kind={schedule.kind}, which DeepSpeed does not have; "
            "use constant, linear or cosine, or remove it"
        )


def one_rate_at_each_end(case: CheckContext) -> None:
    schedule, sources = case.config.schedule, case.loaded.sources
    for end in ("initial", "final"):
        rate, ratio = getattr(schedule, f"{end}_learning_rate"), getattr(schedule, f"{end}_ratio")
        if rate is not None and ratio is not None:
            raise ConfigError(
                f"schedule.{end}_learning_rate={rate:g} ({sources[f'schedule.{end}_learning_rate']}) and "
                f"schedule.{end}_ratio={ratio:g} ({sources[f'schedule.{end}_ratio']}) state the same fact; remove one"
            )


def final_rate_has_effect(case: CheckContext) -> None:
    schedule = case.config.schedule
    for name in ("final_learning_rate", "final_ratio"):
        value = getattr(schedule, name)
        if value is not None and f"schedule.{name}" in case.loaded.stated and schedule.kind in ENDLESS:
            raise ConfigError(f"schedule.{name}={value:g} has no effect with schedule.kind={schedule.kind}; remove it")


def no_rate_above_peak(case: CheckContext) -> None:
    schedule, sources = case.config.schedule, case.loaded.sources
    peak, named, source = peak_learning_rate(case.loaded, case.ds)
    ends = {"initial_learning_rate": schedule.initial_learning_rate}
    if schedule.kind not in ENDLESS:
        ends["final_learning_rate"] = schedule.final_learning_rate
    for name, rate in ends.items():
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
            f"checkpoint.keep_every_steps={every} has no effect without checkpoint.keep_last: everything is kept; "
            "state how many, or remove it"
        )
    if interval is None or every % interval:
        raise ConfigError(
            f"checkpoint.keep_every_steps={every} is no multiple of checkpoint.interval_steps={interval}, so that "
            "nothing would be saved there; change one of them"
        )


def batch_divides(case: CheckContext) -> None:
    parallel = case.config.parallel
    topology = Topology(case.world_size, parallel.tensor, parallel.pipeline)
    plan_batch(case.settings, topology.data, case.ds.path, fits=lambda _: True)


def recipe_keeps_its_batch(case: CheckContext) -> None:
    """A recipe preset is a documented run: with another batch it would be another run under the same name."""
    named = case.config.deepspeed_config
    if named is None:
        return
    own = read_deepspeed_json(named_json(named)).settings.train_batch_size
    if own != case.settings.train_batch_size:
        raise ConfigError(
            f"{case.ds.path} has train_batch_size={case.settings.train_batch_size}, but {case.preset_words} belongs to "
            f"{named} with train_batch_size={own}; leave --deepspeed_config out, which takes that file, or state "
            "deepspeed_config=null for a run of your own"
        )


RULES: tuple[Callable[[CheckContext], None], ...] = (
    run_name,
    hidden_divides_into_heads,
    heads_divide_into_groups,
    rotary_needs_even_heads,
    sequence_fits_positions,
    *DATA_RULES,
    warmup_ends_before_training,
    decay_fits_training,
    decay_end_fits_schedule,
    deepspeed_steps_have_its_kinds,
    one_rate_at_each_end,
    final_rate_has_effect,
    no_rate_above_peak,
    kept_checkpoints_are_made,
    *PARALLEL_RULES,
    batch_divides,
    recipe_keeps_its_batch,
    *DEEPSPEED_RULES,
    *GUARD_RULES,
    *DATA_FILE_RULES,
)
