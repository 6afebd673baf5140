"""The pipeline engine: each rank holds one or several stages of the model, and ZeRO 0 or 1 their optimizer's states.

Shapes: B micro-batch, T sequence, H hidden, V vocabulary. The schedule is a list of actions, run by `StageExecutor`;
DeepSpeed sees a model of which it does neither forward nor backward, only the sum of gradients and the update.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.engine.base_engine import EngineBase, EngineContext
from megalm.engine.pipeline.stage_executor import StageExecutor, Step, with_transfers
from megalm.model.attention_kernels import AttentionMask, attention_mask
from megalm.model.layer_factory import VocabularyOutput, annotate_shard, shard_of
from megalm.model.model_config import lowest_block
from megalm.model.parameter_groups import frozen_parameters
from megalm.model.transformer import Block, Embedding, LanguageModelHead, StageBuilder


@dataclass(frozen=True)
class StageInput:
    """A micro-batch's data that stages need besides hidden states, on this rank's device.

    Attributes:
        tokens: [B, T], this rank's positions.
        labels: [B, T], for the loss; None: logits.
        documents: [B, T] document numbers of whole sequences; None: a sample is one document.
        positions: [B], the position in each sequence whose logits to compute.
    """

    tokens: Tensor
    labels: Tensor | None
    documents: Tensor | None = None
    positions: Tensor | None = None


class TokenTable(nn.Module):
    """The tied weight alone, on a last stage that is not the first."""

    def __init__(self, build: StageBuilder) -> None:
        super().__init__()
        self.tokens = build.token_table()


class PipelinePart(nn.Module):
    """This rank's stages of the model. No rank builds the blocks of another one.

    The parameters' names are canonical: blocks, embedding and head have their paths in `LanguageModel`. The caller must
    initialize the weights.

    Args:
        build: the model's parts.
        blocks: number of blocks of each stage.
        stages: of this rank, in their order.
    """

    def __init__(self, build: StageBuilder, blocks: Sequence[int], stages: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.slices = build.shape, build.slices
        self.weight_gradients = build.weight_gradients
        self.stages = tuple(stages)
        self._ends = tuple(accumulate(blocks))
        self._blocks = {stage: range(self._ends[stage] - blocks[stage], self._ends[stage]) for stage in stages}
        self.last = len(blocks) - 1
        is_first, is_last = 0 in stages, self.last in stages
        tied = build.shape.tie_word_embeddings
        self.embedding: Embedding | TokenTable | None = None
        if is_first:
            self.embedding = build.embedding()
        elif is_last and tied:
            self.embedding = TokenTable(build)
        table = None if self.embedding is None else self.embedding.tokens
        self._copies: list[nn.Parameter] = []  # a list is not registered again
        if tied and is_first != is_last:
            assert table is not None
            assert isinstance(table.weight, nn.Parameter)
            self._copies.append(table.weight)
            if is_last:  # the first stage owns it
                annotate_shard(table.weight, replace(shard_of(table.weight), is_owner=False))
        self.layers = nn.ModuleDict({str(index): build.block(index) for own in self._blocks.values() for index in own})
        self.final_norm: nn.Module | None = None
        self.head: LanguageModelHead | None = None
        if is_last:
            self.final_norm = build.final_norm()
            self.head = build.head(table)

    @property
    def tied(self) -> nn.Parameter | None:
        """The weight that both the first and the last stage hold, where another rank has the other copy."""
        return self._copies[0] if self._copies else None

    @property
    def output(self) -> VocabularyOutput | None:
        """From hidden states to the loss, on the rank of the last stage."""
        return None if self.head is None else self.head.output

    def compile_blocks(self) -> None:
        for block in self.layers.values():
            assert isinstance(block, Block)
            block.compile_graphs()

    def stage_of(self, block: int) -> int:
        """Return the stage of a block of the model; the last one for what comes after all blocks."""
        return min(bisect(self._ends, block), self.last)

    def run_stage(self, stage: int, hidden: Tensor | None, data: StageInput, mask: AttentionMask | None) -> Tensor:
        """Return a stage's hidden states [B, T, H], and of the last one the sum of losses, or logits without labels.

        Args:
            hidden: of the stage before; None: it is the first.
        """
        if hidden is None:
            assert isinstance(self.embedding, Embedding)
            hidden = self.embedding(data.tokens, data.documents)
        for index in self._blocks[stage]:
            block = self.layers[str(index)]
            assert isinstance(block, Block)
            hidden = block.run(hidden, mask)
        if stage < self.last:
            return hidden
        assert self.final_norm is not None
        assert self.head is not None
        result = self.head(self.final_norm(hidden), data.labels, data.positions)
        return result if data.labels is None else result[0]


class PipelineEngine(EngineBase):
    """Trains this rank's initialized stages together with the other ranks."""

    def __init__(self, part: PipelinePart, context: EngineContext) -> None:
        super().__init__(part, context, part.output)
        self._part = part
        self._pipeline = context.groups.pipeline
        self._schedule = context.run.pipeline
        self._stage_ranks = self._schedule.stage_ranks
        self._dtype = next(part.parameters()).dtype
        frozen = frozen_parameters(context.shape, context.run.config.train.parameter_groups)
        self._lowest = part.stage_of(lowest_block(context.shape, frozen))
        self._steps: dict[tuple[int, bool], list[Step]] = {}
        optimizer = self._engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            for group, parameters in enumerate(optimizer.bf16_groups):
                for index, parameter in enumerate(parameters):
                    parameter.register_post_accumulate_grad_hook(partial(_add_to_fp32, optimizer, group, index))

    def _run_step(self, batch: GlobalBatch, step: int) -> None:
        engine = self._engine
        # ZeRO averages gradients over ranks; the loss is a mean over the targets of the *global* batch.
        factor = self._state.loss_scale() * self._replicas / batch.divisor
        total = torch.zeros((), device=self._device)
        inputs = [StageInput(*self._tensors(micro_batch)) for micro_batch in batch.micro_batches]

        def finish(loss_sum: Tensor) -> Tensor:
            total.add_(loss_sum.detach())
            return loss_sum * factor

        engine.set_gradient_accumulation_boundary(False)
        self._run(inputs, finish, partial(self._begin_micro_batch, batch, step))
        with self._phase("reduce"):
            self._sum_tied_gradients()
            self._reduce_gradients()
        self._arm_check(total, batch.divisor)
        with self._phase("update"):
            engine._take_model_step({})

    def _loss_sum(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        total = torch.zeros((), device=self._device)
        self._run([StageInput(*self._tensors(micro_batch)) for micro_batch in micro_batches], total.add_)
        return total

    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        found = torch.empty(len(tokens), self._part.shape.vocab_size, device=self._device)
        self._run([StageInput(tokens, None, None, positions)], found.copy_)
        source = self._pipeline.ranks[self._stage_ranks[-1]]
        dist.broadcast(found, src=source, group=self._pipeline.process_group)
        return found

    def _run(
        self,
        inputs: Sequence[StageInput],
        finish: Callable[[Tensor], Tensor],
        begin: Callable[[int], None] | None = None,
    ) -> None:
        """Run all stages for these micro-batches.

        Args:
            finish: takes what the last stage makes of a micro-batch; in training it returns what is minimised.
            begin: called before each forward pass of a training step with the micro-batch's index; None: no training.
        """
        masks: dict[int, AttentionMask | None] = {}
        own = self._part.stages

        def run_stage(stage: int, hidden: Tensor | None, index: int) -> Tensor:
            data = inputs[index]
            if begin is not None:
                begin(index)
            if stage == own[0]:
                length = data.tokens.shape[1] * self._sequence.parts
                masks[index] = attention_mask(self._part.shape, length, self._device, data.documents)
            mask = masks.pop(index) if stage == own[-1] else masks[index]
            output = self._part.run_stage(stage, hidden, data, mask)
            return finish(output) if stage == self._part.last else output

        def empty(index: int) -> Tensor:
            sequences, length = inputs[index].tokens.shape
            size = sequences, length // self._part.slices, self._part.shape.hidden_size
            return torch.empty(size, dtype=self._dtype, device=self._device)

        trains, part = begin is not None, self._part
        lowest = self._lowest if trains else None
        executor = StageExecutor(
            run_stage, self._pipeline, part.last, empty, lowest, self._phase, part.weight_gradients
        )
        executor.run(self._steps_of(len(inputs), trains))

    def _steps_of(self, micro_batches: int, trains: bool) -> list[Step]:
        """Return this rank's steps; they differ by the number of micro-batches."""
        if (micro_batches, trains) not in self._steps:
            schedule = replace(self._schedule, micro_batches=micro_batches)
            orders = [schedule.actions(rank) for rank in range(schedule.ranks)]
            if not trains:
                orders = [tuple(action for action in order if action.kind == "F") for order in orders]
            of_ranks = with_transfers(orders, schedule.stage_ranks, self._lowest)
            self._steps[micro_batches, trains] = of_ranks[self._pipeline.index]
        return self._steps[micro_batches, trains]

    def _reduce_gradients(self) -> None:
        """Average gradients over the ranks that hold the same weights."""
        engine, optimizer = self._engine, self._engine.optimizer
        engine.set_gradient_accumulation_boundary(True)
        if hasattr(optimizer, "setup_buckets"):  # a stage without gradients has none yet
            optimizer.setup_buckets()
        engine.allreduce_gradients()

    def _sum_tied_gradients(self) -> None:
        """Add the first and the last stage's gradient of their common weight up; both get the same bits."""
        if self._part.tied is None or not self._part.tied.requires_grad:
            return
        gradient = self._gradient_of(self._part.tied)
        theirs = torch.empty_like(gradient)
        ranks, group = self._pipeline.ranks, self._pipeline.process_group
        first, last = (ranks[self._stage_ranks[stage]] for stage in (0, -1))
        own_rank = ranks[self._pipeline.index]
        for source, target in ((first, last), (last, first)):
            if own_rank == source:
                dist.send(gradient, dst=target, group=group)
            else:
                dist.recv(theirs, src=source, group=group)
        gradient.add_(theirs)

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor:
        """Return the gradient of all micro-batches, where DeepSpeed will read it."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            gradient = parameter._hp_grad  # type: ignore[attr-defined]
        elif self._stage:
            gradient = optimizer.get_gradient_for_reduction(parameter)
        else:
            gradient = parameter.grad
        assert isinstance(gradient, Tensor)
        return gradient


def _add_to_fp32(optimizer: BF16_Optimizer, group: int, index: int, parameter: nn.Parameter) -> None:
    """Add a gradient to DeepSpeed's sum in fp32 as soon as it is there, so that never all of them exist."""
    optimizer._update_hp_grad(parameter, group, index, clear_lp_grads=False)
    parameter.grad = None
