"""The plan's memory against that of a rehearsal, at real sizes: within a tenth."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_process import rehearse_all
from megalm.rehearsal.rehearsal_report import Rehearsal, RehearsalCase
from megalm.rehearsal.verdict import planned_bytes, planned_memory
from tests.gpu_rehearsal.budgets import Layout, case_of

_GIB = 2**30

# hidden size, blocks, heads, key/value heads, intermediate size, vocabulary, sequence length
_MODELS = {
    "360m": (1024, 24, 16, 16, 2816, 50304, 2048),
    "1.3b": (2048, 24, 16, 16, 5504, 50304, 2048),
    "7b": (4096, 32, 32, 32, 11008, 32000, 4096),
    "70b": (8192, 80, 64, 8, 28672, 32000, 4096),
}


@dataclass(frozen=True)
class Size:
    """A run at its real size.

    Attributes:
        micro_batch: sequences.
    """

    model: str
    json: str
    ranks: int
    micro_batch: int
    keys: Mapping[str, Any] = field(default_factory=dict)

    def case(self, folder: Path) -> tuple[RehearsalCase, Plan]:
        names = "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"
        *numbers, vocabulary, length = _MODELS[self.model]
        keys = {f"model.{name}": number for name, number in zip(names, numbers, strict=True)}
        keys |= {"model.vocab_size": vocabulary, "data.sequence_length": length, **self.keys}
        keys["model.tie_word_embeddings"] = self.model in ("360m", "1.3b")
        layout = Layout(self.json, self.ranks, 0, keys=keys, micro_batch=self.micro_batch)
        case, plan = case_of(layout, folder)
        return replace(case, steps=2), plan  # the optimizer's states exist after the first


SIZES = {
    "360m, experts, zero 1": Size(
        "360m",
        "zero1.json",
        8,
        8,
        {
            "model.num_experts": 8,
            "model.moe_intermediate_size": 1408,
            "parallel.expert": 8,
            "train.recompute": "attention",
        },
    ),
    "360m, zero 2": Size("360m", "zero2.json", 8, 8, {"train.recompute": "mlp"}),
    "360m, zero 3": Size(
        "360m",
        "zero3.json",
        8,
        8,
        {
            "train.recompute": "full",
            "train.mlp_chunk_tokens": 4096,
            "train.offload_activations": True,
            "compile": False,
        },
    ),
    "360m, offload": Size("360m", "zero2_offload.json", 8, 8),
    "1.3b, zero 2": Size("1.3b", "zero2.json", 64, 4),
    "1.3b, zero 3": Size("1.3b", "zero3.json", 8, 4),
    "1.3b, pipeline": Size("1.3b", "pipeline.json", 8, 4, {"parallel.pipeline": 2}),
    "7b, zero 3": Size("7b", "zero3.json", 64, 1),
    "70b, tensor and pipeline": Size(
        "70b", "pipeline.json", 64, 1, {"parallel.tensor": 8, "parallel.pipeline": 8, "parallel.sequence": True}
    ),
}
# A rehearsal of ZeRO 3 takes its time for each gathered block: minutes.
LARGE = {"70b, zero 3": Size("70b", "zero3.json", 64, 1, {"train.checkpoint_activations_every": 1})}


def rehearsed(sizes: Mapping[str, Size]) -> dict[str, tuple[RehearsalCase, Plan, Rehearsal]]:
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: size.case(Path(folder)) for name, size in sizes.items()}
    found = rehearse_all([case for case, _ in cases.values()], jobs=2)
    return {name: (*cases[name], rehearsal) for name, rehearsal in zip(cases, found, strict=True)}


@pytest.fixture(scope="module")
def small() -> dict[str, tuple[RehearsalCase, Plan, Rehearsal]]:
    return rehearsed(SIZES)


@pytest.fixture(scope="module")
def large() -> dict[str, tuple[RehearsalCase, Plan, Rehearsal]]:
    return rehearsed(LARGE)


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_is_within_a_tenth(name: str, small: dict[str, tuple[RehearsalCase, Plan, Rehearsal]]) -> None:
    _hold(*small[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_plan_of_a_large_model_is_within_a_tenth(
    name: str, large: dict[str, tuple[RehearsalCase, Plan, Rehearsal]]
) -> None:
    _hold(*large[name])


def _hold(case: RehearsalCase, plan: Plan, rehearsal: Rehearsal) -> None:
    assert rehearsal.failure is None, rehearsal.failure
    memory = planned_memory(plan, case)
    start, step = rehearsal.phase("start"), rehearsal.phase("step")
    assert start is not None
    assert step is not None
    found = f"start {start.peak_bytes / _GIB:.2f} step {step.peak_bytes / _GIB:.2f} GiB, plan {memory}"
    for phase in (start, step):
        expected = planned_bytes(memory, phase.name)
        assert expected is None or 0.9 <= expected / phase.peak_bytes <= 1.1, found
    # A rehearsal draws no weights, which the plan has in the CPU's memory.
    assert start.host_peak_bytes <= 1.05 * memory.start_host, found
