"""What a person is told of a pipeline before training: its stages, and how long they wait for each other."""

from __future__ import annotations

from megalm.config.resolve import ResolvedRun
from megalm.estimate.balance import LARGE_BUBBLE, SMALL_BUBBLE, StageCosts, micro_batches_for
from megalm.topology import bubble_share


def pipeline_facts(run: ResolvedRun, blocks: tuple[int, ...], costs: StageCosts) -> str:
    """A line on the stages, one on the bubble, and a warning where that is large."""
    stages, micro_batches = run.topology.pipeline, run.batch.accumulation
    bubble = bubble_share(stages, micro_batches)
    by_stage = costs.of_stages(blocks)
    shares = " + ".join(f"{cost / sum(by_stage):.0%}" for cost in by_stage)
    what = "the parameters" if run.config.parallel.balance == "parameters" else "the measured time"
    waits = f"(stages - 1) / (micro-batches + stages - 1) = {stages - 1}/{micro_batches + stages - 1}"
    lines = [
        f"  pipeline: {stages} stages of {' + '.join(map(str, blocks))} blocks, "
        f"with embedding and head {shares} of {what}",
        f"  bubble: each stage waits {bubble:.0%} of a step, {waits}: the first micro-batch fills the pipeline, "
        "the last one empties it",
    ]
    if bubble > LARGE_BUBBLE:
        lines.append(
            f"  WARNING: {micro_batches} micro-batch(es) a step keep {stages} stages busy {1 - bubble:.0%} of the "
            f"time; {micro_batches_for(stages, SMALL_BUBBLE)} keep them busy {1 - SMALL_BUBBLE:.0%}: lower "
            "train_micro_batch_size_per_gpu, raise train_batch_size, or use fewer stages"
        )
    return "\n".join(lines)
