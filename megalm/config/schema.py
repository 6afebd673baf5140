"""The run configuration: every key of a preset, a YAML file or `key=value`, with its default.

What the DeepSpeed JSON owns (batch sizes, precision, optimizer, clipping, ZeRO) is not here and is refused
here: see deepspeed_json.py. Names carry their units. The models are frozen: what is derived from them is
computed where it is needed, never written back.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]

ModelStyle = Literal["gpt2", "llama"]
ScheduleKind = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class RunSection(Section):
    name: str | None = Field(
        default=None, description="folder under run.root; unnamed runs take the next free PRESET-001"
    )
    root: str = Field(default="runs", description="where run folders and the default MLflow store live")


class ModelSection(Section):
    """Field names as in Hugging Face configurations."""

    style: ModelStyle = "llama"
    vocab_size: PositiveInt | None = Field(default=None, description="taken from the tokenizer when not stated")
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


class DataSection(Section):
    train: str | None = Field(default=None, description="dataset prefix: PREFIX.bin and PREFIX.idx")
    validation: str | None = Field(
        default=None, description="dataset prefix; or cut it from data.train with data.split"
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
        default=None, description="where prepared recipes are kept; default MEGALM_CACHE or ~/.cache/megalm"
    )
    sequence_length: PositiveInt = 256
    order: Literal["prefix_stable", "megatron"] = "prefix_stable"
    document_mask: bool = Field(default=False, description="keep documents in one sample from attending to each other")
    max_epochs: PositiveFloat | None = Field(
        default=None, description="refuse a run that would see its data more often"
    )


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


class EvaluateSection(Section):
    interval_steps: PositiveInt | None = Field(default=100, description="null: only at the end")
    max_samples: PositiveInt | None = Field(
        default=None, description="validate on so many samples while training; all at the end"
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
    interval_steps: PositiveInt | None = Field(default=None, description="null: only at the end")
    best: bool = Field(default=False, description="save at each new lowest validation loss; checkpoints/best names it")


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
    tracking: TrackingSection = TrackingSection()
    compile: bool = False
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    keep_last: PositiveInt | None = Field(
        default=None, description="keep so many good checkpoints, and the best; null: all"
    )
    keep_every_steps: PositiveInt | None = Field(
        default=None, description="with keep_last: keep for good what is saved at a multiple of this"
    )
    asynchronous: bool = Field(
        default=False, alias="async", description="copy the state at the step, write it behind training"
    )
