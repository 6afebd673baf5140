"""The language model as an ordered list of stages: embedding, blocks, final norm, head.

`StageBuilder` builds the stages; `LanguageModel` runs all of them, and a pipeline rank runs its own. Shapes: B batch,
T sequence, H hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megalm.model.attention import Attention, KeyValueCache
from megalm.model.attention_kernels import AttentionMask, attention_mask
from megalm.model.layer_factory import ALL_EXPERTS, AllExperts, LayerFactory, VocabularyOutput, shard_of
from megalm.model.loss import IGNORE
from megalm.model.model_config import ModelConfig, is_stacked
from megalm.model.modules import ACTIVATIONS, DropoutClock, RotaryEmbedding, norm
from megalm.model.moe import MixtureOfExperts
from megalm.model.recomputation import KEEP_ALL, Recomputation, TokenTiles, of_recomputed_norm, recomputed


class MLP(nn.Module):
    """The feed-forward part of a block: down(act(up(x))), or gated (Shazeer, 2020), down(act(gate(x)) * up(x)).

    Args:
        inner: its size, F; None: the model's.
    """

    def __init__(self, shape: ModelConfig, layers: LayerFactory, inner: int | None = None) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, inner or shape.intermediate_size
        bias = shape.mlp_bias
        self.activation = ACTIVATIONS[shape.hidden_act]
        self.project = layers.projection()
        self.gate = layers.column(hidden, inner, bias, parts=inner) if shape.gated_mlp else None
        self.up = layers.column(hidden, inner, bias, parts=inner)
        self.down = layers.row(inner, hidden, bias, parts=inner)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        if self.gate is None:
            (up,) = self.project(hidden, self.up)
            return self.down(self.activation(up))
        gate, up = self.project(hidden, self.gate, self.up)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """One transformer block: the half with its attention, then the half with its MLP.

    A half adds output_norm(layer(norm(x))) to the residual stream x, with one of the norms or both. With a parallel
    residual both halves read the block's input.

    Args:
        layer: counted from 1; dropout's place 0 is the embedding's.
        recomputation: what the backward pass computes again.
    """

    def __init__(
        self,
        shape: ModelConfig,
        layers: LayerFactory,
        rope: RotaryEmbedding | None,
        clock: DropoutClock,
        layer: int,
        recomputation: Recomputation = KEEP_ALL,
    ) -> None:
        super().__init__()
        self._clock = clock
        is_whole = recomputation.every > 0 and (layer - 1) % recomputation.every == 0
        self._recompute = "full" if is_whole else recomputation.kind
        self._inputs = recomputation.inputs
        self._compiled_halves: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
        self._parallel = shape.parallel_residual
        before, after = shape.norm_placement != "post", shape.norm_placement != "pre"

        def norm_if(wanted: bool) -> nn.Module | None:
            return layers.replicated(norm(shape), sharded=False) if wanted else None

        self.attention_norm = norm_if(before)
        self.attention = Attention(shape, layers, rope, clock, layer)
        self.attention_output_norm = norm_if(after)
        self.attention_dropout = layers.dropout(shape.dropout, layer, "attention_output", sharded=False)
        self.mlp_norm = norm_if(before)
        self.mlp = self._mlp(shape, layers) if layer - 1 in shape.moe_layers else MLP(shape, layers)
        self.mlp_output_norm = norm_if(after)
        self.mlp_dropout = layers.dropout(shape.dropout, layer, "mlp_output", sharded=False)
        chunk = recomputation.mlp_chunk_tokens
        tokens = None if chunk is None else max(1, chunk // layers.slices)
        of_mlp = [module for module in (self.mlp_norm, self.mlp, self.mlp_output_norm) if module is not None]
        self._tiles = None if tokens is None else TokenTiles(of_mlp, tokens)

    @staticmethod
    def _mlp(shape: ModelConfig, layers: LayerFactory) -> MixtureOfExperts:
        size = shape.num_shared_experts * (shape.moe_intermediate_size or 0)
        return MixtureOfExperts(shape, layers, MLP(shape, layers, size) if size else None)

    def forward(self, hidden: Tensor, mask: AttentionMask | None, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, H] -> [B, T, H], recomputed in part if the block is to be; `run` recomputes it whole too."""
        attention_half, mlp_half = self._compiled_halves or (self._attention_half, self._mlp_half)
        again = self._recompute if self.training else "none"
        if again == "attention":
            attended = recomputed(attention_half, self._clock, hidden, mask)
        else:
            attended = attention_half(hidden, mask, cache)
        inputs = (attended, hidden) if self._parallel else (attended,)
        return recomputed(mlp_half, self._clock, *inputs) if again == "mlp" else mlp_half(*inputs)

    def run(self, hidden: Tensor, mask: AttentionMask | None, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, H] -> [B, T, H], with the recomputation that the block is built with."""
        if self.training and self._recompute == "full":
            with self._inputs.instead_of(hidden) if self._inputs else nullcontext():
                return recomputed(self, self._clock, hidden, mask)
        result = self(hidden, mask, cache)
        assert isinstance(result, Tensor)
        return result

    def compile_graphs(self, **options: Any) -> None:
        """Compile the block as one graph, or each half as one where the backward pass recomputes a half.

        Of an MLP in tiles a tile is a graph; experts run as they are.
        """
        compiled = partial(torch.compile, dynamic=False, **options)
        if self._tiles is not None:
            self._tiles.compile(**options)
            self._compiled_halves = compiled(self._attention_half), self._mlp_half
        elif isinstance(self.mlp, MixtureOfExperts):
            self._compiled_halves = compiled(self._attention_half), self._mlp_half
        elif self._recompute in ("attention", "mlp"):
            self._compiled_halves = compiled(self._attention_half), compiled(self._mlp_half)
        else:
            self.compile(dynamic=False, **options)

    def _attention_half(self, hidden: Tensor, mask: AttentionMask | None, cache: KeyValueCache | None = None) -> Tensor:
        attended = self._after(self.attention_norm, hidden, lambda normed: self.attention(normed, mask, cache))
        if self.attention_output_norm is not None:
            attended = self.attention_output_norm(attended)
        return hidden + self.attention_dropout(attended)

    def _mlp_half(self, hidden: Tensor, source: Tensor | None = None) -> Tensor:
        """hidden + the MLP of `source`, by default of `hidden`."""
        source = hidden if source is None else source
        if self._tiles is not None:
            return hidden + self.mlp_dropout(self._tiles(source))
        computed = self._after(self.mlp_norm, source, self.mlp)
        if self.mlp_output_norm is not None:
            computed = self.mlp_output_norm(computed)
        return hidden + self.mlp_dropout(computed)

    def _after(self, norm: nn.Module | None, hidden: Tensor, layers: Callable[[Tensor], Tensor]) -> Tensor:
        """layers(norm(hidden))."""
        if norm is None:
            return layers(hidden)
        if self.training and self._recompute == "norms":
            return of_recomputed_norm(norm, hidden, layers)
        return layers(norm(hidden))


class Embedding(nn.Module):
    """Token embeddings, scaled or not, plus learned positions, which start again with each document under a mask."""

    def __init__(self, shape: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.tokens = layers.embedding(shape.vocab_size, shape.hidden_size)
        self.scale = shape.embedding_scale
        learned = shape.position_embedding_type == "learned_absolute"
        self.positions = layers.positions(shape.max_position_embeddings, shape.hidden_size) if learned else None
        self.dropout = layers.dropout(shape.dropout, 0, "embedding", sharded=False)

    def forward(self, tokens: Tensor, documents: Tensor | None, start: int = 0) -> Tensor:
        """[B, T] tokens -> [B, T, H]; positions count from `start`."""
        hidden: Tensor = self.tokens(tokens)
        if self.scale is not None:
            hidden = hidden * hidden.new_full((), self.scale)  # rounded to its precision, as in transformers
        if self.positions is not None:
            hidden = hidden + self.positions(start + hidden.shape[1], documents)[..., start:, :]
        return self.dropout(hidden)


class LanguageModelHead(nn.Module):
    """The output projection and, with labels, the loss.

    It owns (or shares) the weight and loops over chunks itself, so that ZeRO 3's gather, tied weights and the
    pipeline's last stage all work with this one module.
    """

    def __init__(
        self, weight: nn.Parameter, output: VocabularyOutput, chunk_tokens: int, width_multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = weight
        self.output = output
        self.chunk_tokens = chunk_tokens
        self.width_multiplier = width_multiplier

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, T, H] of the residual stream, [B, T] -> (fp32 loss sum, number of labels).

        Without labels: logits [B, T, V], or [B, V] at `positions` [B], one for each sequence.
        """
        hidden = self.output.whole(hidden)
        if self.width_multiplier != 1:
            hidden = hidden / self.width_multiplier
        if labels is not None:
            loss = self.output.loss(hidden.flatten(0, 1), self.weight, labels.flatten(), self.chunk_tokens)
            return loss, (labels != IGNORE).sum()
        if positions is not None:
            hidden = self.output.sequence.rows(hidden, positions)
        return self.output.logits(hidden, self.weight)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


