"""The run configuration: every key of a preset, a YAML file or `key=value`, with its default.

Batch sizes, precision, optimizer, clipping and ZeRO belong to the DeepSpeed JSON (deepspeed/json_reader.py), and are
errors here. Names carry their units. The models are frozen: derived values are computed where they are needed.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megalm.rank_environment import expand_job_fields
from megalm.topology import PipelineScheduleName

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
# A file, a folder or a prefix; `~` is the home folder.
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
# Slurm's fields in it, such as %a, are a job's own values.
JobText = Annotated[str, AfterValidator(lambda text: expand_job_fields(text) if "%" in text else text)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]


Default = TypeVar("Default")


def key(default: Default, description: str) -> Default:
    """A key with its default and its description."""
    made: Default = Field(default=default, description=description)
    return made


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot change after loading.

    Attributes:
        hint: ends the message about a value that is no section.
        is_value: a mapping that is given, inherited and replaced as a whole, or is null.
    """

    hint: ClassVar[str] = ""
    is_value: ClassVar[bool] = False
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


Quantity = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Of a range, in either order.
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
    """A number of a document, or the two ends of a range; a loss has its step, null: the last one."""

    claim: ClaimKind
    value: Quantity | Ends
    step: NonNegativeInt | None = None
    stride: PositiveInt | None = None


class DocumentedSection(Section):
    """The claims of the document that a recipe follows. `megalm plan` judges them; they change no run."""

    device: str | None = key(None, "a name of megalm/cost_model/gpu_specs.py")
    devices: PositiveInt | None = None
    device_memory_gib: PositiveFloat | None = None
    claims: tuple[Claim, ...] = key((), "a list of {claim, value}; a loss has its step, a number of samples its stride")


ModelStyle = Literal["gpt2", "llama"]
NormKind = Literal["layer_norm", "rms_norm"]
NormPlacement = Literal["pre", "post", "both"]
PositionKind = Literal["learned_absolute", "rope", "none"]
Activation = Literal["gelu", "gelu_pytorch_tanh", "silu", "relu2"]
Recompute = Literal["none", "norms", "attention", "mlp", "full"]
RouterScores = Literal["softmax", "sigmoid"]
ContextMethod = Literal["all_to_all", "ring"]
ScheduleKind = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]
WarmupKind = Literal["linear", "log"]
StepConvention = Literal["standard", "deepspeed"]
OptimizerStateKind = Literal["fp32", "bf16", "8bit"]


class RunSection(Section):
    name: JobText | None = key(
        None, "folder under run.root; null: the next free PRESET-001; %a: index in a Slurm array, %x: job's name"
    )
    root: UserPath = key("runs", "folder of the run folders and of the default MLflow store")


class RopeScaling(Section):
    """Rotary frequencies for sequences longer than those of the first training; key names of transformers."""

    is_value: ClassVar[bool] = True
    rope_type: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    original_max_position_embeddings: PositiveInt | None = key(None, "llama3 and yarn need it")
    low_freq_factor: PositiveFloat = key(1.0, "of llama3")
    high_freq_factor: PositiveFloat = key(4.0, "of llama3")
    beta_fast: PositiveFloat = key(32.0, "of yarn")
    beta_slow: PositiveFloat = key(1.0, "of yarn")
    attention_factor: PositiveFloat | None = key(None, "of yarn; null: 0.1 ln(factor) + 1")
    truncate: bool = key(True, "of yarn: the ramp begins and ends at whole dimensions")


# Of each rope_type: the keys that a config.json of transformers must have, and further ones that it may have.
ROPE_SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
}

# Layers of the model, counted from 0; or a number n: every n-th layer, which are n-1, 2n-1, ...
LayerChoice = PositiveInt | tuple[NonNegativeInt, ...]


