"""The part of the model on this rank, as layers of DeepSpeed's PipelineModule.

Shapes: B micro-batch, T sequence, H hidden.

Only hidden states are sent between stages. Every rank of a pipeline reads the batch itself; labels and document numbers
come from the `MicroBatchContext`, which the engine sets before each forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megalm.engine.deepspeed_patches import prints_to_log
from megalm.model.attention_kernels import AttentionMask, attention_mask
from megalm.model.layer_factory import VocabularyOutput, annotate_shard, shard_of
from megalm.model.model_config import ModelConfig
from megalm.model.modules import DropoutClock
from megalm.model.transformer import LanguageModelHead, StageBuilder
from megalm.topology import Topology

_TIED = "tokens"


@dataclass
class MicroBatchContext:
    """The current micro-batch's data that a stage's layers need besides hidden states.

    Args:
        clock: of the dropout layers.
        shape: of the whole model.
        parts: number of ranks that divide each sequence.

    Attributes:
        documents: [B, T] document numbers; None: a sample is one document.
        mask: of attention, made once for all blocks of the stage.
        labels: [B, T], for the loss; None to compute logits.
        positions: [B], the position in each sequence whose logits to compute.
    """

    clock: DropoutClock
    shape: ModelConfig
    parts: int = 1
    documents: Tensor | None = field(default=None, init=False)
    mask: AttentionMask | None = field(default=None, init=False)
    labels: Tensor | None = field(default=None, init=False)
    positions: Tensor | None = field(default=None, init=False)

    def set(
        self,
        tokens: Tensor,
        documents: Tensor | None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Set the data of the next forward pass; `tokens` are this rank's."""
        self.documents, self.labels, self.positions = documents, labels, positions
        self.mask = attention_mask(self.shape, tokens.shape[1] * self.parts, tokens.device, documents)


class EmbeddingLayer(nn.Module):
    """[B, T] tokens, or their embeddings [B, T, H] if the table is tied -> [B, T, H]."""

    def __init__(self, build: StageBuilder, context: MicroBatchContext, own_table: bool) -> None:
        super().__init__()
        self.embedding = build.embedding(own_table)
        self._context = context

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens, self._context.documents)


class TokenTable(nn.Module):
    """The tied weight alone: DeepSpeed would share any other parameter of this module too."""

    def __init__(self, build: StageBuilder) -> None:
        super().__init__()
        self.tokens = build.token_table()

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, H]
        return self.tokens(tokens)


class BlockLayer(nn.Module):
    """A block of the model."""

    def __init__(self, build: StageBuilder, context: MicroBatchContext, index: int) -> None:
        super().__init__()
        self.index = index
        self.block = build.block(index)
        self._context = context

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        return self.block.run(hidden, self._context.mask)


