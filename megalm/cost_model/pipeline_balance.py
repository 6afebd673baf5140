"""The number of blocks of each pipeline stage, and of micro-batches that keep the ranks busy: no torch.

The embedding belongs to the first stage, the final norm and the head to the last. Every stage holds at least one block,
so that all stages have the same optimizer groups: DeepSpeed's gradient norm communicates once per group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from megalm.model.model_config import ModelConfig
from megalm.parallel.pipeline_schedules import PipelineSchedule

LARGE_BUBBLE = 0.2  # a larger share of waiting causes a warning
SMALL_BUBBLE = 0.1  # the warning recommends micro-batches for this share


@dataclass(frozen=True)
class StageCosts:
    """The costs that stages balance: parameters, or seconds of one forward and backward pass.

    Args:
        embedding: token table and positions.
        block: one block, the mean of all where some have experts and others one MLP.
        head: final norm, output projection and loss; a tied weight counts in both `head` and `embedding`.
    """

    embedding: float
    block: float
    head: float

    def of_stages(self, blocks: tuple[int, ...]) -> tuple[float, ...]:
        """The cost of each stage, given the number of its blocks."""
        costs = [count * self.block for count in blocks]
        costs[0] += self.embedding
        costs[-1] += self.head
        return tuple(costs)


def parameter_costs(shape: ModelConfig) -> StageCosts:
    """Parameters of the unsharded parts."""
    counts = {name: math.prod(size) for name, size in shape.parameters().items()}
    embedding = sum(count for name, count in counts.items() if name.startswith("embedding."))
    block = sum(count for name, count in counts.items() if name.startswith("layers.")) / shape.num_hidden_layers
    projection = shape.vocab_size * shape.hidden_size  # tied or not, the last stage holds it and computes with it
    norm = sum(count for name, count in counts.items() if name.startswith("final_norm."))
    return StageCosts(embedding, block, norm + projection)


def balanced_blocks(layers: int, stage_ranks: Sequence[int], costs: StageCosts) -> tuple[int, ...]:
    """The blocks of each stage that make the costliest rank as cheap as possible, and then its costliest stage.

    Blocks cost the same, so it is optimal to assign each to the rank that is cheapest so far. Among equal ranks and
    stages the latest takes it, because earlier ones keep the activations of more micro-batches.

    Args:
        stage_ranks: the rank of each stage.
    """
    assert 1 <= len(stage_ranks) <= layers, (stage_ranks, layers)
    blocks = [1] * len(stage_ranks)
    for _ in range(layers - len(blocks)):
        loads = costs.of_stages(tuple(blocks))
        ranks = [0.0] * (1 + max(stage_ranks))
        for load, rank in zip(loads, stage_ranks, strict=True):
            ranks[rank] += load
        blocks[min(range(len(blocks)), key=lambda it: (ranks[stage_ranks[it]], -stage_ranks[it], loads[it], -it))] += 1
    return tuple(blocks)


def balanced_by_parameters(shape: ModelConfig, stage_ranks: Sequence[int]) -> tuple[int, ...]:
    """`balanced_blocks` by parameters; a rank that has both the first and the last stage holds a tied table once."""
    costs = parameter_costs(shape)
    if shape.tie_word_embeddings and stage_ranks[0] == stage_ranks[-1]:
        costs = replace(costs, embedding=costs.embedding - shape.vocab_size * shape.hidden_size)
    return balanced_blocks(shape.num_hidden_layers, stage_ranks, costs)


def micro_batches_for(schedule: PipelineSchedule, bubble: float) -> int:
    """The smallest number of micro-batches per step with which each rank waits for at most `bubble` of it."""
    return next(it for it in count(1) if replace(schedule, micro_batches=it).bubble_share <= bubble)