class ModelSection(Section):
    """Field names as in Hugging Face configurations; null: what `style` says."""

    style: ModelStyle = key(
        "llama",
        "gpt2: layer_norm, learned_absolute, gelu_pytorch_tanh, biases, tied; llama: rms_norm, rope, gated "
        "silu, no biases, untied",
    )
    vocab_size: PositiveInt | None = key(None, "null: the tokenizer's")
    vocab_multiple: PositiveInt | None = key(
        None, "pad the tokenizer's vocabulary to a multiple of this; the ids added are never drawn"
    )
    hidden_size: PositiveInt = 256
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt | None = key(None, "fewer than heads: grouped-query attention")
    head_dim: PositiveInt | None = key(None, "default hidden_size / num_attention_heads")
    intermediate_size: PositiveInt | None = key(None, "default 8/3 x hidden rounded up to 64 if gated, else 4 x hidden")
    max_position_embeddings: PositiveInt | None = key(None, "default the longest sequence length")
    tie_word_embeddings: bool | None = key(None, "default true for gpt2, false for llama")
    normalization: NormKind | None = None
    norm_placement: NormPlacement = key(
        "pre", "before attention and MLP, after them (before the residual sum, as OLMo 2), or both (Gemma)"
    )
    norm_epsilon: PositiveFloat = 1e-5
    norm_zero_centered: bool = key(False, "multiply by 1 + gain (Gemma); the gain starts at 0")
    qk_norm: bool | Literal["whole"] = key(
        False,
        "RMS norm on queries and keys: true, of each head, one gain per head dimension (Qwen3); whole, of "
        "all heads together (OLMo 2)",
    )
    position_embedding_type: PositionKind | None = None
    rope_theta: PositiveFloat = 10_000.0
    rope_local_theta: PositiveFloat | None = key(None, "of layers with a sliding window; null: rope_theta")
    rope_scaling: RopeScaling | None = key(
        None, "{rope_type: linear | llama3 | yarn, factor, ...}, of layers without a sliding window"
    )
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = key(
        1.0, "share of each head's dimensions that rotates, the first ones"
    )
    no_rope_layers: LayerChoice | None = key(
        None, "layers without positions: numbers from 0, or n: every n-th layer (SmolLM3: 4)"
    )
    sliding_window: PositiveInt | None = key(
        None, "a token attends to itself and the sliding_window - 1 tokens before it"
    )
    full_attention_layers: LayerChoice | None = key(
        None, "layers without the sliding window: numbers from 0, or n: every n-th (Gemma 3: 6)"
    )
    attention_scale: PositiveFloat | None = key(None, "of the scores; null: 1/sqrt(head_dim)")
    attn_logit_softcapping: PositiveFloat | None = key(None, "scores become cap x tanh(score / cap) (Gemma 2)")
    attention_sinks: bool = key(
        False, "each head has a learned score that takes a share of the softmax and has no value"
    )
    qkv_bias: bool | None = None
    attention_output_bias: bool | None = None
    mlp_bias: bool | None = None
    hidden_act: Activation | None = key(None, "gelu, its tanh form, silu (swish), or squared ReLU (relu2)")
    gated_mlp: bool | None = key(None, "down(act(gate x) * up x), else down(act(up x))")
    num_experts: Annotated[int, Field(ge=2)] | None = key(
        None, "MLPs of a layer, of which a router gives each token a few; null: one MLP"
    )
    num_experts_per_token: PositiveInt = 2
    moe_intermediate_size: PositiveInt | None = key(
        None, "of an expert; null: intermediate_size, which layers without experts have"
    )
    num_shared_experts: NonNegativeInt = key(
        0, "experts of every token, as one MLP of this multiple of moe_intermediate_size (DeepSeek)"
    )
    moe_layers: LayerChoice | None = key(None, "layers with experts: numbers from 0, or n: every n-th layer; null: all")
    num_dense_layers: NonNegativeInt = key(0, "the first layers, which have one MLP (DeepSeek)")
    router_scores: RouterScores = key(
        "softmax", "of the experts: a softmax over them, or a sigmoid of each (DeepSeek-V3)"
    )
    norm_topk_prob: bool = key(True, "the weights of a token's experts add up to 1 (Mixtral), else they are the scores")
    routed_scaling_factor: PositiveFloat = key(1.0, "multiplies the weights of a token's experts (DeepSeek)")
    expert_bias: bool = key(
        False, "a bias of each expert is added to its score when experts are chosen, and follows the load (DeepSeek-V3)"
    )
    parallel_residual: bool = key(False, "attention and MLP both read the block's input (GPT-NeoX)")
    embedding_scale: PositiveFloat | None = key(None, "multiplies token embeddings (Gemma: the root of hidden_size)")
    final_logit_softcapping: PositiveFloat | None = key(None, "logits become cap x tanh(logit / cap) (Gemma 2)")
    dropout: Probability = key(0.0, "embeddings and residual branches")
    attention_dropout: Probability = 0.0
    initializer_range: PositiveFloat = key(0.02, "standard deviation of initial matrices")
    mup_base_width: PositiveInt | None = key(
        None,
        "maximal-update parametrisation: the hidden_size at which learning rate and initializer_range were "
        "chosen; with m = hidden_size / mup_base_width matrices of the blocks start at 1/sqrt(m) and learn at 1/m, "
        "logits are divided by m, scores by head_dim; null: none",
    )


