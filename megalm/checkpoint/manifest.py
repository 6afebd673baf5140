"""A checkpoint's manifest: its schema, reading, writing, and checks of the files that it lists. JSON only, no torch.

The manifest is written last and makes the checkpoint complete. It is sealed with a SHA-256 of its own content, so a
flipped bit in the step or in the data position is detected like one in a tensor. Paths in a manifest are not trusted.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from megalm.checkpoint.shard_spec import FragmentKind
from megalm.config.schema import ScheduleKind, StepConvention, WarmupKind
from megalm.errors import CheckpointError, ConfigError
from megalm.model.model_config import EXPERT_BIAS, ModelConfig, completed_settings
from megalm.topology import Topology
from megalm.utils.atomic_files import write_durably

FORMAT = 2
MANIFEST = "manifest.json"

Status = Literal["good", "suspect", "bad"]

STEP_FOLDER = re.compile(r"step-(\d{8,18})", re.ASCII)

_SEAL = "seal"
HASH_BLOCK_BYTES = 1 << 24
_SHAPE = TypeAdapter(ModelConfig)
_TRAINING_STATE = (
    *("tokens", "stale_evaluations", "counters", "data_position", "schedule", "model", "data", "fingerprints"),
)

# A plain name in the checkpoint's own folder: no separator, no "..", not hidden.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
_LARGEST = 2**62  # sums with it still fit into 64 bits
Count = Annotated[int, Field(strict=True, ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=_LARGEST)]
Loss = Annotated[float, Field(strict=True)]
Rate = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]

# A segment starts a new sample order, continues the order of the previous segment, or reads the rest of that segment's
# epoch, cut into samples of another length.
Beginning = Literal["anew", "on", "recut"]


class _Part(BaseModel):
    """Base of a manifest's parts; allows the keys of newer versions."""

    model_config = ConfigDict(frozen=True, extra="allow")


class StoredFile(_Part):
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredFragment(_Part):
    """Where a fragment of a parameter is stored; the other fields are those of a `FragmentKey`."""

    file: FileName
    kind: FragmentKind
    start: Count
    stop: Count
    rectangle: tuple[tuple[Count, Count], ...] | None = None


class StoredTensor(_Part):
    shape: tuple[Count, ...]
    fragments: tuple[StoredFragment, ...]

    @property
    def kinds(self) -> tuple[FragmentKind, ...]:
        """The kinds of state that are stored, the master first."""
        stored = {fragment.kind for fragment in self.fragments}
        return tuple(kind for kind in get_args(FragmentKind) if kind in stored)

    @model_validator(mode="after")
    def _fragments_fit(self) -> StoredTensor:
        stored: Counter[str] = Counter()
        for fragment in self.fragments:
            sides = fragment.rectangle or tuple((0, size) for size in self.shape)
            fits = len(sides) == len(self.shape) and all(
                first < last <= size for (first, last), size in zip(sides, self.shape, strict=True)
            )
            if not fits or not fragment.start <= fragment.stop <= math.prod(last - first for first, last in sides):
                raise ValueError("a fragment lies outside the shape")
            stored[fragment.kind] += fragment.stop - fragment.start
        for kind, values in stored.items():
            if values != math.prod(self.shape):
                raise ValueError(f"the fragments of {kind} have {values} of {math.prod(self.shape)} values")
        return self


class DataSegment(_Part):
    """A segment of training on one sample order with one batch size.

    Attributes:
        order: fingerprint of the sample order that the sample numbers refer to.
        sequence_length: tokens per sample.
        global_batch: samples per step.
        first_sample: number of the segment's first sample; absent in older checkpoints, which have a single segment.
        samples_consumed: samples trained on, from `first_sample` on.
        samples_skipped: samples skipped after those, because of a spike or on request.
        begins: how it follows the previous segment.
    """

    order: str
    sequence_length: Positive
    global_batch: Positive
    first_sample: Count = 0
    samples_consumed: Count
    samples_skipped: Count = 0
    begins: Beginning = "anew"

    @property
    def next_sample(self) -> int:
        return self.first_sample + self.samples_consumed + self.samples_skipped


