"""The budget of a training step on a GPU, layout by layout: one table, to be lowered as the engine gets better.

`python -m tests.gpu_rehearsal.budgets` prints the numbers as they are today. A wait is an occasion on which the host
waits for the device: it reads a value or a size, copies without pinned memory, or synchronizes. All numbers are of one
step of one rank with `ACCUMULATION` micro-batches.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.cli.plan import planned
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_process import rehearse_all
from megalm.rehearsal.rehearsal_report import WAITS, EventKind, Rehearsal, RehearsalCase
from megalm.runs.run_settings import read_settings

ACCUMULATION, MICRO_BATCH = 2, 2
RANKS_PER_NODE = 8

MODEL = {
    "model.style": "llama",
    "model.hidden_size": 128,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 384,
    "model.vocab_size": 512,
    "data.sequence_length": 128,
    "data.recipe": "python-stdlib",
    "train.steps": 10,
}


@dataclass(frozen=True)
class Layout:
    """A run and its budget.

    Attributes:
        json: a shipped DeepSpeed JSON.
        rank: the rank that is rehearsed; each is another place in the grid, or another stage.
        waits: times that the host waits for the device in a step.
        keys: changes of `MODEL`.
        settings: changes of the JSON.
    """

    json: str
    ranks: int
    waits: int
    rank: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    gpu: str = "A100-80GB"
    micro_batch: int = MICRO_BATCH


_TENSOR = {"parallel.tensor": 2}
_SEQUENCE = {**_TENSOR, "parallel.sequence": True}
_OVERLAP = {"parallel.overlap_tensor_communication": True}  # with so few tokens not by itself
_CONTEXT, _RING = {"parallel.context": 2}, {"parallel.context_method": "ring"}
_STAGES = {"parallel.pipeline": 2}
_TWO_STAGES = {**_STAGES, "parallel.virtual_stages": 2, "model.num_hidden_layers": 4}
_MIDDLE = {"parallel.pipeline": 4, "model.num_hidden_layers": 4}
_LONG = {
    "train.recompute": "full",
    "train.mlp_chunk_tokens": 64,
    "train.offload_activations": True,
    "compile": False,
}
_COMPOSED = {
    "model.sliding_window": 8,
    "model.full_attention_layers": 2,
    "model.attn_logit_softcapping": 50.0,
    "model.attention_sinks": True,
    "model.norm_placement": "both",
    "model.norm_zero_centered": True,
    "model.qk_norm": "whole",
    "train.z_loss": 1e-4,
}
_EXPERTS = {
    "model.num_experts": 8,
    "model.moe_intermediate_size": 64,
    "model.num_shared_experts": 1,
    "model.num_dense_layers": 1,
    "model.expert_bias": True,
    "train.expert_capacity_factor": 1,
}
_GPT2 = {"model.style": "gpt2", "model.dropout": 0.1, "model.attention_dropout": 0.1}

LAYOUTS: dict[str, Layout] = {
    "zero0": Layout("fp32.json", 8, 0, settings={"zero_optimization": {"stage": 0}}),
    "zero1": Layout("zero1.json", 8, 1),
    "zero2": Layout("zero2.json", 8, 2, rank=5),
    "zero3": Layout("zero3.json", 8, 3, rank=7),
    "one rank": Layout("zero2.json", 1, 1),
    "two nodes": Layout("zero3.json", 16, 3, rank=11),
    "fp32": Layout("fp32.json", 8, 2),
    "fp16": Layout("fp16.json", 8, 2, gpu="V100"),
    "fp16, zero 3": Layout("zero3.json", 8, 3, settings={"bf16": {"enabled": False}, "fp16": {"enabled": True}}),
    "offload, zero 2": Layout("zero2_offload.json", 8, 11),
    "offload, zero 3": Layout("zero3_offload.json", 8, 8),
    "dropout": Layout("zero2.json", 8, 2, keys=_GPT2),
    "dropout, document mask": Layout("zero2.json", 8, 2, keys={**_GPT2, "data.document_mask": True}),
    "recomputation": Layout("zero3.json", 8, 3, keys={"train.checkpoint_activations_every": 1}),
    "tiles, offloaded inputs": Layout("zero3.json", 8, 3, keys=_LONG),
    "document mask, composed": Layout(
        "zero2.json", 8, 2, keys={"data.document_mask": True, "train.recompute": "full", "compile": False, **_COMPOSED}
    ),
    "grouped queries, untied, experts": Layout(
        "zero2.json",
        8,
        2,
        keys={
            "model.num_key_value_heads": 2,
            "model.tie_word_embeddings": False,
            "model.sliding_window": 8,  # beside whole attention without a mask
            "model.full_attention_layers": 2,
            **_EXPERTS,
        },
    ),
    "tensor, zero 1": Layout("zero1.json", 8, 1, rank=3, keys=_TENSOR),
    "tensor, muon": Layout("muon.json", 8, 1, rank=3, keys=_TENSOR),
    "tensor, overlapped": Layout("zero1.json", 8, 1, rank=3, keys={**_TENSOR, **_OVERLAP}),
    "tensor, zero 3": Layout("zero3.json", 8, 4, rank=3, keys=_TENSOR),
    "sequence": Layout("zero2.json", 8, 2, rank=2, keys=_SEQUENCE),
    "sequence, overlapped": Layout("zero2.json", 8, 2, rank=2, keys={**_SEQUENCE, **_OVERLAP}),
    "sequence, dropout, zero 3": Layout("zero3.json", 8, 3, rank=5, keys={**_SEQUENCE, **_GPT2, **_OVERLAP}),
    "context": Layout("zero2.json", 8, 2, rank=3, keys={**_CONTEXT, "data.document_mask": True}),
    "ring, sequence, zero 3": Layout("zero3.json", 8, 4, rank=5, keys={**_CONTEXT, **_RING, **_SEQUENCE}),
    "stage of a context group": Layout("pipeline.json", 8, 1, rank=6, keys={**_STAGES, **_CONTEXT}),
    "divided experts, 8-bit states, zero 3": Layout(
        "zero3.json",
        8,
        7,
        rank=7,
        keys={**_EXPERTS, "parallel.expert": 4, "train.recompute": "full", "train.optimizer_state": "8bit"},
    ),
    "divided experts, bf16 states, tensor": Layout(
        "zero1.json",
        8,
        3,
        rank=3,
        keys={**_EXPERTS, "parallel.expert": 2, **_TENSOR, "train.optimizer_state": "bf16"},
    ),
    "second copies, 8-bit states": Layout(
        "zero3.json",
        16,
        23,
        rank=11,
        keys={"train.optimizer_state": "8bit", "train.ema_decay": 0.9},
        settings={"zero_optimization": {"zero_hpz_partition_size": 8}},
    ),
    "first stage": Layout("pipeline.json", 8, 1, rank=1, keys=_STAGES),
    "last stage": Layout("pipeline.json", 8, 1, rank=7, keys=_STAGES),
    "middle stage": Layout("pipeline.json", 8, 1, rank=4, keys=_MIDDLE),
    "last stage, untied, document mask": Layout(
        "pipeline.json", 8, 1, rank=4, keys={**_STAGES, "model.tie_word_embeddings": False, "data.document_mask": True}
    ),
    "zero-bubble pipeline": Layout(
        "pipeline.json", 8, 1, rank=1, keys={**_TWO_STAGES, "parallel.pipeline_schedule": "zb_v"}
    ),
    "interleaved pipeline, divided experts": Layout(
        "pipeline.json",
        8,
        5,
        rank=7,
        keys={
            **_EXPERTS,
            **_TWO_STAGES,
            "parallel.expert": 2,
        },
    ),
    "stage of a tensor group": Layout("pipeline.json", 8, 1, rank=5, keys={**_STAGES, **_SEQUENCE, **_LONG}),
}

# The waits of a step that are allowed, each with its reason: kind, and the place's file and function.
_NORM = "the norm of the gradient decides whether an update is applied, and comes with the loss"
_OVERFLOW = "a loss scale needs to know of overflows before the update"
_ROWS = "how many rows of tokens travel to each rank's experts, and come from it"
_OFFLOAD = "the CPU updates: gradients, weights and parts of the norm pass between the memories"
_COPIES = "DeepSpeed waits for the second copy of each parameter"
_STREAMS = "DeepSpeed waits for its reduction before it uses the gradients"
REASONS: dict[tuple[EventKind, str], str] = {
    ("read", "deepspeed/runtime/zero/stage_1_and_2.py:update_offload_overflow_tracker"): _OVERFLOW,
    ("read", "megalm/engine/optimizer/optimizer_state.py:__torch_function__"): _OFFLOAD,
    ("read", "megalm/parallel/expert_parallel.py:rows_of_ranks"): _ROWS,
    ("synchronize", "deepspeed/runtime/zero/partition_parameters.py:_partition_param_sec"): _COPIES,
    ("synchronize", "deepspeed/runtime/zero/stage3.py:independent_gradient_partition_epilogue"): _STREAMS,
    ("synchronize", "deepspeed/runtime/zero/stage_1_and_2.py:_wait_for_offload_copies"): _OFFLOAD,
    ("synchronize", "deepspeed/runtime/zero/stage_1_and_2.py:independent_gradient_partition_epilogue"): _STREAMS,
    ("to_device", "deepspeed/runtime/utils.py:clip_grad_norm_"): "without ZeRO DeepSpeed clips by numbers of the host",
    ("to_device", "megalm/engine/optimizer/optimizer_state.py:__torch_function__"): "a constant of DeepSpeed's norm",
    ("to_host", "megalm/engine/optimizer/optimizer_state.py:__torch_function__"): _OFFLOAD,
    ("to_host", "megalm/engine/optimizer/optimizer_state.py:read"): _NORM,
}


def case_of(layout: Layout, folder: Path) -> tuple[RehearsalCase, Plan]:
    """Resolve a layout as `megalm rehearse` does."""
    content = json.loads(Path("ds_configs", layout.json).read_text())
    degree = math.prod(int(layout.keys.get(f"parallel.{axis}", 1)) for axis in ("tensor", "context", "pipeline"))
    content["train_micro_batch_size_per_gpu"] = layout.micro_batch
    content["train_batch_size"] = layout.ranks // degree * layout.micro_batch * ACCUMULATION
    for key, value in layout.settings.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / layout.json
    path.write_text(json.dumps(content))
    keys = [f"{key}={value}" for key, value in {**MODEL, **layout.keys}.items()]
    files = read_settings(None, keys, str(path), resume=False, ranks=layout.ranks)
    device = gpu_by_name(layout.gpu)
    plan = planned(files, layout.ranks, device, RANKS_PER_NODE)
    per_node = min(RANKS_PER_NODE, layout.ranks)
    return RehearsalCase(plan.resolved, plan.shape, layout.rank, per_node), plan


def rehearsed(names: Iterable[str]) -> dict[str, tuple[RehearsalCase, Plan, Rehearsal]]:
    """Rehearse these layouts, two at a time."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: case_of(LAYOUTS[name], Path(folder)) for name in names}
    found = rehearse_all([case for case, _ in cases.values()], jobs=2)
    return {name: (*cases[name], rehearsal) for name, rehearsal in zip(cases, found, strict=True)}


if __name__ == "__main__":
    places: dict[tuple[str, str], set[str]] = {}
    for name, (_, _, rehearsal) in rehearsed(LAYOUTS).items():
        step = rehearsal.phase("step")
        print(f"{name}: {rehearsal.failure or (step and step.count(*WAITS))}")  # noqa: T201
        for event in step.events if step else ():
            places.setdefault((event.kind, event.place), set()).add(f"{name} {event.count}")
    for place, layouts in sorted(places.items()):
        print(place, "|", "; ".join(sorted(layouts)))  # noqa: T201
