"""Resuming from a checkpoint with other settings: what may differ, and how schedule and data continue.

Pure functions of a manifest and of the resuming run; no file is read or written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megalm.checkpoint.manifest import Beginning, DataSegment, Manifest
from megalm.config.loading import COMMAND_LINE, SAVED_CONFIG
from megalm.data.sampling.mixture import BlendedSamples
from megalm.data.tokenizers.tokenizer import Tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.model.model_config import ModelConfig, model_settings
from megalm.model.parameter_groups import MOMENTS, frozen_parameters, group_keys
from megalm.planning.lr_schedule import ENDLESS, ScheduleFacts, ScheduleSegment, rate_at
from megalm.planning.resolve import ResolvedRun, decay_steps_of
from megalm.train.resume.training_progress import RunSchedule, TrainingProgress


@dataclass(frozen=True)
class DataIdentity:
    """The fingerprints that identify a run's data: samples, tokenizer and validation sets."""

    samples: BlendedSamples
    tokenizer: str  # fingerprint
    validation: str = ""  # fingerprint of the samples used for validation during training

    def at(self, consumed: int) -> dict[str, str]:
        """Return the fingerprints of the first `consumed` samples; later ones may change.

        `order` covers dataset, document range, sequence length, stride, seed, kind of order, weights and stages.
        """
        return {
            "order": self.samples.order_fingerprint(consumed),
            "dataset": self.samples.dataset_fingerprint(consumed),
            "tokenizer": self.tokenizer,
        }


def identity_of(run: ResolvedRun, shape: ModelConfig, identity: DataIdentity, consumed: int) -> dict[str, Any]:
    """Return, as JSON, the facts that need `resume.allow` to change when a run resumes after `consumed` samples."""
    data = run.config.data
    settings = {
        "data.sequence_length": data.sample_length,
        "data.split": data.split,
        "data.stride": None if data.stride == data.sample_length else data.stride,
        "data.order": data.order,
        "data.packing": data.packing,
        "data.document_mask": data.masks_documents,
        "train.seed": run.config.train.seed,
        "data.mixture": identity.samples.mixture(consumed),
    }
    return {"model": model_settings(shape), "data": settings, "fingerprints": identity.at(consumed)}


# Default final learning rate of an extension, as a share of the rate at which it begins.
_FINAL_SHARE = 0.1
# Setting or fingerprint -> item of `resume.allow`; all others are `dataset`.
_ITEMS = {
    "data.order": "order",
    "data.stride": "order",
    "data.packing": "order",
    "data.document_mask": "order",
    "train.seed": "order",
    "order": "order",
    "dataset": "dataset",
    "tokenizer": "tokenizer",
}

# What checkpoints of earlier releases do not state.
_UNSTATED = {"data.packing": "stream"}

# Compared elsewhere: samples can be cut to another length, and the order's fingerprint covers the mixture.
_COMPARED_ELSEWHERE = ("data.sequence_length", "data.mixture")
_FINGERPRINT_SHOWN = 12  # digits
_MEANINGS = ("mup_base_width", "norm_zero_centered")
# Model settings that determine the weights' shapes or meaning: `resume.allow` cannot change them.
_SHAPES = (
    *("style", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "tie_word_embeddings", "qk_norm", "normalization", "norm_placement"),
    *("position_embedding_type", "qkv_bias", "attention_output_bias", "mlp_bias", "gated_mlp", "attention_sinks"),
    *("num_experts", "moe_intermediate_size", "num_shared_experts", "moe_layers", "expert_bias"),
    *_MEANINGS,
)


# --- the schedule -----------------------------------------------------------------------------------------------------


def with_schedule(run: ResolvedRun, manifest: Manifest | None, more: int | None = None) -> RunSchedule:
    """Return the schedule of a run that resumes from `manifest`; None: a new run.

    An imported checkpoint has no schedule: the run's own holds from its first step on, and continues at that step.

    A schedule that the checkpoint already knows changes nothing. Another one takes effect at the next step, and counts
    steps from the run's start. An extension by `more` steps starts a new schedule.
    """
    configured = run.schedule.as_json()
    if manifest is None:
        return RunSchedule((ScheduleSegment(1, 0, run.schedule),), (configured,))
    step = manifest.step
    stored = manifest.schedule.segments
    segments = tuple(map(ScheduleSegment.of, stored)) or (ScheduleSegment(1, 0, run.schedule),)
    known = manifest.schedule.stated or (segments[-1].schedule.as_json(),)
    if more is not None:
        added = ScheduleSegment(step + 1, step, _extension(run, rate_at(segments, max(step, 1)), more, known[-1]))
        return RunSchedule((*segments, added), known if configured in known else (*known, configured))
    if _is_known(run, known):
        return RunSchedule(segments, known)
    return RunSchedule((*segments, ScheduleSegment(step + 1, 0, run.schedule)), (configured,))