class NormLayer(nn.Module):
    """[B, T, H] -> [B, T, H]"""

    def __init__(self, build: StageBuilder) -> None:
        super().__init__()
        self.norm = build.final_norm()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class HeadLayer(nn.Module):
    """Holds an untied head. Returns hidden states unchanged: `PipelineStage._output` applies the head."""

    def __init__(self, build: StageBuilder) -> None:
        super().__init__()
        self.head = build.head(None)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class PipelineStage(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """This rank's layers. No rank builds the layers of another stage.

    The caller must initialize the weights, by canonical name.

    Args:
        build: the model's stages, in the order of `LanguageModel`.
        context: shared with the engine.
        topology: pipeline outermost, then data x context, which DeepSpeed calls data, then tensor, as in DeepSpeed.
        blocks: number of blocks of each stage.

    Attributes:
        loss_factor: multiplies the returned loss of a micro-batch.
        loss_sum: sum of micro-batch losses in nats since it was last set to zero; last stage only.
    """

    def __init__(
        self, build: StageBuilder, context: MicroBatchContext, topology: Topology, blocks: tuple[int, ...]
    ) -> None:
        tied = build.shape.tie_word_embeddings
        layers: list[Any] = [LayerSpec(EmbeddingLayer, build, context, not tied)]
        if tied:
            layers.insert(0, TiedLayerSpec(_TIED, TokenTable, build, tied_weight_attr="tokens.weight"))
        first = len(layers)
        for index in range(sum(blocks)):
            layers.append(LayerSpec(BlockLayer, build, context, index))
        layers.append(LayerSpec(NormLayer, build))
        layers.append(
            TiedLayerSpec(_TIED, TokenTable, build, forward_fn=_identity, tied_weight_attr="tokens.weight")
            if tied
            else LayerSpec(HeadLayer, build)
        )
        # A layer, not a `loss_fn`: DeepSpeed's bf16 optimizer clears gradients when the backward pass reaches the
        # module's output, and would clear those already computed for the head.
        layers.append(self._output)
        # Read by _partition_layers, which the base class calls in its constructor.
        self._blocks = tuple(blocks)
        self._bounds = [0, *(first + sum(blocks[: stage + 1]) for stage in range(len(blocks) - 1)), len(layers)]
        grid = PipeModelDataParallelTopology(
            num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data_context
        )
        with prints_to_log(), torch.no_grad():  # it broadcasts the tied weight, which autograd would record
            super().__init__(layers=layers, topology=grid)
        self._tied = tied
        self.context = context
        self.loss_factor = 1.0
        self.loss_sum: Tensor | float = 0.0
        self.vocab_size, self.hidden_size = build.shape.vocab_size, build.shape.hidden_size
        self.slices, self.sequence = build.slices, build.sequence
        self.is_first, self.is_last = self.stage_id == 0, self.stage_id == self.num_stages - 1
        if tied and not self.is_first:
            for table in self.tied_modules.parameters():  # the first stage owns the shared weight
                annotate_shard(table, replace(shard_of(table), is_owner=False))
        # In a list, so that it is not registered again: its weight already belongs to a layer.
        self._heads = [self._make_head(build)] if self.is_last else []

    def compile_blocks(self) -> None:
        for layer in self.forward_funcs:
            if isinstance(layer, BlockLayer):
                layer.block.compile_graphs()

    def stage_of(self, block: int) -> int:
        """Return the stage of a block; the last one for what comes after all blocks."""
        ends = accumulate(self._blocks)
        return next((stage for stage, end in enumerate(ends) if block < end), self.num_stages - 1)

    @property
    def output(self) -> VocabularyOutput | None:
        """From hidden states to the loss, on the last stage."""
        return self._heads[0].output if self._heads else None

    def part_of_model(self) -> nn.Module:
        """Return this rank's modules under their paths in `LanguageModel`: `named_parameters` gives canonical names."""
        part = nn.Module()
        if self.tied_modules:
            _place(part, "embedding.tokens", self.tied_modules[_TIED].tokens)
        for layer in self.forward_funcs:
            if isinstance(layer, EmbeddingLayer):
                for name, module in layer.embedding.named_children():
                    _place(part, f"embedding.{name}", module)
            elif isinstance(layer, BlockLayer):
                _place(part, f"layers.{layer.index}", layer.block)
            elif isinstance(layer, NormLayer):
                _place(part, "final_norm", layer.norm)
            elif isinstance(layer, HeadLayer):
                _place(part, "head", layer.head)
        return part

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(self._bounds[self.stage_id], self._bounds[self.stage_id + 1])

    def _output(self, hidden: Tensor) -> Tensor:
        """The last layer: return the loss times `loss_factor`, or logits if there are no labels."""
        (head,) = self._heads
        context = self.context
        if context.labels is None:
            return head(hidden, positions=context.positions)
        loss, _ = head(hidden, context.labels)
        self.loss_sum = self.loss_sum + loss.detach()
        return loss * self.loss_factor

    def _make_head(self, build: StageBuilder) -> LanguageModelHead:
        if self._tied:
            return build.head(self.tied_modules[_TIED].tokens)
        (layer,) = (layer for layer in self.forward_funcs if isinstance(layer, HeadLayer))
        return layer.head


def _identity(table: nn.Module, hidden: Tensor) -> Tensor:
    return hidden


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(last, module)