class _EmptyParameters(TorchFunctionMode):
    """Modules built under it allocate their parameters on `device` in `dtype`, and do not fill them."""

    _FILL = frozenset((Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_))

    def __init__(self, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._options = {"device": device, "dtype": dtype}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **(kwargs | self._options))
        if function in self._FILL or getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@dataclass(frozen=True)
class ParameterInit:
    """Where the parameters of a stage come to lie, and how they get their values.

    Attributes:
        device: of parameters and buffers; by default the CPU.
        dtype: of parameters; buffers have their own types.
        fill: takes each stage that has parameters, still empty, and the stage's path in `LanguageModel`, before the
            next stage is built. It may replace the parameters' data.
    """

    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    fill: Callable[[str, nn.Module], None] = lambda path, stage: None


class StageBuilder:
    """Builds the model's stages one by one: all of them for `LanguageModel`, its own ones for a pipeline rank.

    Args:
        shape: all dimensions.
        layers: the factory of linear, vocabulary and dropout layers.
        clock: the moving part of dropout's seeds.
        chunk_tokens: tokens whose logits are held at once by the loss.
        init: of the parameters, which are left empty by default.
        recomputation: what the backward pass computes again.
    """

    def __init__(
        self,
        shape: ModelConfig,
        layers: LayerFactory,
        clock: DropoutClock,
        chunk_tokens: int,
        init: ParameterInit = ParameterInit(),
        recomputation: Recomputation = KEEP_ALL,
    ) -> None:
        self.shape = shape
        self.slices = layers.slices
        self.sequence = layers.sequence
        self.weight_gradients = layers.weight_gradients
        self._layers = layers
        self._clock = clock
        self._chunk_tokens = chunk_tokens
        self._init = init
        self._recomputation = recomputation
        self._rotations: dict[bool, RotaryEmbedding] = {}

    def token_table(self) -> nn.Module:
        """The embedding table alone, whose `weight` the head may share."""
        size = self.shape.vocab_size, self.shape.hidden_size
        return self._built("embedding.tokens", lambda: self._layers.embedding(*size))

    def embedding(self) -> Embedding:
        return self._built("embedding", lambda: Embedding(self.shape, self._layers))

    def block(self, index: int) -> Block:
        parts = self.shape, self._layers, self._rotation(index), self._clock
        return self._built(f"layers.{index}", lambda: Block(*parts, index + 1, self._recomputation))

    def _rotation(self, index: int) -> RotaryEmbedding | None:
        """The tables of a block: layers with a sliding window have their own theta, and no scaling."""
        shape = self.shape
        if not shape.rotates(index):
            return None
        local = shape.window(index) is not None
        if local not in self._rotations:
            theta = (local and shape.rope_local_theta) or shape.rope_theta
            scaling = None if local else shape.rope_scaling
            tables = RotaryEmbedding(shape.rotary_dim, shape.max_position_embeddings, theta, scaling)
            self._rotations[local] = tables.to(self._init.device)
        return self._rotations[local]

    def final_norm(self) -> nn.Module:
        return self._built("final_norm", lambda: self._layers.replicated(norm(self.shape), sharded=False))

    def head(self, table: nn.Module | None) -> LanguageModelHead:
        """The head with the weight of `table`, or with its own where the model does not tie them."""
        size = self.shape.vocab_size, self.shape.hidden_size
        output = self._layers.output(self.shape.vocab_size, self.shape.final_logit_softcapping)
        options = output, self._chunk_tokens, self.shape.width_multiplier
        if not self.shape.tie_word_embeddings:
            return self._built("head", lambda: LanguageModelHead(self._layers.vocabulary_weight(*size), *options))
        assert table is not None
        assert isinstance(table.weight, nn.Parameter)
        return LanguageModelHead(table.weight, *options)

    def _built(self, path: str, make: Callable[[], AnyModule]) -> AnyModule:
        with _EmptyParameters(self._init.device, self._init.dtype):
            stage = make()
        self._init.fill(path, stage)
        return stage