def _is_known(run: ResolvedRun, known: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the configured schedule is a known one; ignore `train.steps` unless it is given now.

    The saved `train.steps` may come from an extension.
    """
    if run.sources.get("train.steps") != SAVED_CONFIG:
        return run.schedule.as_json() in known
    section = run.config.schedule
    return any(
        replace(run.schedule, steps=steps, decay_steps=decay_steps_of(section, steps)).as_json() == before
        for before in known
        for steps in [before["steps"]]
    )


def with_last_step(run: ResolvedRun, schedule: RunSchedule) -> ResolvedRun:
    """Return the run with `train.steps` set to the last step of its schedule."""
    steps = schedule.segments[-1].last_step
    if steps == run.config.train.steps:
        return run
    train = run.config.train.model_copy(update={"steps": steps})
    return replace(run, config=run.config.model_copy(update={"train": train}))


def _extension(run: ResolvedRun, rate: float, steps: int, before: Mapping[str, Any]) -> ScheduleFacts:
    """Return the schedule of an extension: a cosine from the current rate to a tenth of it, over `steps` steps.

    Schedule settings on the command line take precedence, unless they are the same as `before`: then they belong to
    the run's usual command, not to the extension.
    """
    facts, defaults = run.schedule, {field.name: field.default for field in fields(ScheduleFacts)}

    def is_given(key: str) -> bool:
        names = (f"schedule.{key}", f"schedule.{key.replace('_learning_rate', '_ratio')}")
        here = any(run.sources.get(name) == COMMAND_LINE for name in names)
        return here and getattr(facts, key) != before.get(key, defaults[key])

    peak = facts.peak_learning_rate if is_given("peak_learning_rate") else rate
    decay_steps = max(1, steps // 5)
    usual = ScheduleFacts("cosine", peak, peak * _FINAL_SHARE, warmup_steps=0, decay_steps=decay_steps, steps=steps)
    given = {key: getattr(facts, key) for key in defaults if key != "steps" and is_given(key)}
    return replace(usual, **given)


# --- the data ---------------------------------------------------------------------------------------------------------


def lengths_of_order(manifest: Manifest) -> list[tuple[int, int]]:
    """Return the sequence lengths of the current order, each with the sample at which the next one took over."""
    found: list[tuple[int, int]] = []
    end: int | None = None
    for segment in reversed(manifest.data_position.segments):
        end = segment.next_sample if end is None else end
        if segment.begins != "on":
            found.append((segment.sequence_length, end))
            end = None
        if segment.begins == "anew":
            break
    return found[::-1]


def first_sample_of(manifest: Manifest | None, run: ResolvedRun) -> Callable[[int], int]:
    """Return a function step -> number of its first sample, for a mixture's stages, by each step's global batch.

    Skipped samples do not move a stage, since they did not move it in the run that skipped them.
    """
    done, sample = 0, 0
    marks: list[tuple[int, int, int]] = []  # of steps done: first step, first sample, batch
    if manifest is not None:
        segments, done = _of_order(manifest.data_position.segments), manifest.step
        step = done - sum(segment.samples_consumed // segment.global_batch for segment in segments)
        for segment in segments:
            marks.append((step + 1, sample, segment.global_batch))
            step += segment.samples_consumed // segment.global_batch
            sample += segment.samples_consumed

    def first(step: int) -> int:
        if step > done:
            return sample + run.stages.samples(step - 1, after=done)
        first_step, first_sample, batch = next((mark for mark in reversed(marks) if mark[0] <= step), (step, 0, 0))
        return first_sample + (step - first_step) * batch

    return first


def incompatibilities(then: Manifest, now: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the differences in words, by item of `resume.allow`.

    Args:
        now: the same sections of this run: model, data, fingerprints.
    """
    found: dict[str, list[str]] = {}
    sections = {"model": then.model, "data": then.data, "fingerprints": then.fingerprints.model_dump()}
    for section, stored in sections.items():
        for name, value in now[section].items():
            was = stored.get(name, _UNSTATED.get(name))
            if was == value or name in _COMPARED_ELSEWHERE or _may_grow(name, then, now):
                continue
            thing = "model" if section == "model" else _ITEMS.get(name, "dataset")
            then_and_now = [str(it)[:_FINGERPRINT_SHOWN] if section == "fingerprints" else it for it in (was, value)]
            found.setdefault(thing, []).append("{} was {}, is {}".format(name, *then_and_now))
    if len(found) > 1 and [words.split()[0] for words in found.get("order", [])] == ["order"]:
        del found["order"]  # the order's fingerprint differs because of the other changes
    mixtures = [data.get("data.mixture") for data in (then.data, now["data"])]
    changed = next((name for name in ("order", "dataset") if name in found), None)
    if changed is not None and mixtures[0] != mixtures[1]:
        was, now_is = (mixture or "one dataset" for mixture in mixtures)
        found[changed].append(f"the mixture so far was {was}, is {now_is} (use data.stages to change only later steps)")
    return found


def refuse_incompatible(path: Path, found: Mapping[str, Sequence[str]], allowed: Sequence[str]) -> None:
    """Raise CheckpointError if `resume.allow` does not name every difference, or if one is never allowed.

    No shape shows that another setting of `_MEANINGS` makes another model of the same weights.
    """
    never = any(words.split()[0] in _MEANINGS for words in found.get("model", ()))
    refused = {thing: words for thing, words in found.items() if thing not in allowed or (thing == "model" and never)}
    if refused:
        differences = "; ".join(f"{thing} ({', '.join(words)})" for thing, words in refused.items())
        advice = f"restore the setting, or allow the change with resume.allow=[{','.join([*allowed, *refused])}]"
        if any(words.split()[0] in _SHAPES for words in refused.get("model", ())):
            advice = "restore the setting: the shapes of a model, and what its weights mean, cannot change"
        raise CheckpointError(f"{path} was trained with another {differences}; {advice}")


def refuse_other_moments(path: Path, manifest: Manifest, run: ResolvedRun) -> None:
    """Raise CheckpointError if the checkpoint lacks a moment of this run's optimizer: another one trained it."""
    train, stored_tensors = run.config.train, manifest.parameter_tensors
    if run.optimizer.muon is None and all({*MOMENTS["adam"]} <= {*tensor.kinds} for tensor in stored_tensors.values()):
        return
    dimensions = {name: len(tensor.shape) for name, tensor in stored_tensors.items()}
    keys = group_keys(dimensions, train.parameter_groups, train.embedding_weight_decay, run.optimizer.muon is not None)
    for name, key in keys.items():
        stored = stored_tensors[name].kinds
        if name in manifest.frozen:
            continue  # `state_notes` says what becomes of it
        if lacking := [kind for kind in MOMENTS[key.algorithm] if kind not in stored]:
            raise CheckpointError(
                f"{path} has {', '.join(stored)} of {name}, but this run's optimizer needs {', '.join(lacking)}; "
                "resume with the optimizer that trained it, or start a new run with these weights: run.name=NEW "
                f"--resume {path} --extend-steps N --extend-strategy weights"
            )


def continuation_kind(run: ResolvedRun, manifest: Manifest, found: Mapping[str, Sequence[str]]) -> Beginning:
    """Return how this run's data continues the checkpoint's.

    Raises:
        ConfigError: the sequence length changes in a run with data.stages.
    """
    if found.keys() & {"dataset", "tokenizer", "order"}:
        return "anew"
    last = manifest.data_position.segments[-1]
    if last.sequence_length == run.config.data.sample_length:
        return "on"
    if any(stage.blend for stage in run.config.data.stages):
        raise ConfigError(
            f"data.sequence_length was {last.sequence_length} and cannot change in a run with data.stages; keep it, or "
            "start a new order of samples with resume.allow=[order] and another train.seed"
        )
    return "recut"


def progress_from(manifest: Manifest, run: ResolvedRun, continuation: Beginning) -> TrainingProgress:
    """Return the progress at which training resumes."""
    data, stage = manifest.data_position.segments, run.stages.at(manifest.step + 1)
    last = data[-1]
    position = TrainingProgress(
        stage,
        step=manifest.step,
        tokens=manifest.tokens or 0,
        best_loss=manifest.best_validation_loss,
        stale_evaluations=manifest.stale_evaluations,
        rollbacks=manifest.rollbacks,
    )
    if continuation != "on":
        position.data_history, position.continuation = data, continuation
    elif last.global_batch != stage.samples or last.samples_skipped:
        position.data_history, position.continuation = data, "on"
        position.first_sample = position.samples = last.next_sample
    else:
        position.data_history, position.continuation = data[:-1], last.begins
        position.first_sample, position.samples = last.first_sample, last.next_sample
    return position


def change_notes(position: TrainingProgress, manifest: Manifest, run: ResolvedRun) -> Iterator[str]:
    """Yield the changes from here on, one line each."""
    last, schedule = manifest.data_position.segments[-1], position.schedule.segments
    yield from grid_notes(manifest, run)
    if last.global_batch != run.stages.at(manifest.step).samples:
        yield f"the batch was {last.global_batch} samples, is {position.stage.samples}"
    if last.sequence_length != run.config.data.sample_length:
        yield f"the sequence length was {last.sequence_length}, is {run.config.data.sample_length}"
    if position.continuation == "anew" and position.data_history and position.samples == 0:
        yield "the order of samples changed: it starts at its first sample"
    if last.samples_skipped:
        yield f"skipping {last.samples_skipped:,} samples"
    if len(schedule) > len(manifest.schedule.segments) and not _same_rates(schedule):
        yield f"the learning rate changes {schedule[-1]}"


def grid_notes(manifest: Manifest, run: ResolvedRun) -> Iterator[str]:
    """Yield a line on both grids if the checkpoint was saved on another one, or with another micro-batch."""
    stored, batch = manifest.topology, run.batch.of(run.stages.at(manifest.step + 1).sequences)
    if stored is None:
        return
    is_other_grid = (stored.grid, stored.zero_stage) != (run.topology, run.zero_stage)
    if is_other_grid or stored.micro_batch not in (None, batch.micro_batch):
        sizes = "" if stored.micro_batch is None else f", micro-batch {stored.micro_batch} x {stored.accumulation}"
        yield (
            f"the grid was {stored.grid} (ZeRO {stored.zero_stage}{sizes}), is {run.topology} (ZeRO {run.zero_stage}, "
            f"micro-batch {batch.micro_batch} x {batch.accumulation})"
        )


def state_notes(manifest: Manifest, run: ResolvedRun, shape: ModelConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what becomes of moments, of the average of the weights, and of the way in which documents begin."""
    rules, decay = run.config.train.parameter_groups, run.config.train.ema_decay
    frozen = frozen_parameters(shape, rules) if rules else frozenset()
    if trains := sorted(manifest.frozen - frozen):
        yield (
            f"{_some(trains)} were frozen and train now: their moments begin at zero, with the bias correction of step "
            f"{manifest.step:,}, so that their first updates are larger or smaller than later ones"
        )
    if stops := sorted(frozen - manifest.frozen):
        yield f"{_some(stops)} trained and are frozen now: their moments are dropped"
    if decay is not None and not manifest.has_ema:
        yield f"the checkpoint has no average of the weights: that of train.ema_decay={decay:g} begins with them"
    elif decay is None and manifest.has_ema:
        yield "the checkpoint's average of the weights is dropped, for train.ema_decay is not set"
    yield from begin_notes(manifest, tokenizer)


def begin_notes(manifest: Manifest, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a line if documents begin otherwise than those that the checkpoint was trained on."""
    if manifest.bos_id != tokenizer.bos_id:
        # Another tokenizer can be allowed, which need not have that token.
        before = "their text" if manifest.bos_id is None else f"the token {manifest.bos_id}"
        now = "their text" if tokenizer.bos_id is None else f"{tokenizer.bos_token} (id {tokenizer.bos_id})"
        yield f"documents begin with {now}, those of the checkpoint with {before}: it learns that anew"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} parameters ({names[0]}{', ...' if len(names) > 1 else ''})"


def _same_rates(segments: Sequence[ScheduleSegment]) -> bool:
    """Return whether the last segment just continues the one before it, such as a constant rate for more steps."""
    before, last = (segment.schedule for segment in segments[-2:])
    continues = last.kind in ENDLESS or (last.kind != "wsd" and last.decay_end_step is not None)
    return continues and replace(last, steps=before.steps, decay_steps=before.decay_steps) == before


def _of_order(segments: Sequence[DataSegment]) -> list[DataSegment]:
    """Return the segments of the current order."""
    first = max((index for index, segment in enumerate(segments) if segment.begins != "on"), default=0)
    return list(segments[first:])


def _may_grow(name: str, then: Manifest, now: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a setting may differ: rotary positions have no table, so the sequence length may change."""
    kinds = (now["model"].get("position_embedding_type"), then.model.get("position_embedding_type"))
    return name == "max_position_embeddings" and "learned_absolute" not in kinds
