"""The longest sequence of a 1.3 B model on one card, by the plan, and its memory beside a rehearsal's.

    python -m benchmarks long_sequences [--gpus RTX-5090 A100-80GB] [--ways WAY ...] [--tile 4096] [--json zero2.json]
        [--ranks 1] [--plan-only] [KEY=VALUE ...]

For each card and each way to keep activations: the longest multiple of 1,024 tokens, one sequence at a time, of which
the plan says that it fits, the plan's memory at that length, and the peak of tensors of a rehearsed step at it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalm.cli.plan import planned
from megalm.cost_model.gpu_specs import gpu_by_name
from megalm.planning.run_plan import Plan
from megalm.rehearsal.rehearsal_process import rehearse_all
from megalm.rehearsal.rehearsal_report import RehearsalCase
from megalm.runs.run_settings import read_settings

_MODEL = {
    "model.hidden_size": 2048,
    "model.num_hidden_layers": 24,
    "model.num_attention_heads": 16,
    "model.num_key_value_heads": 16,
    "model.intermediate_size": 5504,
    "model.vocab_size": 50304,
    "model.tie_word_embeddings": True,
    "data.recipe": "python-stdlib",
    "train.steps": 10,
    "compile": False,  # as the rehearsal runs
}
_FULL = {"train.recompute": "full"}
_TILES = {**_FULL, "train.mlp_chunk_tokens": None}  # --tile
WAYS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "recompute=full": _FULL,
    "full, tiles": _TILES,
    "full, offload": {**_FULL, "train.offload_activations": True},
    "full, tiles, offload": {**_TILES, "train.offload_activations": True},
}
_STEP, _GIB = 1024, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", nargs="+", default=["RTX-5090", "A100-80GB"])
    parser.add_argument("--json", default="zero2.json")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tile", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--plan-only", action="store_true", help="rehearse nothing")
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for gpu in options.gpus:
            for way in options.ways:
                search = _Search(options, gpu, WAYS[way], Path(folder))
                if length := search.longest():
                    found.append((gpu, way, length, search.plan(length)))
    cases = [RehearsalCase(plan.resolved, plan.shape, 0, min(8, options.ranks)) for *_, plan in found]
    rehearsed = [] if options.plan_only else rehearse_all([replace(case, steps=2) for case in cases], jobs=2)
    print(f"{'card':>10} {'kept':>22} {'tokens':>8} {'plan, GiB':>10} {'rehearsed':>10} {'host, GiB':>10}")
    for index, (gpu, way, length, plan) in enumerate(found):
        step = rehearsed[index].phase("step") if rehearsed else None
        peak = f"{step.peak_bytes / _GIB:10.2f}" if step else " " * 10
        tensors = (plan.memory.total - plan.memory.runtime) / _GIB
        print(f"{gpu:>10} {way:>22} {length:8,} {tensors:10.2f} {peak} {plan.memory.host_peak / _GIB:10.2f}")


class _Search:
    """Plans of one card and one way to keep activations, by length."""

    def __init__(self, options: argparse.Namespace, gpu: str, keys: Mapping[str, Any], folder: Path) -> None:
        content = json.loads(Path("ds_configs", options.json).read_text())
        content |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": options.ranks}
        self._json = folder / options.json
        self._json.write_text(json.dumps(content))
        chosen = {key: options.tile if value is None else value for key, value in {**_MODEL, **keys}.items()}
        self._keys = [*(f"{key}={value}" for key, value in chosen.items()), *options.keys]
        self._ranks, self._device = options.ranks, gpu_by_name(gpu)

    def plan(self, length: int) -> Plan:
        keys = [*self._keys, f"data.sequence_length={length}"]
        files = read_settings(None, keys, str(self._json), resume=False, ranks=self._ranks)
        return planned(files, self._ranks, self._device, 8)

    def longest(self) -> int:
        """The longest sequence that fits; 0: none."""
        low, high = 0, 1
        while self._fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle)
        return low * _STEP

    def _fits(self, steps: int) -> bool:
        return self.plan(steps * _STEP).fit.level == "fits"
