"""Names and layouts of Hugging Face's weights, by the tables of `families.py`.

A Hugging Face tensor holds one or more of megalm's parameters, concatenated along their output dimension, as a whole
(GPT-2 keeps query, key and value in one tensor) or within each head (GPT-NeoX). GPT-2 stores its matrices transposed,
as [in, out].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.huggingface.config_json import family_of
from megalm.huggingface.families import Family, TensorNames
from megalm.model.model_config import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class HFTensor:
    """A tensor by its name in transformers.

    Attributes:
        parts: canonical names and shapes of the parameters that it concatenates.
        transposed: the tensor is their transpose.
        heads: it concatenates the parts of each of this many heads; 0: the parts as a whole.
        expert: it is this row of its part, whose shape is that of a row; None: the part as a whole.
    """

    name: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool = False
    heads: int = 0
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        first = self.parts[0][1]
        whole = (sum(shape[0] for _, shape in self.parts), *first[1:])
        return whole[::-1] if self.transposed else whole


def own_head(name: str, names: TensorNames) -> str:
    """The family's own name of its head: transformers 5 gives all of them one name."""
    return names.head_weight if name == "lm_head.weight" else name


def hf_tensors(shape: ModelConfig, family: Family | None = None) -> list[HFTensor]:
    """Every tensor of the model in Hugging Face format; each parameter, of stacked experts each row, is in exactly one.

    Args:
        family: whose names; None: of the one that the model is exported as.
    """
    parameters = shape.parameters()
    names = (family or family_of(shape)).names
    tensors = [
        HFTensor(name, tuple((part, parameters[part]) for part in parts), flip and len(parameters[parts[0]]) > 1, heads)
        for name, parts, flip, heads in _sources(names, shape)
        if parts[0] in parameters
    ]
    tensors += _experts(names, shape)
    assert {part for tensor in tensors for part, _ in tensor.parts} == set(parameters), shape
    return tensors


def tensors_by_part(tensors: Iterable[HFTensor]) -> dict[str, list[HFTensor]]:
    """Canonical name of a parameter -> the tensors that hold it: one, or one for each row of stacked experts."""
    found: dict[str, list[HFTensor]] = {}
    for tensor in tensors:
        for part, _ in tensor.parts:
            found.setdefault(part, []).append(tensor)
    return found


def _sources(names: TensorNames, shape: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], bool, int]]:
    """Name, parts, whether transposed, heads: embeddings, blocks, final norm, head; also those that the shape lacks."""
    kinds = ("weight", "bias")
    yield f"{names.prefix}{names.tokens}.weight", ("embedding.tokens.weight",), False, 0
    yield f"{names.prefix}{names.positions}.weight", ("embedding.positions.weight",), False, 0
    for layer in range(shape.num_hidden_layers):
        for name, parts in names.block.items():
            heads = shape.num_attention_heads if name in names.by_head else 0
            for kind in kinds:
                ours = tuple(f"layers.{layer}.{part}.{kind}" for part in parts)
                whole = f"{names.prefix}{names.layers}.{layer}.{name}.{kind}"
                yield whole, ours, name in names.transposed, heads
    for kind in kinds:
        yield f"{names.prefix}{names.final_norm}.{kind}", (f"final_norm.{kind}",), False, 0
    yield names.head_weight, ("head.weight",), False, 0


def _experts(names: TensorNames, shape: ModelConfig) -> Iterator[HFTensor]:
    parameters = shape.parameters()
    for layer in shape.moe_layers:
        for name, part in names.experts.items():
            stacked = f"layers.{layer}.{part}"
            for expert, own in enumerate([parameters[stacked][1:]] * parameters[stacked][0]):
                whole = f"{names.prefix}{names.layers}.{layer}.{name.format(expert)}.weight"
                yield HFTensor(whole, ((stacked, own),), expert=expert)


def to_hf(tensor: HFTensor, parts: Sequence[Tensor]) -> Tensor:
    """Concatenate megalm's parameters to a Hugging Face tensor."""
    if tensor.heads:
        whole = torch.cat([part.unflatten(0, (tensor.heads, -1)) for part in parts], dim=1).flatten(0, 1)
    else:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.t() if tensor.transposed else whole


def from_hf(tensor: HFTensor, whole: Tensor, part: str) -> Tensor:
    """One of megalm's parameters of a Hugging Face tensor, as a view of it unless heads are apart there."""
    straight = whole.t() if tensor.transposed else whole
    rows = straight.unflatten(0, (tensor.heads or 1, -1))
    start = 0
    for name, shape in tensor.parts:
        size = shape[0] // (tensor.heads or 1)
        if name == part:
            return rows[:, start : start + size].flatten(0, 1)
        start += size
    raise AssertionError(part)


def read_part(tensors: Sequence[HFTensor], part: str, load: Callable[[HFTensor], Tensor]) -> Tensor:
    """One of megalm's parameters, fp32, of the tensors that hold it; experts are stacked one after the other."""
    first = from_hf(tensors[0], load(tensors[0]), part).float()
    if tensors[0].expert is None:
        return first
    stacked = first.new_empty(len(tensors), *first.shape)
    stacked[0] = first
    for row, tensor in enumerate(tensors[1:], 1):
        stacked[row] = load(tensor)
    return stacked