class BlendPart(Section):
    """A dataset of a mixture; its share is its weight divided by the sum of all weights. 0 leaves it out."""

    prefix: UserPath
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataStage(Section):
    """What training reads from a step on: another mixture, samples cut to another length, or both."""

    from_step: PositiveInt
    blend: tuple[BlendPart, ...] = ()
    sequence_length: PositiveInt | None = None


class DataSection(Section):
    train: UserPath | tuple[BlendPart, ...] | None = key(
        None, "dataset prefix: PREFIX.bin and PREFIX.idx; or a list of {prefix, weight}"
    )
    stages: tuple[DataStage, ...] = key(
        (), "other mixtures or sequence lengths from later steps on: a list of {from_step, blend, sequence_length}"
    )
    validation: UserPath | dict[str, UserPath] | None = key(
        None, "dataset prefix, or a mapping of names to prefixes; data.split takes it from data.train instead"
    )
    allow_validation_on_training: bool = key(
        False, "let data.validation name a dataset that the run trains on, or a copy of one"
    )
    split: str | None = key(None, "TRAIN,VALIDATION weights by document, e.g. 95,5")
    tokenizer: UserPath | None = key(None, "SentencePiece .model, Hugging Face tokenizer.json, or 'bytes'")
    eod_token: str | None = key(
        None, "the token that ends a document, by its text; null: as the dataset records, or the tokenizer's own"
    )
    bos_token: str | None = key(
        None,
        "the token that begins a document, by its text; auto: what the tokenizer puts before a text; none; "
        "null: as the dataset records",
    )
    recipe: Literal["python-stdlib"] | None = key(None, "prepare this corpus on the machine if data.train is null")
    recipe_vocab_size: PositiveInt = 8192
    cache: UserPath | None = key(None, "folder of recipes and sample orders; default MEGALM_CACHE or ~/.cache/megalm")
    input: UserPath | tuple[UserPath, ...] | None = key(
        None, "files, folders or globs that data.rebuild builds data.train from"
    )
    append_eod: bool | None = key(None, "whether documents must end with the end-of-document token; null: either")
    rebuild: Literal["never", "auto", "always"] = key(
        "never", "rebuild datasets; auto: only if they differ from the run's configuration"
    )
    sequence_length: PositiveInt = 256
    stride: PositiveInt | None = key(
        None, "tokens between the starts of samples; default data.sequence_length, less overlaps"
    )
    order: Literal["prefix_stable", "megatron"] = "prefix_stable"
    packing: Literal["stream", "best_fit"] = key(
        "stream", "stream: samples are cut from all documents in a row; best_fit: no document that fits is cut"
    )
    document_mask: bool | None = key(
        None, "tokens attend within their own document only; null: with data.packing=best_fit"
    )
    max_epochs: PositiveFloat | None = key(None, "refuse a run that would train on a dataset for more epochs")

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Of the stages that set one, in their order."""
        return self.sequence_length, *(stage.sequence_length for stage in self.stages if stage.sequence_length)

    @property
    def sample_length(self) -> int:
        """Tokens of a sample: the longest sequence length. Stages with a shorter one cut samples into parts."""
        return max(self.sequence_lengths)

    def with_sample_length(self, length: int) -> DataSection:
        """Return the section with one sequence length."""
        stages = tuple(stage.model_copy(update={"sequence_length": None}) for stage in self.stages)
        return self.model_copy(update={"sequence_length": length, "stages": stages})

    @property
    def blends(self) -> tuple[DataStage, ...]:
        """data.train and the mixtures of data.stages as one list; empty before a recipe is prepared."""
        if self.train is None:
            return ()
        first = (BlendPart(prefix=self.train, weight=1.0),) if isinstance(self.train, str) else self.train
        return DataStage(from_step=1, blend=first), *(stage for stage in self.stages if stage.blend)

    @property
    def masks_documents(self) -> bool:
        return self.packing == "best_fit" if self.document_mask is None else self.document_mask

    @property
    def validation_sets(self) -> dict[str, str]:
        """Name -> prefix of data.validation; a single prefix is named "validation"."""
        if isinstance(self.validation, str):
            return {"validation": self.validation}
        return dict(self.validation or {})


class BatchStage(Section):
    """The sequences of each optimizer step from a step on; 0 and 1 are the first step."""

    from_step: NonNegativeInt
    sequences: PositiveInt


class ScheduleSection(Section):
    kind: ScheduleKind = "cosine"
    peak_learning_rate: PositiveFloat = 1e-3
    initial_learning_rate: NonNegativeFloat | None = key(None, "rate that the warm-up begins from; default 0")
    initial_ratio: Ratio | None = key(None, "the same as a part of the peak")
    final_learning_rate: NonNegativeFloat | None = key(None, "default peak / 10")
    final_ratio: Ratio | None = key(None, "the same as a part of the peak")
    warmup_steps: NonNegativeInt = 0
    warmup_kind: WarmupKind = key("linear", "log: steep at first, as DeepSpeed's by default")
    decay_steps: PositiveInt | None = key(None, "wsd: length of the final decay; default steps / 5")
    decay_end_step: PositiveInt | None = key(
        None, "step of the final rate, which later steps keep; default train.steps"
    )
    step_convention: StepConvention = key(
        "standard", "deepspeed: its WarmupLR, WarmupDecayLR or WarmupCosineLR, which lag by one or two steps"
    )
    batch: tuple[BatchStage, ...] = key(
        (),
        "a batch that grows, by more micro-batches: a list of {from_step, sequences}; before the first "
        "from_step the batch is train_batch_size",
    )


class BatchSection(Section):
    global_sequences: PositiveInt | None = key(
        None, "sequences of one optimizer step, where the DeepSpeed JSON states no train_batch_size"
    )


class ParameterGroup(Section):
    """The optimizer's settings for the parameters whose canonical names a pattern of fnmatch matches."""

    match: Annotated[str, Field(min_length=1)]
    learning_rate_scale: Quantity = 1.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    frozen: bool = False