class DataPosition(_Part):
    """The segments so far; the last one is current."""

    segments: tuple[DataSegment, ...] = ()

    @model_validator(mode="after")
    def _begins_an_order(self) -> DataPosition:
        if self.segments and self.segments[0].begins != "anew":
            raise ValueError("the first segment does not begin an order of samples")
        return self

    @property
    def steps(self) -> int:
        return sum(segment.samples_consumed // segment.global_batch for segment in self.segments)


class StoredScheduleFacts(_Part):
    """The fields of a `ScheduleFacts`."""

    kind: ScheduleKind
    peak_learning_rate: Rate
    final_learning_rate: Rate
    warmup_steps: Count
    decay_steps: Count
    steps: Positive


class StoredScheduleSegment(StoredScheduleFacts):
    """The fields of a `ScheduleSegment` and of its `ScheduleFacts`, flat."""

    first_step: Positive
    offset_steps: Count = 0
    warmup_kind: WarmupKind = "linear"
    initial_learning_rate: Rate = 0.0
    decay_end_step: int | None = None
    step_convention: StepConvention = "standard"


def _as_given(value: dict[str, Any]) -> dict[str, Any]:
    StoredScheduleFacts.model_validate(value)
    return value


class StoredSchedule(_Part):
    """Attributes: stated: the schedules configured while the segments were created, as JSON."""

    stated: tuple[Annotated[dict[str, Any], AfterValidator(_as_given)], ...] = ()
    segments: tuple[StoredScheduleSegment, ...] = ()

    @model_validator(mode="after")
    def _each_step_has_a_rate(self) -> StoredSchedule:
        first = [segment.first_step for segment in self.segments]
        if first and (first[0] != 1 or first != sorted(first)):
            raise ValueError(f"the segments begin at steps {', '.join(map(str, first))}")
        if any(segment.offset_steps >= segment.first_step for segment in self.segments):
            raise ValueError("a segment has more steps before it than the run")
        return self


class StoredTopology(_Part):
    """The grid that saved the checkpoint.

    Attributes:
        micro_batch, accumulation: of its step, in sequences and micro-batches; older checkpoints lack them.
    """

    world_size: Positive
    data: Positive
    context: Positive = 1
    expert: Positive = 1
    tensor: Positive
    pipeline: Positive
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    precision: str
    micro_batch: Positive | None = None
    accumulation: Positive | None = None

    @property
    def grid(self) -> Topology:
        return Topology(**{field.name: getattr(self, field.name, 1) for field in fields(Topology)})

    @model_validator(mode="after")
    def _is_a_grid(self) -> StoredTopology:
        try:
            assert self.grid
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class StoredLossScaler(_Part):
    """The state of a dynamic loss scaler; all None without one."""

    cur_scale: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None
    cur_iter: int | None = None
    last_overflow_iter: int | None = None
    cur_hysteresis: int | None = None


class StoredCounters(_Part):
    """The engine's counters."""

    optimizer_step: Count
    skipped_steps: Count
    loss_scaler: StoredLossScaler


def _checked_counters(value: dict[str, Any]) -> dict[str, Any]:
    if value:  # weights alone have none
        StoredCounters.model_validate(value)
    return value


def _lowest(name: str, size: float) -> int:
    return 1 if isinstance(size, int) and name != "num_shared_experts" else 0


def _completed_model(value: Any) -> Any:
    return completed_settings(value) if isinstance(value, Mapping) else value


def _checked_model(value: dict[str, Any]) -> dict[str, Any]:
    if not ModelConfig.__dataclass_fields__.keys() - value.keys():
        for name, size in vars(_SHAPE.validate_python(value)).items():
            if not isinstance(size, (bool, int, float)):
                continue
            is_typed = type(value[name]) in ((float, int) if isinstance(size, float) else (type(size),))
            if not is_typed or not (isinstance(size, bool) or _lowest(name, size) <= size <= _LARGEST):
                raise ValueError(f"{name} is {value[name]!r}")
    return value


class Fingerprints(_Part):
    """Fingerprints of what the run has trained on so far."""

    order: str | None = None
    dataset: str | None = None
    tokenizer: str | None = None


class Manifest(_Part):
    """A checkpoint's metadata. Fields that older versions or weights-only checkpoints lack have defaults.

    Attributes:
        holds: `weights` for an imported model or an average; `weights_and_moments` for another toolkit's checkpoint;
            None for the complete state of a run.
        averaged_from: RUN/step-N of each checkpoint that an average is of.
        validation_loss, validation_tokens: of this step, on the subset of the validation sets used while training;
            `whole_...`: on the complete sets.
        validation: fingerprint of the validation sets.
        counters: the engine's; `model`: the numbers of a ModelConfig, see `shape_of`; `data`: settings by name.
        tokenizer: its path at the time of the save; eod_id: the token that ends a document; bos_id: that which
            begins one, None: there is none.
    """

    status: Status = "good"
    status_reason: str | None = None
    step: Count
    holds: Literal["weights", "weights_and_moments"] | None = None
    imported_from: str | None = None
    averaged_from: tuple[str, ...] = ()
    tokens: Count | None = None
    created: str | int | float | None = None
    run: str | None = None
    parameters: Count | None = None
    validation_loss: Loss | None = None
    validation_tokens: Count | None = None
    best_validation_loss: Loss | None = None
    stale_evaluations: Count = 0
    validation: str | None = None
    counters: Annotated[dict[str, Any], AfterValidator(_checked_counters)] = {}
    rollbacks: Count = 0
    data_position: DataPosition = DataPosition()
    schedule: StoredSchedule = StoredSchedule()
    topology: StoredTopology | None = None
    model: Annotated[dict[str, Any], BeforeValidator(_completed_model), AfterValidator(_checked_model)] = {}
    data: dict[str, Any] = {}
    fingerprints: Fingerprints = Fingerprints()
    tokenizer: str | None = None
    eod_id: Count | None = None
    bos_id: Count | None = None
    attempt: Count = 1
    files: dict[FileName, StoredFile]
    tensors: dict[str, StoredTensor]
    whole_validation_loss: Loss | None = None
    whole_validation_tokens: Count | None = None

    _content: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _parts_agree(self) -> Manifest:
        if self.counters.get("optimizer_step", 0) > self.step or self.data_position.steps > self.step:
            raise ValueError(f"counters or data_position have more steps than step {self.step}")
        if self.model.keys() == ModelConfig.__dataclass_fields__.keys():
            shape = _SHAPE.validate_python(self.model)
            if shape.num_hidden_layers > len(self.tensors):  # too many, perhaps, to list their tensors
                raise ValueError(f"{len(self.tensors)} tensors are too few for num_hidden_layers")
            expected = shape.parameters() | shape.expert_biases()
            found = {name: tensor.shape for name, tensor in self.tensors.items()}
            for name in [*expected, *found]:
                if expected.get(name) != found.get(name):
                    raise ValueError(f"tensors.{name} has shape {found.get(name)}, the model {expected.get(name)}")
        stored: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            for fragment in tensor.fragments:
                if fragment.file not in self.files:
                    raise ValueError(f"{fragment.kind}/{name} is in {fragment.file}, which is not in files")
                stored[fragment.file] += 4 * (fragment.stop - fragment.start)
        for file, size in stored.items():
            if size > self.files[file].bytes:
                raise ValueError(f"files.{file} has {self.files[file].bytes} bytes, its tensors {size}")
        return self

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Raises: ValidationError: a key has an invalid value, or a required key is missing."""
        manifest = cls.model_validate(content)
        manifest._content = dict(content)
        return manifest

    @property
    def content(self) -> Mapping[str, Any]:
        """The JSON that it was read from: keys in their order, including unknown ones, without defaults."""
        return self._content

    @property
    def has_ema(self) -> bool:
        """Whether it has a moving average of the weights."""
        return any("ema" in tensor.kinds for tensor in self.tensors.values())

    @property
    def parameter_tensors(self) -> dict[str, StoredTensor]:
        """Without the biases of experts, which are no parameters."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith(EXPERT_BIAS)}

    @cached_property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that did not train: of them the complete state of a run has the weights alone."""
        if self.holds is not None:
            return frozenset()
        return frozenset(name for name, tensor in self.parameter_tensors.items() if tensor.kinds == ("master",))

    def amended(self, **changes: Any) -> Manifest:
        """Return a copy with some keys changed (JSON values); new keys come last."""
        return Manifest.from_json({**self._content, **changes})

    @property
    def created_at(self) -> float | None:
        """Unix seconds; None if the manifest has no time, or one that cannot be read."""
        try:
            if isinstance(self.created, str):
                return datetime.datetime.fromisoformat(self.created).timestamp()
            return None if self.created is None or not math.isfinite(self.created) else float(self.created)
        except (ValueError, OverflowError):
            return None

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def mark(self) -> str:
        """`marked bad (REASON)`, or suspect; "" for a good one."""
        if self.status == "good":
            return ""
        return f"marked {self.status}{f' ({self.status_reason})' if self.status_reason else ''}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Seal `manifest` and write it to `folder`, atomically and durably."""
    given = {name: value for name, value in manifest.content.items() if name != _SEAL}
    # The round trip gives the values as a reader sees them.
    content = json.loads(json.dumps({"format": FORMAT, "status": "good", "status_reason": None, **given}))
    # One line per key: compact for the fragments of thousands of ranks, and the rest stays legible.
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**content, _SEAL: _seal(content)}.items()]
    write_durably(folder / MANIFEST, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder of peft that has a LoRA adapter, and not the model that it changes.

    Raises:
        CheckpointError: it is one.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} has a LoRA adapter (adapter_config.json), not a whole model; merge it into its model "
            "(peft: merge_and_unload), save that and take its folder (docs/after-training.md)"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing, not JSON, of another format, or does not match its seal.
    """
    path = folder / MANIFEST
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        refuse_adapter(folder)
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {advice(folder)}") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} is not a JSON object; {advice(folder)}")
    if stored.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {stored.get('format')}, this version of megalm reads {FORMAT}; use the "
            "version that wrote it, or another checkpoint"
        )
    content = {name: value for name, value in stored.items() if name != _SEAL}
    expected, found = stored.get(_SEAL), _seal(content)
    if expected != found:
        raise CheckpointError(
            f"{path} is altered: its SHA-256 is {found[:16]}..., its seal {str(expected)[:16]}...; {advice(folder)}"
        )
    try:
        manifest = Manifest.from_json(content)
    except (ValidationError, RecursionError) as error:
        problem = _first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{path}: {problem}; {advice(folder)}") from None
    step = STEP_FOLDER.fullmatch(folder.name)
    if step is not None and manifest.step != int(step[1]):
        raise CheckpointError(f"{path} is of step {manifest.step}, not of its folder's; {advice(folder)}")
    return manifest


def set_status(folder: Path, status: Status, reason: str | None) -> None:
    """Set a checkpoint's status and reason, atomically.

    Raises:
        CheckpointError: its manifest cannot be read.
    """
    write_manifest(folder, read_manifest(folder).amended(status=status, status_reason=reason))


def require_training_state(folder: Path, manifest: Manifest) -> None:
    """Raises: CheckpointError: it lacks state needed to resume, or its model or position is of a newer version."""
    content, schedule = manifest.content, manifest.schedule
    lacking = [name for name in _TRAINING_STATE if content.get(name) in (None, {})]
    lacking += [] if manifest.data_position.segments else ["data_position.segments"]
    lacking += [] if schedule.segments else ["schedule.segments"]
    if lacking:
        raise CheckpointError(f"{folder / MANIFEST} lacks {lacking[0]}, so no run can resume from it; {advice(folder)}")
    for segment in manifest.data_position.segments:
        _refuse_unknown(folder, "data_position.segments", segment.model_extra or {})
    shape_of(folder, manifest)


def shape_of(folder: Path, manifest: Manifest) -> ModelConfig:
    """Return the model's dimensions.

    Raises:
        CheckpointError: one is missing, unknown to this version, or invalid.
    """
    _refuse_unknown(folder, "model", manifest.model.keys() - ModelConfig.__dataclass_fields__.keys())
    try:
        return _SHAPE.validate_python(manifest.model)
    except ValidationError as error:
        raise CheckpointError(f"{folder / MANIFEST}: model.{_first_problem(error)}; {advice(folder)}") from None


def wrong_file(folder: Path, manifest: Manifest) -> str:
    """Return a message about the first file that is missing or of the wrong size; '' if there is none."""
    for name, stored in manifest.files.items():
        file = folder / name
        if file.is_symlink():
            return f"{file} is a link to {os.readlink(file)}, but must be a file; {advice(folder)}"
        if not file.is_file():
            return f"{file} is missing; {advice(folder)}"
        if file.stat().st_size != stored.bytes:
            found = file.stat().st_size
            return f"{file} has {found} bytes, the manifest says {stored.bytes}; {advice(folder)}"
    return ""


def damaged_file(
    folder: Path, manifest: Manifest, part: int = 0, parts: int = 1, on_progress: Callable[[], None] = lambda: None
) -> str:
    """Check every `parts`-th file from `part` against its SHA-256; return the first mismatch in words, or ''.

    Args:
        on_progress: called after each `HASH_BLOCK_BYTES` read, and after the rest of a file.
    """
    for name in sorted(manifest.files)[part::parts]:
        try:
            found = file_sha256(folder / name, on_progress)
        except OSError as error:
            return f"{folder / name} cannot be read ({error}); {advice(folder)}"
        expected = manifest.files[name].sha256
        if found != expected:
            return (
                f"{folder / name}: SHA-256 is {found[:16]}..., the manifest says {expected[:16]}...; {advice(folder)}"
            )
    return ""


def hashed_blocks(manifest: Manifest, part: int = 0, parts: int = 1) -> int:
    """Return how often `damaged_file` calls `on_progress` when nothing is damaged."""
    names = sorted(manifest.files)[part::parts]
    return sum(-(-manifest.files[name].bytes // HASH_BLOCK_BYTES) for name in names)


def file_sha256(path: Path, on_progress: Callable[[], None] = lambda: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            on_progress()
    return digest.hexdigest()


def advice(folder: Path) -> str:
    return f"choose an earlier checkpoint with --resume (megalm checkpoint list {folder.parent.parent} shows them)"


def without_advice(problem: str, folder: Path) -> str:
    """Return the problem without the advice, for when an earlier checkpoint has already been chosen."""
    return problem.removesuffix(f"; {advice(folder)}")


def _refuse_unknown(folder: Path, part: str, keys: Iterable[str]) -> None:
    for key in keys:
        raise CheckpointError(
            f"{folder / MANIFEST}: this version of megalm does not know {part}.{key}; use the version that wrote it"
        )


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return ": ".join(filter(None, [place, first["msg"].removeprefix("Value error, ")]))


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