class LanguageModel(nn.Module):
    """A decoder-only transformer; every parameter's name here is its canonical name.

    Args: those of `StageBuilder`; by default layers are undivided.

    Attributes:
        gradient_down_to: the block whose input gets a gradient, even if no parameter below it trains.
    """

    def __init__(
        self,
        shape: ModelConfig,
        layers: LayerFactory | None = None,
        clock: DropoutClock | None = None,
        chunk_tokens: int = 1024,
        init: ParameterInit = ParameterInit(),
        recomputation: Recomputation = KEEP_ALL,
    ) -> None:
        super().__init__()
        clock = clock or DropoutClock(seed=0)
        layers = layers or LayerFactory(clock)
        build = StageBuilder(shape, layers, clock, chunk_tokens, init, recomputation)
        self.slices, self.sequence = build.slices, build.sequence
        self._shape = shape
        self.gradient_down_to: int | None = None
        self.embedding = build.embedding()
        self.layers = nn.ModuleList(build.block(index) for index in range(shape.num_hidden_layers))
        self.final_norm = build.final_norm()
        self.head = build.head(self.embedding.tokens)

    def compile_blocks(self, **options: Any) -> None:
        """Run every block compiled: one graph serves all of them, and parameters keep their names.

        Blocks compile once for all layers, in seconds, and DeepSpeed's hooks on the model stay outside their graph.

        Args:
            options: for `torch.compile`.
        """
        for block in self.layers:
            assert isinstance(block, Block)
            block.compile_graphs(**options)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss with labels, logits without.

        Args:
            tokens: [B, T] int64.
            labels: [B, T] int64, IGNORE where the loss leaves a token out.
            documents: [B, T] document numbers; tokens attend within their own document only.
            positions: [B] the position in each sequence whose logits are returned.

        Returns:
            (fp32 sum of losses, number of labels), or logits [B, T, V], or [B, V] with `positions`.
        """
        return self.head(self.hidden_states(tokens, documents), labels, positions)

    def hidden_states(
        self, tokens: Tensor, documents: Tensor | None = None, caches: Sequence[KeyValueCache] = ()
    ) -> Tensor:
        """The input [B, T, H] of the head.

        Args:
            caches: keys and values of the tokens before these, one for each block; they take those of `tokens` too.
        """
        mask = attention_mask(self._shape, tokens.shape[1] * self.sequence.parts, tokens.device, documents)
        hidden = self.embedding(tokens, documents, len(caches[0]) if caches else 0)
        for index, block in enumerate(self.layers):
            assert isinstance(block, Block)
            if index == self.gradient_down_to and torch.is_grad_enabled() and not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            hidden = block.run(hidden, mask, caches[index] if caches else None)
        hidden = self.final_norm(hidden)
        assert isinstance(hidden, Tensor)
        return hidden


# Initial weights are a function of (seed, canonical name), so that every layout starts from the same model.

_RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight", "mlp.experts.down", "mlp.shared.down.weight")


def initial_weight(
    name: str, size: tuple[int, ...], shape: ModelConfig, seed: int, held: AllExperts = ALL_EXPERTS
) -> Tensor:
    """The full, unsharded fp32 weight `name` on the CPU.

    Norm gains are 1, biases and sinks 0 and matrices normal with `initializer_range`. The projections that write to the
    residual stream are divided by sqrt(2 x layers), as in GPT-2 (Radford et al., 2019), and the blocks' matrices by the
    root of the width multiplier. Of stacked experts each has a name of its own: that of them all with its number.

    Args:
        held: which experts are drawn; the others stay as the memory was.
    """
    if is_stacked(name) and len(size) > 2:
        stacked = torch.empty(size)
        for expert in range(*held.held(size[0])):
            stacked[expert] = initial_weight(f"{name}.{expert}", size[1:], shape, seed)
        return stacked
    if name.endswith((".bias", ".sinks")):
        return torch.zeros(size)
    if "norm" in name:
        return torch.zeros(size) if shape.norm_zero_centered else torch.ones(size)
    std = shape.initializer_range
    if _of_all_experts(name).endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * shape.num_hidden_layers)
    if name.startswith("layers.") and len(size) == 2:
        std /= math.sqrt(shape.width_multiplier)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(size, generator=generator).mul_(std)


def _of_all_experts(name: str) -> str:
    """The parameter that holds an expert `layers.0.mlp.experts.down.7`."""
    return re.sub(r"(\.mlp\.experts\.\w+)\.\d+$", r"\1", name)


@torch.no_grad()
def initialize(model: nn.Module, shape: ModelConfig, seed: int) -> None:
    """Fill every parameter; a shared weight is filled once, under its first name.

    A shard is cut out of the whole weight, so all layouts start equal, bit for bit. One whole weight exists at a time.
    """
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        parameter.copy_(shard.cut(initial_weight(name, shard.shape, shape, seed)))
