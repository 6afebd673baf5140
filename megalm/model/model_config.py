"""The model's dimensions, the exact shape of every parameter and the work of a step, as integers: no torch.

Only this module turns defaults of the model section into numbers. The model is built from a `ModelConfig`, the plan
counts its parameters and memory, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from megalm.config.schema import (
    Activation,
    LayerChoice,
    ModelSection,
    ModelStyle,
    NormKind,
    NormPlacement,
    PositionKind,
    Recompute,
    RopeScaling,
    RouterScores,
)

# What a style stands for; each setting can be given beside it.
STYLES: Mapping[ModelStyle, Mapping[str, Any]] = {
    "gpt2": {
        "normalization": "layer_norm",
        "position_embedding_type": "learned_absolute",
        "hidden_act": "gelu_pytorch_tanh",
        "gated_mlp": False,
        **dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings"), True),
    },
    "llama": {
        "normalization": "rms_norm",
        "position_embedding_type": "rope",
        "hidden_act": "silu",
        "gated_mlp": True,
        **dict.fromkeys(("qkv_bias", "attention_output_bias", "mlp_bias", "tie_word_embeddings"), False),
    },
}


EXPERT_BIAS = "mlp.router.expert_bias"
_STACKED = 3  # dimensions of a parameter that holds one matrix for each expert


@dataclass(frozen=True)
class ModelConfig:
    """The model section with every default resolved.

    Attributes:
        no_rope_layers: numbers of the layers that do not rotate queries and keys.
        full_attention_layers: numbers of the layers without the sliding window.
        moe_intermediate_size: of an expert; None without experts.
        moe_layers: numbers of the layers with experts.
    """

    style: ModelStyle
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    normalization: NormKind
    norm_placement: NormPlacement
    norm_epsilon: float
    norm_zero_centered: bool
    qk_norm: bool | Literal["whole"]
    position_embedding_type: PositionKind
    rope_theta: float
    rope_local_theta: float | None
    rope_scaling: RopeScaling | None
    partial_rotary_factor: float
    no_rope_layers: tuple[int, ...]
    sliding_window: int | None
    full_attention_layers: tuple[int, ...]
    attention_scale: float | None
    attn_logit_softcapping: float | None
    attention_sinks: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    hidden_act: Activation
    gated_mlp: bool
    num_experts: int | None
    num_experts_per_token: int
    moe_intermediate_size: int | None
    num_shared_experts: int
    moe_layers: tuple[int, ...]
    router_scores: RouterScores
    norm_topk_prob: bool
    routed_scaling_factor: float
    expert_bias: bool
    parallel_residual: bool
    embedding_scale: float | None
    final_logit_softcapping: float | None
    dropout: float
    attention_dropout: float
    initializer_range: float
    mup_base_width: int | None

    @property
    def width_multiplier(self) -> float:
        """m of the maximal-update parametrisation (Yang et al., 2022, "Tensor Programs V"); 1 without it."""
        return self.hidden_size / (self.mup_base_width or self.hidden_size)

    @property
    def rotary_dim(self) -> int:
        """The leading dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    def rotates(self, layer: int) -> bool:
        return self.position_embedding_type == "rope" and layer not in self.no_rope_layers

    def window(self, layer: int) -> int | None:
        """The tokens that a token of this layer attends to, itself included; None: all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def kinds_of_layers(self) -> int:
        """The number of kinds of blocks, which compute otherwise."""
        layers = range(self.num_hidden_layers)
        return len({(self.rotates(layer), self.window(layer), layer in self.moe_layers) for layer in layers})

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter of the unsharded model, in the model's order."""
        shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (self.vocab_size, self.hidden_size)}
        if self.position_embedding_type == "learned_absolute":
            shapes["embedding.positions.weight"] = (self.max_position_embeddings, self.hidden_size)
        for layer in range(self.num_hidden_layers):
            block = self._block_parameters(layer in self.moe_layers)
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= self._norm("final_norm")
        if not self.tie_word_embeddings:
            shapes["head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def expert_biases(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of what checkpoints hold beside parameters: no optimizer changes it."""
        if not self.expert_bias or self.num_experts is None:
            return {}
        return {f"layers.{layer}.{EXPERT_BIAS}": (self.num_experts,) for layer in self.moe_layers}

    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters().values())

    def active_parameter_count(self) -> int:
        """Of what one token is computed with: all parameters but the experts that it is not sent to."""
        return sum(math.prod(self.active(shape)) for shape in self.parameters().values())

    def active(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """What a token uses of a parameter of this size: of stacked experts, its own."""
        return (self.num_experts_per_token, *size[1:]) if len(size) == _STACKED else size

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        kinds = ("weight", "bias") if self.normalization == "layer_norm" else ("weight",)
        return {f"{name}.{kind}": (self.hidden_size,) for kind in kinds}

    def _block_parameters(self, experts: bool) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim

        def linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
            return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})

        before, after = self.norm_placement != "post", self.norm_placement != "pre"
        shapes = self._norm("attention_norm") if before else {}
        if self.attention_sinks:
            shapes["attention.sinks"] = (self.num_attention_heads,)
        shapes |= linear("attention.query", queries, hidden, self.qkv_bias)
        shapes |= linear("attention.key", keys, hidden, self.qkv_bias)
        shapes |= linear("attention.value", keys, hidden, self.qkv_bias)
        shapes |= linear("attention.output", hidden, queries, self.attention_output_bias)
        if self.qk_norm:
            widths = (queries, keys) if self.qk_norm == "whole" else (self.head_dim, self.head_dim)
            shapes |= {
                f"attention.{name}_norm.weight": (width,) for name, width in zip(("query", "key"), widths, strict=True)
            }
        shapes |= self._norm("attention_output_norm") if after else {}
        shapes |= self._norm("mlp_norm") if before else {}
        mlp = "mlp"
        if experts:
            assert self.num_experts is not None
            assert self.moe_intermediate_size is not None
            count, size = self.num_experts, self.moe_intermediate_size
            shapes["mlp.router.weight"] = (count, hidden)
            shapes |= {"mlp.experts.gate": (count, size, hidden)} if self.gated_mlp else {}
            shapes |= {"mlp.experts.up": (count, size, hidden), "mlp.experts.down": (count, hidden, size)}
            mlp, inner = "mlp.shared", self.num_shared_experts * size
        if inner:
            shapes |= linear(f"{mlp}.gate", inner, hidden, self.mlp_bias) if self.gated_mlp else {}
            shapes |= linear(f"{mlp}.up", inner, hidden, self.mlp_bias)
            shapes |= linear(f"{mlp}.down", hidden, inner, self.mlp_bias)
        return shapes | (self._norm("mlp_output_norm") if after else {})


