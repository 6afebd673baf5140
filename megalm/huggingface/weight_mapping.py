"""Names and layouts of Hugging Face's weights: one table, read in both directions. It needs no torch.

A Hugging Face tensor holds one or more of megalm's parameters, concatenated along their output dimension (GPT-2 keeps
query, key and value in one tensor). GPT-2 stores its matrices transposed, as [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalm.model.model_config import ModelConfig

# Hugging Face name -> (megalm's parameters, whether a matrix is stored transposed).
_Sources = Mapping[str, tuple[tuple[str, ...], bool]]

_LLAMA_BLOCK: _Sources = {
    name: ((part,), False)
    for name, part in {
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
    }.items()
}
_GPT2_BLOCK: _Sources = {
    "ln_1": (("attention_norm",), False),
    "attn.c_attn": (("attention.query", "attention.key", "attention.value"), True),
    "attn.c_proj": (("attention.output",), True),
    "ln_2": (("mlp_norm",), False),
    "mlp.c_fc": (("mlp.up",), True),
    "mlp.c_proj": (("mlp.down",), True),
}


@dataclass(frozen=True)
class HFTensor:
    """A tensor by its name in transformers.

    Attributes:
        parts: canonical names and shapes of the parameters that it concatenates.
        transposed: the tensor is their transpose.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        first = self.parts[0][1]
        whole = (sum(shape[0] for _, shape in self.parts), *first[1:])
        return whole[::-1] if self.transposed else whole


def hf_tensors(shape: ModelConfig) -> list[HFTensor]:
    """Every tensor of the model in Hugging Face format, in the model's order; each parameter is in exactly one."""
    parameters = shape.parameters()
    tensors = [
        HFTensor(name, tuple((part, parameters[part]) for part in parts), transposed and len(parameters[parts[0]]) > 1)
        for name, (parts, transposed) in _sources(shape).items()
        if parts[0] in parameters
    ]
    assert {part for tensor in tensors for part, _ in tensor.parts} == set(parameters), shape
    return tensors


def base_model_prefix(shape: ModelConfig) -> str:
    """The prefix of every name except the head's; a model that was saved without its head lacks it."""
    return "transformer." if shape.style == "gpt2" else "model."


def _sources(shape: ModelConfig) -> _Sources:
    """Embeddings, blocks, final norm, head; names that a model of this shape lacks are included."""
    prefix = base_model_prefix(shape)
    gpt2 = shape.style == "gpt2"
    layers, block = ("h", _GPT2_BLOCK) if gpt2 else ("layers", _LLAMA_BLOCK)
    tokens, final_norm = ("wte", "ln_f") if gpt2 else ("embed_tokens", "norm")
    return {
        f"{prefix}{tokens}.weight": (("embedding.tokens.weight",), False),
        f"{prefix}wpe.weight": (("embedding.positions.weight",), False),
        **{
            f"{prefix}{layers}.{layer}.{name}.{kind}": (tuple(f"layers.{layer}.{part}.{kind}" for part in parts), flip)
            for layer in range(shape.num_hidden_layers)
            for name, (parts, flip) in block.items()
            for kind in ("weight", "bias")
        },
        f"{prefix}{final_norm}.weight": (("final_norm.weight",), False),
        f"{prefix}{final_norm}.bias": (("final_norm.bias",), False),
        "lm_head.weight": (("head.weight",), False),
    }