class TrainSection(Section):
    """The length is one of steps, tokens and tokens_per_parameter; planning/resolve.py derives the steps."""

    steps: PositiveInt = 400
    tokens: PositiveInt | None = key(None, "train on at least this many tokens: train.steps follows from the batch")
    tokens_per_parameter: PositiveFloat | None = key(
        None, "the same as a multiple of the parameters, embeddings included: 20 is common"
    )
    seed: NonNegativeInt = 1234
    deterministic: bool = key(False, "equal results of equal runs on a GPU too, slower; a CPU's always are")
    log_interval_steps: PositiveInt = 1
    checkpoint_activations_every: NonNegativeInt = key(
        0, "recompute every n-th block in the backward pass; 0: none, 1: every block"
    )
    recompute: Recompute | Literal["auto"] = key(
        "none",
        "what every block computes again in the backward pass to save memory; full: all of it; auto: the "
        "least arithmetic that fits the memory",
    )
    optimizer_state: OptimizerStateKind = key(
        "fp32", "Adam's two moments take 8, 4 or about 2 bytes a parameter; master weights are fp32"
    )
    reduce_gradients: Literal["auto", "step", "micro_batch"] = key(
        "auto",
        "ZeRO 2 sends gradients once a step, from whole ones on each rank, or with each micro-batch; auto: "
        "once a step if that fits the memory",
    )
    rehearse: bool = key(True, "before step 1, try a step, a validation batch, a sample and a save, then undo them")
    max_wall_time: str | None = key(
        None, "save and exit with code 75 before this time has passed, e.g. 4h or 1h30m; null: Slurm's limit"
    )
    start_timeout_seconds: PositiveFloat | None = key(
        900.0, "fail if a rank has not started by then, or is silent so long before step 1; null: wait"
    )
    hang_timeout_seconds: PositiveFloat | None = key(
        1800.0, "after this time without progress, write all ranks' stacks and fail; null: wait"
    )
    check_nodes: bool = key(True, "at the start on more than one node, name bad and slow ones: a few seconds")
    slow_factor: Annotated[float, Field(gt=1)] = key(
        1.3, "a node or rank that takes this many times the median for the same work is slow"
    )
    slow_seconds: PositiveFloat | None = key(120.0, "report a rank that is slow for this long; null: watch none")
    z_loss: NonNegativeFloat = key(
        0.0,
        "coefficient of log(Z)^2, which training minimises beside the loss; usual is 1e-4. Z: the sum that "
        "the softmax divides by. Losses are shown without it",
    )
    router_aux_loss: NonNegativeFloat = key(
        1e-2, "coefficient of the loss that balances the experts' load in each sequence; losses are shown without it"
    )
    router_z_loss: NonNegativeFloat = key(
        0.0, "coefficient of log(Z)^2 of the router's logits, which keeps them small; usual is 1e-3"
    )
    expert_bias_rate: NonNegativeFloat | None = key(
        None,
        "what a step adds to the bias of each expert with less than its share of tokens, and takes from "
        "that of others (model.expert_bias); null: 1e-3, 0: biases stay",
    )
    expert_capacity_factor: PositiveFloat | None = key(
        None,
        "in training an expert takes at most this multiple of its equal share of a sequence's tokens, the "
        "first ones, and drops the others; null: it drops none",
    )
    loss_chunk_tokens: PositiveInt | None = key(
        None, "tokens whose logits are held at once; null: 1024 on a CPU, up to 8192 on a GPU, by its memory"
    )
    mlp_chunk_tokens: PositiveInt | None = key(
        None,
        "tokens of a micro-batch whose MLP is computed at once, and again in the backward pass, which then "
        "keeps its input alone; null: all, kept as train.recompute says",
    )
    offload_activations: bool = key(
        False,
        "keep the inputs of blocks that are recomputed whole in the CPU's memory: each is copied there "
        "beside the computation, and back one block ahead",
    )
    count_traffic: bool = key(False, "count bytes and calls between ranks in the first steps: event traffic")
    gc_interval_steps: PositiveInt | None = key(
        50, "collect Python's garbage on all ranks at once, not when it pleases; null: Python's way"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = key(
        None, "keep a moving average of the weights, of which each update leaves this share; null: none"
    )
    embedding_weight_decay: bool = key(
        True, "whether embeddings decay; other matrices always do, norms and biases never"
    )
    parameter_groups: tuple[ParameterGroup, ...] = key(
        (), "other optimizer settings by parameter name: a list of {match, learning_rate_scale, weight_decay, frozen}"
    )


class ProfileSection(Section):
    steps: str | PositiveInt | None = key(
        None, "profile these steps, FIRST:LAST, to profile/ of the run folder: traces, and where the time goes"
    )


class ParallelSection(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_stages: PositiveInt = key(
        1, "stages of each rank of a pipeline, of blocks that lie apart: ranks wait less and send more"
    )
    pipeline_schedule: PipelineScheduleName | None = key(
        None,
        "order of passes in a pipeline; null: 1f1b, or interleaved_1f1b with virtual stages; zb_v: two of "
        "them, and gradients of weights where ranks would wait",
    )
    context: PositiveInt = key(1, "ranks that divide each sequence, also between the layers")
    context_method: ContextMethod = key(
        "all_to_all",
        "how attention reads whole sequences: all_to_all gives each rank some heads of them; in a ring "
        "keys and values go around",
    )
    sequence: bool = False
    expert: PositiveInt = key(
        1, "ranks of data x context that divide the experts of each layer, to which tokens travel"
    )
    balance: Literal["parameters", "time"] = key(
        "parameters", "pipeline stages have equal parameters, or equal times, measured at the start"
    )
    overlap_tensor_communication: bool | Literal["auto"] = key(
        "auto",
        "a tensor group communicates one chunk of a micro-batch while it multiplies the next; auto: on a "
        "GPU with enough tokens, not on a CPU",
    )

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks with these degrees."""
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)

    @property
    def schedule_name(self) -> PipelineScheduleName:
        """The schedule of the pipeline, given or implied."""
        return self.pipeline_schedule or ("1f1b" if self.virtual_stages == 1 else "interleaved_1f1b")


class PrecisionSection(Section):
    """Beside the precision of the DeepSpeed JSON."""

    hint: ClassVar[str] = "; bf16 and fp16 belong in the DeepSpeed JSON, the file of --deepspeed_config"

    float8: bool = key(False, "multiply the blocks' linear layers in float8: bf16 on a GPU of capability 8.9 or later")


class EvaluateSection(Section):
    interval_steps: PositiveInt | None = key(100, "null: only at the end")
    max_samples: PositiveInt | None = key(
        None, "samples of each set while training; the validation at the end uses all"
    )
    ema: bool | None = key(
        None,
        "validate the average of the weights (train.ema_decay) too, by a second pass over the samples; "
        "null: where there is one",
    )
    tasks: tuple[UserPath, ...] = key(
        (), "files of multiple-choice questions: JSON lines of context, choices and answer (0, 1, ...)"
    )
    tasks_interval_steps: PositiveInt | None = key(
        None, "steps between answers to the questions of tasks; null: only at the end"
    )
    patience: PositiveInt | None = key(None, "stop after this number of validations in a row without a new lowest loss")


class SampleSection(Section):
    interval_steps: PositiveInt | None = key(None, "null: only at the end")
    prompts: tuple[str, ...] = ()
    max_new_tokens: PositiveInt = 100
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_k: PositiveInt | None = 50
    top_p: Annotated[float, Field(gt=0, le=1)] = key(
        1.0, "draw from the fewest tokens whose probabilities add up to this"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = key(
        0.0, "draw no token less likely than this times the most likely one"
    )
    repetition_penalty: PositiveFloat = key(1.0, "above 1: tokens that the text already has become less likely")


class CheckpointSection(Section):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    interval_steps: PositiveInt | None = key(None, "null: only at the end")
    best: bool = key(False, "save at each new lowest validation loss; checkpoints/best names it")
    keep_last: PositiveInt | None = key(None, "number of good checkpoints to keep, besides the best; null: all")
    keep_every_steps: PositiveInt | None = key(
        None, "with keep_last: never delete checkpoints at multiples of this step"
    )
    asynchronous: bool = Field(
        default=False, alias="async", description="copy the state at the step, and write it while training continues"
    )
    copy_to: UserPath | None = key(
        None, "copy checkpoints to NAME/ there, behind training: s3://BUCKET/FOLDER, gs:// or a mounted folder"
    )
    copy_keep_last: PositiveInt | None = key(
        None, "number of good copies to keep, besides the best and keep_every_steps; null: all"
    )
    copy_wait_seconds: NonNegativeFloat = key(600.0, "how long the end of the run waits for the last copies")


class GuardSection(Section):
    """Checks loss and gradient norm of every step before its update, and never applies one that is not finite."""

    policy: Literal["off", "stop", "skip", "rollback"] = key(
        "skip", "a spike: apply it, stop, skip the update, or go back to a checkpoint and skip the spike's data"
    )
    window: PositiveInt = key(128, "number of earlier steps that a step is compared with")
    warmup_steps: PositiveInt = key(50, "judge no finite number in the first steps")
    loss_sigmas: PositiveFloat = key(8.0, "a spike is more deviations above the median, and")
    loss_rise: PositiveFloat = key(0.5, "more nats above it")
    norm_sigmas: PositiveFloat = key(8.0, "the same for the logarithm of the gradient norm, and")
    norm_factor: Annotated[float, Field(gt=1)] = key(8.0, "more times its median")
    max_skips_in_a_row: PositiveInt = key(5, "skip: one more stops the run")
    max_rollbacks: PositiveInt = key(3, "rollback: one more stops the run")
    stop_above: PositiveFloat | None = key(None, "stop where the median loss is above this after guard.after_step")
    after_step: PositiveInt | None = None
    experts_interval_steps: PositiveInt | None = key(
        100, "report the load of a model's experts, and which are dead or overloaded; null: never"
    )


class ResumeSection(Section):
    """Only for --resume: differences from the checkpoint that are allowed."""

    allow: tuple[Literal["dataset", "tokenizer", "order", "model"], ...] = key(
        (), "these may differ from the checkpoint's"
    )


class TrackingSection(Section):
    mlflow: bool = True
    tensorboard: bool = key(False, "write event files to tensorboard/ of the run folder")
    wandb: bool = key(False, "send the run to Weights & Biases; WANDB_MODE=offline keeps it here")
    experiment: str = key("megalm", "of MLflow; the project of Weights & Biases")
    sweep: str | None = key(None, "the sweep of the run (`megalm sweep`), its parent in MLflow")
    system_metrics: bool = key(True, "sample CPU, memory, network and GPUs of every node for MLflow")


TRACKERS = ("mlflow", "tensorboard", "wandb")  # keys of `tracking`


class SlurmSection(Section):
    """Of a job of slurm/train.sh."""

    exclude_bad: bool = key(
        False, "leave nodes that train.check_nodes finds bad or slow: queue the job again for others"
    )


class RunConfig(Section):
    """The whole configuration of a run, except its DeepSpeed JSON."""

    preset: str | None = key(None, "the preset that this file starts from")
    deepspeed_config: UserPath | None = key(None, "the DeepSpeed JSON that a recipe preset belongs to")
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    profile: ProfileSection = ProfileSection()
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    evaluate: EvaluateSection = EvaluateSection()
    sample: SampleSection = SampleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    resume: ResumeSection = ResumeSection()
    tracking: TrackingSection = TrackingSection()
    slurm: SlurmSection = SlurmSection()
    compile: bool | Literal["auto"] = key(
        "auto", "torch.compile for blocks and loss; auto: on a GPU where it can, not on a CPU"
    )
    documented: DocumentedSection = DocumentedSection()

    @property
    def evaluates_ema(self) -> bool:
        """Whether validation has a second pass, with the average of the weights."""
        return self.train.ema_decay is not None and self.evaluate.ema is not False
