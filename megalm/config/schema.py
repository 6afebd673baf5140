"""The run configuration: every key of a preset, a YAML file or `key=value`, with its default.

What the DeepSpeed JSON owns (batch sizes, precision, optimizer, clipping, ZeRO) is not here and is refused
here: see deepspeed/json_reader.py. Names carry their units. The models are frozen: what is derived from them is
computed where it is needed, never written back.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# What all sections of the run configuration share: their base, and numbers with bounds.

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


# What a document says of the run that a recipe follows: it is judged and told of, and changes no run.

Quantity = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# In rising order, however they were written.
Ends = Annotated[tuple[Quantity, Quantity], AfterValidator(lambda ends: (min(ends), max(ends)))]

ClaimKind = Literal[
    "parameters",
    "embedding_parameters",
    "tokens",
    "tokens_per_step",
    "data_tokens",
    "samples",
    "epochs",
    "tokens_per_second",
    "step_seconds",
    "hours",
    "mfu",
    "weights_gb",
    "gradients_gb",
    "optimizer_gb",
    "activations_gb",
    "training_loss",
    "validation_loss",
    "perplexity",
]


class Claim(Section):
    """A number of a document, or the two ends of a range; of a loss the step, none: the last one."""

    claim: ClaimKind
    value: Quantity | Ends
    step: NonNegativeInt | None = None
    stride: PositiveInt | None = None


class DocumentedSection(Section):
    """What a document says of the run that a recipe follows: judged by `megalm plan`, told of; it changes no run."""

    device: str | None = Field(default=None, description="as in megalm/cost_model/gpu_specs.py")
    devices: PositiveInt | None = None
    device_memory_gib: PositiveFloat | None = None
    claims: tuple[Claim, ...] = Field(
        default=(), description="a list of {claim, value}, a loss with its step, a number of samples with its stride"
    )


ModelStyle = Literal["gpt2", "llama"]
ScheduleKind = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]


class RunSection(Section):
    name: str | None = Field(
        default=None, description="folder under run.root; unnamed runs take the next free PRESET-001"
    )
    root: str = Field(default="runs", description="where run folders and the default MLflow store live")


class ModelSection(Section):
    """Field names as in Hugging Face configurations."""

    style: ModelStyle = "llama"
    vocab_size: PositiveInt | None = Field(default=None, description="taken from the tokenizer when not stated")
    vocab_multiple: PositiveInt | None = Field(
        default=None, description="pad the tokenizer's vocabulary to a multiple of this; the ids added are never drawn"
    )
    hidden_size: PositiveInt = 256
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt | None = Field(
        default=None, description="fewer than heads: grouped-query attention"
    )
    head_dim: PositiveInt | None = Field(default=None, description="default hidden_size / num_attention_heads")
    intermediate_size: PositiveInt | None = Field(
        default=None, description="default 4 x hidden (gpt2), 8/3 x hidden rounded up to 64 (llama)"
    )
    max_position_embeddings: PositiveInt | None = Field(default=None, description="default data.sequence_length")
    tie_word_embeddings: bool | None = Field(default=None, description="default true for gpt2, false for llama")
    rope_theta: PositiveFloat = 10_000.0
    norm_epsilon: PositiveFloat = 1e-5
    qk_norm: bool = Field(default=False, description="RMS norm on queries and keys, one gain per head dimension")
    dropout: Probability = Field(default=0.0, description="embeddings and residual branches")
    attention_dropout: Probability = 0.0
    initializer_range: PositiveFloat = 0.02


class BlendPart(Section):
    """A dataset of a mixture; its share is its weight among those of the others, 0 leaves it out."""

    prefix: str
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataStage(Section):
    """Training data from this step on."""

    from_step: PositiveInt
    blend: tuple[BlendPart, ...]


class DataSection(Section):
    train: str | tuple[BlendPart, ...] | None = Field(
        default=None, description="dataset prefix: PREFIX.bin and PREFIX.idx; or a list of {prefix, weight}"
    )
    stages: tuple[DataStage, ...] = Field(
        default=(), description="other mixtures from later steps on: a list of {from_step, blend}"
    )
    validation: str | dict[str, str] | None = Field(
        default=None,
        description="dataset prefix, or a mapping of names to prefixes; or cut it from data.train with data.split",
    )
    allow_validation_on_training: bool = Field(
        default=False, description="let data.validation name a dataset that the run trains on, or a copy of one"
    )
    split: str | None = Field(default=None, description="TRAIN,VALIDATION weights by document, e.g. 95,5")
    tokenizer: str | None = Field(
        default=None, description="SentencePiece .model, Hugging Face tokenizer.json, or 'bytes'"
    )
    recipe: Literal["python-stdlib"] | None = Field(
        default=None, description="prepare this corpus on the machine when data.train is not stated"
    )
    recipe_vocab_size: PositiveInt = 8192
    cache: str | None = Field(
        default=None,
        description="where recipes and orders of samples are kept; default MEGALM_CACHE or ~/.cache/megalm",
    )
    input: str | tuple[str, ...] | None = Field(
        default=None, description="files, folders, globs that data.train is built of; data.rebuild builds it of them"
    )
    append_eod: bool | None = Field(
        default=None, description="whether documents must end with the end-of-document token; null: as they are"
    )
    rebuild: Literal["never", "auto", "always"] = Field(
        default="never", description="build datasets again: where they differ from what the run states, or always"
    )
    sequence_length: PositiveInt = 256
    stride: PositiveInt | None = Field(
        default=None, description="tokens from one sample to the next; default data.sequence_length, less overlaps"
    )
    order: Literal["prefix_stable", "megatron"] = "prefix_stable"
    document_mask: bool = Field(default=False, description="keep documents in one sample from attending to each other")
    max_epochs: PositiveFloat | None = Field(
        default=None, description="refuse a run that would see the tokens of a dataset more often"
    )

    @property
    def blends(self) -> tuple[DataStage, ...]:
        """data.train and data.stages alike: what is mixed from which step on; empty before a recipe is prepared."""
        if self.train is None:
            return ()
        first = (BlendPart(prefix=self.train, weight=1.0),) if isinstance(self.train, str) else self.train
        return DataStage(from_step=1, blend=first), *self.stages

    @property
    def validation_sets(self) -> dict[str, str]:
        """Name -> prefix of data.validation; one that has no name is "validation"."""
        if isinstance(self.validation, str):
            return {"validation": self.validation}
        return dict(self.validation or {})


class ScheduleSection(Section):
    kind: ScheduleKind = "cosine"
    peak_learning_rate: PositiveFloat = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] | None = Field(default=None, description="default peak / 10")
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = Field(
        default=None, description="wsd: length of the final decay; default steps / 5"
    )


class TrainSection(Section):
    steps: PositiveInt = 400
    seed: NonNegativeInt = 1234
    log_interval_steps: PositiveInt = 1
    checkpoint_activations_every: NonNegativeInt = Field(
        default=0, description="recompute every n-th block in the backward pass; 0: none, 1: every block"
    )
    rehearse: bool = Field(
        default=True, description="before step 1 one step, validation batch, sample and checkpoint write, then undone"
    )
    max_wall_time: str | None = Field(
        default=None, description="save and leave with code 75 before so much time has passed, e.g. 4h or 1h30m"
    )
    hang_timeout_seconds: PositiveFloat | None = Field(
        default=1800.0, description="without progress for so long, write every rank's stack and fail; null: wait"
    )
    loss_chunk_tokens: PositiveInt = Field(
        default=1024, description="the vocabulary's logits are held for so many tokens at once"
    )
    embedding_weight_decay: bool = Field(
        default=True, description="matrices decay, norms and biases never; embeddings: this"
    )


class ParallelSection(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    sequence: bool = False
    balance: Literal["parameters", "time"] = Field(
        default="parameters",
        description="pipeline stages get equal parameters, or equal seconds, measured at the start",
    )


class EvaluateSection(Section):
    interval_steps: PositiveInt | None = Field(default=100, description="null: only at the end")
    max_samples: PositiveInt | None = Field(
        default=None, description="validate on so many samples of each set while training; all at the end"
    )

    patience: PositiveInt | None = Field(
        default=None, description="stop after so many validations in a row without a new lowest loss"
    )


class SampleSection(Section):
    interval_steps: PositiveInt | None = Field(default=None, description="null: only at the end")
    prompts: tuple[str, ...] = ()
    max_new_tokens: PositiveInt = 100
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_k: PositiveInt | None = 50


class CheckpointSection(Section):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    interval_steps: PositiveInt | None = Field(default=None, description="null: only at the end")
    best: bool = Field(default=False, description="save at each new lowest validation loss; checkpoints/best names it")
    keep_last: PositiveInt | None = Field(
        default=None, description="keep so many good checkpoints, and the best; null: all"
    )
    keep_every_steps: PositiveInt | None = Field(
        default=None, description="with keep_last: keep for good what is saved at a multiple of this"
    )
    asynchronous: bool = Field(
        default=False, alias="async", description="copy the state at the step, write it behind training"
    )


class GuardSection(Section):
    """Loss and gradient norm of every step are judged before its update; what is not finite is never applied."""

    policy: Literal["off", "stop", "skip", "rollback"] = Field(
        default="skip",
        description="a spike: let it pass, stop, leave the update out, or go back to a checkpoint and past its data",
    )
    window: PositiveInt = Field(default=128, description="steps that a new one is compared with")
    warmup_steps: PositiveInt = Field(default=50, description="no finite number is judged before so many steps")
    loss_sigmas: PositiveFloat = Field(default=8.0, description="a spike is so many deviations above the median, and")
    loss_rise: PositiveFloat = Field(default=0.5, description="so many nats")
    norm_sigmas: PositiveFloat = Field(default=8.0, description="the same for the logarithm of the gradient norm, and")
    norm_factor: Annotated[float, Field(gt=1)] = Field(default=8.0, description="so many times its median")
    max_skips_in_a_row: PositiveInt = Field(default=5, description="skip: one more and the run stops")
    max_rollbacks: PositiveInt = Field(default=3, description="rollback: one more and the run stops")
    stop_above: PositiveFloat | None = Field(
        default=None, description="stop where the median loss is above this after guard.after_step"
    )
    after_step: PositiveInt | None = None


class ResumeSection(Section):
    """For --resume alone: what may be another than it was."""

    allow: tuple[Literal["dataset", "tokenizer", "order", "model"], ...] = Field(
        default=(), description="things that may differ from the checkpoint's"
    )


class TrackingSection(Section):
    mlflow: bool = True
    experiment: str = "megalm"


class RunConfig(Section):
    """Everything that a run is, beside its DeepSpeed JSON."""

    preset: str | None = Field(default=None, description="the preset that this file starts from")
    deepspeed_config: str | None = Field(default=None, description="the DeepSpeed JSON that a recipe preset belongs to")
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    evaluate: EvaluateSection = EvaluateSection()
    sample: SampleSection = SampleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    resume: ResumeSection = ResumeSection()
    tracking: TrackingSection = TrackingSection()
    compile: bool = False
    documented: DocumentedSection = DocumentedSection()
