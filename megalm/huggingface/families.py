"""The model families of transformers that megalm reads and writes, as data: no code asks for a family's name.

A family is a class of transformers: what is fixed in it, which keys of its `config.json` say the rest, and the names of
its tensors. Source: the configuration and modelling files of transformers 4.46, 4.57 and 5.20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megalm.config.schema import ModelStyle
from megalm.huggingface.config_rules import (
    REQUIRED,
    ActivationKey,
    Derived,
    ExpertLayers,
    Key,
    LayerTypes,
    NoRopeLayers,
    QueryScalar,
    Rope,
    Rule,
    divided_heads,
    layer_count,
)

Accepts = Callable[[Any], bool]


@dataclass(frozen=True)
class TensorNames:
    """Names of tensors, without `.weight` and `.bias`.

    Attributes:
        prefix: of every name except the head's.
        layers: before a block's number.
        block: a tensor of a block -> megalm's parameters that it concatenates along their output dimension.
        transposed: those whose matrices are stored as [in, out].
        by_head: those that concatenate the parameters within each head: [head, parameter, dimension].
        experts: a tensor of an expert, whose number stands for the braces -> megalm's parameter that stacks them.
    """

    prefix: str
    tokens: str
    layers: str
    final_norm: str
    block: Mapping[str, tuple[str, ...]]
    head: str = "lm_head"
    positions: str = ""
    transposed: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()
    experts: Mapping[str, str] = field(default_factory=dict)

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"


@dataclass(frozen=True)
class Family:
    """A causal language model of transformers.

    Attributes:
        name: `model_type` of config.json.
        classes: the class with a head, and the one without.
        fixed: fields of ModelConfig that the class leaves no choice of.
        rules: give all other fields.
        style: of the model section; each choice is given beside it.
        required: a key that is there must have one of these values.
        ignored: keys that this class does not read, though others do.
        heads_divide_hidden: the class refuses other sizes.
    """

    name: str
    classes: tuple[str, str]
    fixed: Mapping[str, Any]
    rules: tuple[Rule, ...]
    names: TensorNames
    style: ModelStyle = "llama"
    required: Mapping[str, Accepts] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    heads_divide_hidden: bool = False

    @property
    def keys(self) -> frozenset[str]:
        """Keys of config.json whose meaning is known."""
        return frozenset(self.required).union(self.ignored, *(rule.keys for rule in self.rules))


def _is(*values: Any) -> Accepts:
    return lambda value: value in values


def _names(prefix: str, **of_block: str) -> TensorNames:
    return TensorNames(prefix, "embed_tokens", "layers", "norm", {key: (part,) for key, part in of_block.items()})


_PROJECTIONS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_LLAMA_NAMES = _names("model.", **_PROJECTIONS, input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
# transformers 5 stacks experts in memory, and takes them apart when it saves: files are those of every version.
_MOE_NAMES = replace(
    _LLAMA_NAMES,
    block={**_LLAMA_NAMES.block, "mlp.gate": ("mlp.router",)},
    experts={f"mlp.experts.{{}}.{kind}_proj": f"mlp.experts.{kind}" for kind in ("gate", "up", "down")},
)
_MIXTRAL_NAMES = replace(
    _LLAMA_NAMES,
    block={**_LLAMA_NAMES.block, "block_sparse_moe.gate": ("mlp.router",)},
    experts={
        f"block_sparse_moe.experts.{{}}.{name}": f"mlp.experts.{kind}"
        for name, kind in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    },
)
_OLMO_NAMES = _names(
    "model.",
    **_PROJECTIONS,
    post_attention_layernorm="attention_output_norm",
    post_feedforward_layernorm="mlp_output_norm",
)
_GEMMA_NAMES = _names(
    "model.",
    **_PROJECTIONS,
    input_layernorm="attention_norm",
    post_attention_layernorm="attention_output_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_output_norm",
)
_QKV = ("attention.query", "attention.key", "attention.value")
_GPT2_NAMES = TensorNames(
    prefix="transformer.",
    tokens="wte",
    positions="wpe",
    layers="h",
    final_norm="ln_f",
    block={
        "ln_1": ("attention_norm",),
        "attn.c_attn": _QKV,
        "attn.c_proj": ("attention.output",),
        "ln_2": ("mlp_norm",),
        "mlp.c_fc": ("mlp.up",),
        "mlp.c_proj": ("mlp.down",),
    },
    transposed=frozenset(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
)
_NEOX_NAMES = TensorNames(
    prefix="gpt_neox.",
    tokens="embed_in",
    layers="layers",
    final_norm="final_layer_norm",
    head="embed_out",
    block={
        "input_layernorm": ("attention_norm",),
        "attention.query_key_value": _QKV,
        "attention.dense": ("attention.output",),
        "post_attention_layernorm": ("mlp_norm",),
        "mlp.dense_h_to_4h": ("mlp.up",),
        "mlp.dense_4h_to_h": ("mlp.down",),
    },
    by_head=frozenset(("attention.query_key_value",)),
)

# Choices that only some families have.
_PLAIN: dict[str, Any] = {
    "norm_placement": "pre",
    "norm_zero_centered": False,
    "qk_norm": False,
    "rope_local_theta": None,
    "no_rope_layers": (),
    "sliding_window": None,
    "full_attention_layers": (),
    "attention_scale": None,
    "attn_logit_softcapping": None,
    "attention_sinks": False,
    "parallel_residual": False,
    "embedding_scale": None,
    "final_logit_softcapping": None,
}
_DENSE: dict[str, Any] = {"num_experts": None, "moe_layers": ()}
_RMS = {**_PLAIN, "normalization": "rms_norm", "position_embedding_type": "rope", "gated_mlp": True}
_LLAMA = {**_RMS, **_DENSE}
_NO_BIAS = {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False}
_NO_MLP_BIAS = {"mlp_bias": False}
_OLMO = {**_LLAMA, **_NO_MLP_BIAS, "norm_placement": "post", "qk_norm": "whole"}
_GEMMA = {**_LLAMA, **_NO_MLP_BIAS, "norm_placement": "both", "norm_zero_centered": True}
_NEOX = {**_LLAMA, "normalization": "layer_norm", "gated_mlp": False, "mlp_bias": True}
_GPT2 = {
    **_NEOX,
    "position_embedding_type": "learned_absolute",
    "qkv_bias": True,
    "attention_output_bias": True,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
}

_SIZES = (
    *map(Key, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")),
    Key("initializer_range", default=0.02),
)
_GROUPS = Key("num_key_value_heads", default=lambda values: values["num_attention_heads"])
_UNGROUPED = Derived("num_key_value_heads", lambda values: values["num_attention_heads"])
_HEAD_DIM = Key("head_dim", default=divided_heads)
# Their classes have defaults of their own.
_OWN_GROUPS, _OWN_HEAD_DIM = Key("num_key_value_heads"), Key("head_dim")
_DIVIDED_HEADS = Derived("head_dim", divided_heads, key="head_dim")
_DROPOUT = Key("attention_dropout", default=0.0)
_RMS_SIZES = (*_SIZES, Key("intermediate_size"), _DROPOUT)
_ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "attention_output_bias"), default=False)
_BIASES = (_ATTENTION_BIAS, Key("mlp_bias", default=False))
_SILU = ActivationKey("hidden_act", default="silu")
_EXPERTS = Key("num_experts_per_tok", ("num_experts_per_token",))
_NORM_TOPK = Key("norm_topk_prob", default=False)


def _expert_sizes(count: Key, *others: Rule) -> tuple[Rule, ...]:
    """Of families whose layers all have experts: their size has the name of an MLP's."""
    size = Key("intermediate_size", ("moe_intermediate_size", "intermediate_size"))
    layers = Derived("moe_layers", lambda values: tuple(range(layer_count(values))))
    return (*_SIZES, _DROPOUT, count, size, layers, _EXPERTS, *others)


