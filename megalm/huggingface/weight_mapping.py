"""Names and layouts of weights there and here: one table, read in both directions. Pure names and shapes, no torch.

A tensor of theirs is one or more of our parameters side by side along their output dimension (GPT-2 keeps query, key
and value in one), and transposed where GPT-2 keeps its matrices as [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalm.model.model_config import ModelConfig

QKV = ("query", "key", "value")

_LLAMA_TOP = {
    "model.embed_tokens.weight": "embedding.tokens.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
}
_LLAMA_BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_GPT2_TOP = {
    "transformer.wte.weight": "embedding.tokens.weight",
    "transformer.wpe.weight": "embedding.positions.weight",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
    "lm_head.weight": "head.weight",
}
# Theirs -> ours, and whether a matrix stands transposed there.
_GPT2_BLOCK: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "ln_1": (("attention_norm",), False),
    "attn.c_attn": (tuple(f"attention.{part}" for part in QKV), True),
    "attn.c_proj": (("attention.output",), True),
    "ln_2": (("mlp_norm",), False),
    "mlp.c_fc": (("mlp.up",), True),
    "mlp.c_proj": (("mlp.down",), True),
}


_Made = dict[str, tuple[tuple[str, ...], bool]]


@dataclass(frozen=True)
class TheirTensor:
    """A tensor as transformers names it.

    Attributes:
        parts: canonical names and shapes of our parameters that it is made of, one after another.
        transposed: it is the transpose of them.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""
        first = self.parts[0][1]
        whole = (sum(shape[0] for _, shape in self.parts), *first[1:])
        return whole[::-1] if self.transposed else whole


def their_tensors(shape: ModelConfig) -> list[TheirTensor]:
    """Every tensor of the model in Hugging Face form, in the model's order; each of our parameters is in one."""
    ours = shape.parameters()
    found = _gpt2(shape) if shape.style == "gpt2" else _llama(shape)
    tensors = [
        TheirTensor(name, tuple((part, ours[part]) for part in parts), transposed and len(ours[parts[0]]) > 1)
        for name, (parts, transposed) in found.items()
        if parts[0] in ours
    ]
    assert {part for tensor in tensors for part, _ in tensor.parts} == set(ours), shape
    return tensors


def prefix_of(shape: ModelConfig) -> str:
    """What the names of all tensors but the head's begin with; models saved without a head have it not."""
    return "transformer." if shape.style == "gpt2" else "model."


def _llama(shape: ModelConfig) -> _Made:
    top: _Made = {name: ((part,), False) for name, part in _LLAMA_TOP.items()}
    blocks: _Made = {
        f"model.layers.{layer}.{name}.weight": ((f"layers.{layer}.{part}.weight",), False)
        for layer in range(shape.num_hidden_layers)
        for name, part in _LLAMA_BLOCK.items()
    }
    return _in_order(top, blocks)


def _gpt2(shape: ModelConfig) -> _Made:
    top: _Made = {name: ((part,), False) for name, part in _GPT2_TOP.items()}
    blocks: _Made = {
        f"transformer.h.{layer}.{name}.{kind}": (tuple(f"layers.{layer}.{part}.{kind}" for part in parts), transposed)
        for layer in range(shape.num_hidden_layers)
        for name, (parts, transposed) in _GPT2_BLOCK.items()
        for kind in ("weight", "bias")
    }
    return _in_order(top, blocks)


def _in_order(top: _Made, blocks: _Made) -> _Made:
    """Embeddings, blocks, the rest."""
    first = {name: made for name, made in top.items() if made[0][0].startswith("embedding.")}
    return {**first, **blocks, **top}