def is_stacked(name: str) -> bool:
    """Whether a parameter, by its canonical name, holds the experts of a layer."""
    return ".mlp.experts." in name


def build_model_config(model: ModelSection, vocab_size: int, sequence_length: int) -> ModelConfig:
    """Resolve the defaults of the model section, which planning/checks has passed.

    Args:
        vocab_size: the tokenizer's, used where `model.vocab_size` is not set, padded to `model.vocab_multiple`.
        sequence_length: tokens in a sample; the default of `max_position_embeddings`.
    """
    of_style = {
        name: default if (own := getattr(model, name)) is None else own for name, default in STYLES[model.style].items()
    }
    multiple = model.vocab_multiple or 1
    gated_size = math.ceil(model.hidden_size * 8 / 3 / 64) * 64
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    inner = model.intermediate_size or (gated_size if of_style["gated_mlp"] else 4 * model.hidden_size)
    moe_layers = 1 if model.moe_layers is None else model.moe_layers
    resolved = {
        "vocab_size": model.vocab_size or math.ceil(vocab_size / multiple) * multiple,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "moe_intermediate_size": model.num_experts and (model.moe_intermediate_size or inner),
        "moe_layers": tuple(
            layer
            for layer in _layers(moe_layers, model.num_hidden_layers)
            if model.num_experts and layer >= model.num_dense_layers
        ),
        "max_position_embeddings": model.max_position_embeddings or sequence_length,
        "rope_scaling": model.rope_scaling,
        "no_rope_layers": _layers(model.no_rope_layers, model.num_hidden_layers),
        "full_attention_layers": _layers(model.full_attention_layers, model.num_hidden_layers),
        # Trained queries and keys are not independent: their products grow with head_dim, not with its root.
        "attention_scale": model.attention_scale if model.mup_base_width is None else 1 / head_dim,
    }
    return ModelConfig(**model.model_dump(exclude={"vocab_multiple", "num_dense_layers"}) | of_style | resolved)