def _epsilon(default: float, name: str = "rms_norm_eps") -> Key:
    return Key(name, ("norm_epsilon",), default=default)


def _rules(
    groups: Rule,
    head_dim: Rule,
    *others: Rule,
    sizes: tuple[Rule, ...] = _RMS_SIZES,
    biases: tuple[Rule, ...] = (_ATTENTION_BIAS,),
    activation: Rule = _SILU,
    epsilon: Key = _epsilon(1e-6),  # noqa: B008  a constant
    tied: bool = False,
) -> tuple[Rule, ...]:
    """The rules of a decoder: `others` are read last; `tied` is the class's default."""
    tie = Key("tie_word_embeddings", default=tied)
    return (*sizes, groups, head_dim, *biases, activation, epsilon, tie, *others)


_DECODER = {"is_encoder_decoder": _is(False), "rope_interleaved": _is(False)}
_CAUSAL = {"use_bidirectional_attention": _is(False, None), **_DECODER}
_QWEN_WINDOWS = LayerTypes(missing=4096, switch=True, period=0)


def _gemma_rules(*others: Rule) -> tuple[Rule, ...]:
    activation = ActivationKey("hidden_activation", default="gelu_pytorch_tanh", also="hidden_act")
    scales = QueryScalar(), Derived("embedding_scale", lambda values: values["hidden_size"] ** 0.5)
    return _rules(_OWN_GROUPS, _OWN_HEAD_DIM, *scales, *others, activation=activation, tied=True)


