"""How many blocks each pipeline stage holds, and how many micro-batches keep the stages busy: no torch.

The embedding belongs to the first stage, the final norm and the head to the last. Every stage holds a block at least:
its parameters then fall into the same groups of the optimizer as every other stage's, which DeepSpeed's gradient norm,
one exchange a group, relies on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalm.model.model_config import ModelConfig

LARGE_BUBBLE = 0.2  # a larger share of waiting is worth a warning
SMALL_BUBBLE = 0.1  # what the warning's advice comes to


@dataclass(frozen=True)
class StageCosts:
    """What is balanced: parameters, or seconds of one forward and backward pass.

    Args:
        embedding: token table and positions.
        block: one block.
        head: final norm, output projection and loss; a tied weight counts here and in `embedding`.
    """

    embedding: float
    block: float
    head: float

    def of_stages(self, blocks: tuple[int, ...]) -> tuple[float, ...]:
        """The cost of each stage that holds so many blocks."""
        costs = [count * self.block for count in blocks]
        costs[0] += self.embedding
        costs[-1] += self.head
        return tuple(costs)


def parameter_costs(shape: ModelConfig) -> StageCosts:
    """Parameters of the unsharded parts."""
    counts = {name: math.prod(size) for name, size in shape.parameters().items()}
    embedding = sum(count for name, count in counts.items() if name.startswith("embedding."))
    block = sum(count for name, count in counts.items() if name.startswith("layers.0."))
    projection = shape.vocab_size * shape.hidden_size  # tied or not, the last stage holds it and computes with it
    norm = sum(count for name, count in counts.items() if name.startswith("final_norm."))
    return StageCosts(embedding, block, norm + projection)


def balanced_blocks(layers: int, stages: int, costs: StageCosts) -> tuple[int, ...]:
    """Blocks per stage such that the costliest stage is as cheap as possible.

    Blocks are alike, so handing them out one by one, each to the stage that is cheapest so far, is optimal. Of equals
    the later stage takes it: earlier ones keep the activations of more micro-batches.
    """
    assert 1 <= stages <= layers, (stages, layers)
    blocks = [1] * stages
    for _ in range(layers - stages):
        loads = costs.of_stages(tuple(blocks))
        cheapest = min(range(stages), key=lambda stage: (loads[stage], -stage))
        blocks[cheapest] += 1
    return tuple(blocks)


def micro_batches_for(stages: int, bubble: float) -> int:
    """The fewest micro-batches a step with which each stage waits for at most `bubble` of it."""
    return math.ceil(round((stages - 1) * (1 - bubble) / bubble, 6))  # 12.000000000000002 is 12