# What manifests of the first releases do not state: their models are what `style` says.
_CHOICES = (
    *("normalization", "norm_placement", "norm_zero_centered", "position_embedding_type", "rope_local_theta"),
    *("rope_scaling", "partial_rotary_factor", "no_rope_layers", "sliding_window", "full_attention_layers"),
    *("attention_scale", "attn_logit_softcapping", "attention_sinks", "qkv_bias", "attention_output_bias", "mlp_bias"),
    *("hidden_act", "gated_mlp", "parallel_residual", "embedding_scale", "final_logit_softcapping"),
    *("num_experts", "num_experts_per_token", "moe_intermediate_size", "num_shared_experts", "moe_layers"),
    *("router_scores", "norm_topk_prob", "routed_scaling_factor", "expert_bias"),
    "mup_base_width",
)


def model_settings(shape: ModelConfig) -> dict[str, Any]:
    """The settings of a model as JSON values, as a manifest holds them."""
    scaling = shape.rope_scaling
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(shape).items()}
    return found | {"rope_scaling": None if scaling is None else scaling.model_dump()}


def completed_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a manifest, also of one that was written before models had these choices."""
    style = next((name for name in STYLES if name == stored.get("style")), None)
    if style is None:
        return dict(stored)
    defaults = model_settings(build_model_config(ModelSection(style=style), 1, 1))
    return {name: defaults[name] for name in _CHOICES} | dict(stored)


def _layers(choice: LayerChoice | None, count: int) -> tuple[int, ...]:
    if isinstance(choice, int):
        return tuple(range(choice - 1, count, choice))
    return tuple(sorted(choice or ()))


def flops_per_token(shape: ModelConfig, sequence_length: int, frozen: Set[str] = frozenset()) -> int:
    """Floating-point operations of the forward and the backward pass, per token of a full sequence.

    It counts 6 for each parameter of a matrix product (2 forward, 4 backward), the head included even where it is
    tied, and attention's own products, 12 x layers x T x heads x head_dim, halved because the mask is causal, or what a
    sliding window leaves of them. It does
    not count embedding lookups, norms, activations, the softmax and recomputed blocks. The backward pass spares 2 for
    each parameter that is frozen, and 2 for each product whose input no parameter that trains has a part in.
    """
    linear, others = _flops_of_products(shape, sequence_length, frozen)
    return linear + others


def _flops_of_products(shape: ModelConfig, sequence_length: int, frozen: Set[str]) -> tuple[int, int]:
    """Return the operations of the blocks' linear layers, and those of attention's own products and the head."""
    sizes = shape.parameters()
    lowest = min((_depth(name) for name in sizes.keys() - frozen), default=(math.inf, 1))
    linear = others = 0
    for name, size in sizes.items():
        if name.startswith("layers.") and len(size) >= 2:
            products = math.prod(shape.active(size))
            linear += (2 + 2 * (name not in frozen) + 2 * (lowest < _depth(name))) * products
    for layer in range(shape.num_hidden_layers):
        others += (6 if lowest < (layer, _ATTENTION) else 2) * _attention_products(shape, layer, sequence_length)
    head = "embedding.tokens.weight" if shape.tie_word_embeddings else "head.weight"
    below = lowest < (math.inf, 1)
    others += (2 + 2 * (head not in frozen) + 2 * below) * shape.vocab_size * shape.hidden_size
    return linear, others


def _attention_products(shape: ModelConfig, layer: int, length: int) -> int:
    """Multiplications and additions of a token's scores and of their product with values, halved as they are causal."""
    window = min(shape.window(layer) or length, length)
    return shape.num_attention_heads * shape.head_dim * (2 * window - window * window // length)


# How far a block's parameters are from its input; attention's own products come after the projections and their norms.
_ATTENTION = 3
_DEPTHS = {"attention_norm": 0, "query": 1, "key": 1, "value": 1, "query_norm": 2, "key_norm": 2, "sinks": 3}
_DEPTHS |= {"output": 4, "attention_output_norm": 5}
_DEPTHS |= {"mlp_norm": 6, "router": 7, "gate": 7, "up": 7, "down": 8, "mlp_output_norm": 9}


def _depth(name: str) -> tuple[float, int]:
    """Return how far a parameter is from the model's input: (block, depth in it), before and after all blocks too."""
    part, *path = name.split(".")
    if part == "layers":
        return int(path[0]), _DEPTHS[path[-2] if path[-1] in ("weight", "bias") else path[-1]]
    return {"embedding": (-1, 0), "final_norm": (math.inf, 0), "head": (math.inf, 1)}[part]


def recomputed_flops_per_token(
    shape: ModelConfig,
    sequence_length: int,
    recompute: Recompute,
    every: int = 0,
    frozen: Set[str] = frozenset(),
    tiles: bool = False,
) -> int:
    """The operations of matrix products that the backward pass does again, per token, counted as above.

    A recomputation ends with the last input that the backward pass reads: the product that ends an attention or an MLP
    is spared, except in a tensor group, under dropout, in float8 and in compiled blocks.

    Args:
        every: every n-th block is recomputed whole; 0: none.
        frozen: names of parameters that do not train: blocks below all others have no backward pass.
        tiles: the MLP is computed in tiles, each of which is computed again whole.
    """
    sizes = {name: math.prod(shape.active(dims)) for name, dims in shape.parameters().items() if len(dims) >= 2}

    def matrices(part: str) -> int:
        return sum(count for name, count in sizes.items() if name.startswith(f"{part}."))

    total = 0
    for layer in range(lowest_block(shape, frozen), shape.num_hidden_layers):
        parts = ("attention", "attention.output", "mlp", "mlp.down")
        projections, output, mlp, down = (matrices(f"layers.{layer}.{part}") for part in parts)
        if shape.norm_placement != "pre":  # the norm after it reads the product
            output = down = 0
        tiled = mlp if tiles else 0
        mlp_again = tiled or mlp - down
        attention = projections + _attention_products(shape, layer, sequence_length)
        by_kind: dict[Recompute, int] = {
            "none": tiled,
            "norms": tiled,
            "attention": attention - output + tiled,
            "mlp": mlp_again,
            "full": attention + mlp_again,
        }
        total += 2 * by_kind["full" if every and layer % every == 0 else recompute]
    return total


def float8_share(shape: ModelConfig, sequence_length: int, float8: bool, frozen: Set[str] = frozenset()) -> float:
    """The share of `flops_per_token` in float8: with `precision.float8` the layers' linear maps, else none."""
    linear, others = _flops_of_products(shape, sequence_length, frozen)
    return linear / (linear + others) if float8 else 0.0


def lowest_block(shape: ModelConfig, frozen: Set[str]) -> int:
    """Return the first block with a backward pass; all of them have one if an embedding trains."""
    trained = shape.parameters().keys() - frozen
    return int(min([shape.num_hidden_layers, *(max(0, _depth(name)[0]) for name in trained)]))


# How attention on a CPU divides a sequence into blocks of queries.

_MOST_BLOCKS = 8  # compiling unrolls them, and each further block saves less of the square above the diagonal
_LEAST_QUERIES = 128  # smaller matrix products are slow
_LONGEST_KEPT = 1024


def query_blocks(length: int) -> list[tuple[int, int]]:
    """[start, end) of each block of queries, which attends to the keys [0, end)."""
    size = max(_LEAST_QUERIES, -(-length // _MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def first_key(start: int, window: int | None) -> int:
    """The first key that a block of queries from `start` on may see."""
    return 0 if window is None else max(0, start - window + 1)


def keeps_probabilities(length: int, softcap: float | None = None) -> bool:
    """Whether the backward pass reads stored probabilities; longer sequences recompute them to save memory.

    A soft cap's slope is computed from the scores again, and with them the probabilities.
    """
    return length <= _LONGEST_KEPT and softcap is None


def kept_probabilities(shape: ModelConfig, layer: int, length: int) -> int:
    """Number of probabilities that one head of a layer keeps for one sequence."""
    if not keeps_probabilities(length, shape.attn_logit_softcapping):
        return 0
    window = shape.window(layer)
    return sum((end - start) * (end - first_key(start, window)) for start, end in query_blocks(length))