_GEMMA_IGNORED = frozenset(("cache_implementation",))

# A model is exported as the first family that computes it.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            ("LlamaForCausalLM", "LlamaModel"),
            fixed=_LLAMA,
            rules=_rules(_GROUPS, _HEAD_DIM, Rope(), biases=_BIASES),
            names=_LLAMA_NAMES,
            required={**_DECODER, "pretraining_tp": _is(1)},
            heads_divide_hidden=True,
        ),
        Family(
            "mistral",
            ("MistralForCausalLM", "MistralModel"),
            fixed={**_LLAMA, **_NO_BIAS},
            rules=_rules(_OWN_GROUPS, _HEAD_DIM, Key("sliding_window", default=4096, nullable=True), Rope(), biases=()),
            names=_LLAMA_NAMES,
            required={**_DECODER, "attention_bias": _is(False), "mlp_bias": _is(False)},
        ),
        Family(
            "qwen2",
            ("Qwen2ForCausalLM", "Qwen2Model"),
            fixed={**_LLAMA, **_NO_MLP_BIAS, "qkv_bias": True, "attention_output_bias": False},
            rules=_rules(_OWN_GROUPS, _DIVIDED_HEADS, _QWEN_WINDOWS, Rope(), biases=()),
            names=_LLAMA_NAMES,
            required={**_DECODER, "mlp_bias": _is(False), "use_mrope": _is(False)},
        ),
        Family(
            "qwen3",
            ("Qwen3ForCausalLM", "Qwen3Model"),
            fixed={**_LLAMA, **_NO_MLP_BIAS, "qk_norm": True},
            rules=_rules(_OWN_GROUPS, _OWN_HEAD_DIM, _QWEN_WINDOWS, Rope()),
            names=_LLAMA_NAMES,
            required={**_DECODER, "mlp_bias": _is(False)},
        ),
        Family(
            "mixtral",
            ("MixtralForCausalLM", "MixtralModel"),
            fixed={**_RMS, **_NO_BIAS, "norm_topk_prob": True},
            rules=_rules(
                _OWN_GROUPS,
                _HEAD_DIM,
                Key("sliding_window", default=None),
                Rope(theta=1_000_000.0),
                sizes=_expert_sizes(Key("num_local_experts", ("num_experts",))),
                biases=(),
                epsilon=_epsilon(1e-5),
            ),
            names=_MIXTRAL_NAMES,
            required={**_DECODER, "attention_bias": _is(False), "router_jitter_noise": _is(0)},
        ),
        Family(
            "qwen3_moe",
            ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
            fixed={**_RMS, **_NO_MLP_BIAS, "qk_norm": True},
            rules=_rules(
                _OWN_GROUPS,
                _HEAD_DIM,
                Rope(),
                sizes=(
                    *_RMS_SIZES,
                    Key("num_experts", spelling="num_local_experts"),
                    Key("moe_intermediate_size"),
                    ExpertLayers(),
                    _EXPERTS,
                    _NORM_TOPK,
                ),
            ),
            names=_MOE_NAMES,
            # Versions differ in the layers that have the window.
            required={**_DECODER, "use_sliding_window": _is(False)},
            ignored=frozenset(("sliding_window",)),
        ),
        Family(
            "olmoe",
            ("OlmoeForCausalLM", "OlmoeModel"),
            fixed={**_RMS, **_NO_MLP_BIAS, "qk_norm": "whole"},
            rules=_rules(
                _GROUPS,
                _DIVIDED_HEADS,
                Rope(),
                sizes=_expert_sizes(Key("num_experts", spelling="num_local_experts"), _NORM_TOPK),
                epsilon=_epsilon(1e-5),
            ),
            names=_MOE_NAMES,
            required={**_DECODER, "clip_qkv": _is(None)},
        ),
        Family(
            "olmo2",
            ("Olmo2ForCausalLM", "Olmo2Model"),
            fixed=_OLMO,
            rules=_rules(_GROUPS, _DIVIDED_HEADS, Rope(), epsilon=_epsilon(1e-5)),
            names=_OLMO_NAMES,
            required=_DECODER,
        ),
        Family(
            "olmo3",
            ("Olmo3ForCausalLM", "Olmo3Model"),
            fixed=_OLMO,
            rules=_rules(
                _GROUPS,
                _DIVIDED_HEADS,
                LayerTypes(missing=4096, period=4),
                Rope(theta=REQUIRED, by_layer_type=True),
                epsilon=_epsilon(1e-5),
            ),
            names=_OLMO_NAMES,
            required=_DECODER,
        ),
        Family(
            "smollm3",
            ("SmolLM3ForCausalLM", "SmolLM3Model"),
            fixed=_LLAMA,
            rules=_rules(
                _OWN_GROUPS,
                _DIVIDED_HEADS,
                NoRopeLayers(),
                LayerTypes(missing=None, switch=True),
                Rope(theta=2_000_000.0),
                biases=_BIASES,
                tied=True,
            ),
            names=_LLAMA_NAMES,
            required=_DECODER,
            ignored=frozenset(("pretraining_tp",)),
        ),
        Family(
            "gemma2",
            ("Gemma2ForCausalLM", "Gemma2Model"),
            fixed=_GEMMA,
            rules=_gemma_rules(
                Key("attn_logit_softcapping", default=50.0, nullable=True),
                Key("final_logit_softcapping", default=30.0, nullable=True),
                LayerTypes(missing=4096, period=2),
                Rope(),
            ),
            names=_GEMMA_NAMES,
            required=_CAUSAL,
            ignored=_GEMMA_IGNORED,
            heads_divide_hidden=True,
        ),
        Family(
            "gemma3_text",
            ("Gemma3ForCausalLM", "Gemma3TextModel"),
            fixed={**_GEMMA, "qk_norm": True},
            rules=_gemma_rules(
                Key("final_logit_softcapping", default=None),
                LayerTypes(missing=4096, period=6, period_keys=("sliding_window_pattern", "_sliding_window_pattern")),
                Rope(theta=1_000_000.0, by_layer_type=True, local=(10_000.0, "rope_local_base_freq")),
            ),
            names=_GEMMA_NAMES,
            # The class has a key for a cap of scores, and does not use it.
            required={**_CAUSAL, "attn_logit_softcapping": _is(None)},
            ignored=_GEMMA_IGNORED,
            heads_divide_hidden=True,
        ),
        Family(
            "gpt_neox",
            ("GPTNeoXForCausalLM", "GPTNeoXModel"),
            fixed=_NEOX,
            rules=_rules(
                _UNGROUPED,
                _DIVIDED_HEADS,
                Key("use_parallel_residual", ("parallel_residual",), default=True),
                Rope(theta_key="rotary_emb_base", partial=(0.25, "rotary_pct")),
                sizes=(*_SIZES, Key("intermediate_size"), Key("hidden_dropout", ("dropout",), default=0.0), _DROPOUT),
                biases=(replace(_ATTENTION_BIAS, default=True),),
                activation=ActivationKey("hidden_act", default="gelu"),
                epsilon=_epsilon(1e-5, "layer_norm_eps"),
            ),
            names=_NEOX_NAMES,
            style="gpt2",
            required=_DECODER,
            ignored=frozenset(("classifier_dropout",)),
            heads_divide_hidden=True,
        ),
        Family(
            "gpt2",
            ("GPT2LMHeadModel", "GPT2Model"),
            fixed=_GPT2,
            rules=(
                Key("vocab_size"),
                Key("n_embd", ("hidden_size",)),
                Key("n_layer", ("num_hidden_layers",)),
                Key("n_head", ("num_attention_heads",)),
                # n_ctx: the older name, which llama.cpp's converter asks for
                Key("n_positions", ("max_position_embeddings",), also=("n_ctx",)),
                Key("n_inner", ("intermediate_size",), default=lambda values: 4 * values["hidden_size"]),
                Key("tie_word_embeddings", default=True),
                Key("resid_pdrop", ("dropout",), default=0.1, also=("embd_pdrop",)),
                Key("attn_pdrop", ("attention_dropout",), default=0.1),
                Key("initializer_range", default=0.02),
                _UNGROUPED,
                Derived("head_dim", divided_heads),
                ActivationKey("activation_function", default="gelu_new", tanh="gelu_new"),
                _epsilon(1e-5, "layer_norm_epsilon"),
            ),
            names=_GPT2_NAMES,
            style="gpt2",
            required={
                "scale_attn_weights": _is(True),
                "scale_attn_by_inverse_layer_idx": _is(False),
                "reorder_and_upcast_attn": _is(False),
                "add_cross_attention": _is(False),
                "n_special": _is(0),
                "is_encoder_decoder": _is(False),
            },
            heads_divide_hidden=True,
        ),
    )
}
