"""What a rank holds until its first step, against the plan, and the initial weights that come of it.

Every storage is counted from its first use until nobody holds it any more.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.cost_model.memory import estimate_stages
from megalm.engine.build import build_engine
from megalm.model.transformer import initial_weight
from megalm.planning.resolve import ResolvedRun
from tests.distributed.training import Case, Trace, resolved, shape_of, snapshot, whole_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

RANKS = 4
# Small buckets: on a CPU nothing writes to them.
_ZERO = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 20_000, "sub_group_size": 50_000}
_WIDE = ("model.hidden_size=128", "model.num_hidden_layers=6", "model.qk_norm=false")
_TIED, _GPT2 = "model.tie_word_embeddings=true", "model.style=gpt2"
_TENSOR, _PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"


def _case(json: str, precision: str, *overrides: str, **zero: Any) -> Case:
    return Case(json, precision, (*_WIDE, *overrides), {"gradient_clipping": 0.0, "zero_optimization": _ZERO | zero})


_CPU = {"device": "cpu"}
CASES = {
    "zero1 bf16": _case("zero1.json", "bf16", _GPT2),
    "zero2 bf16 offloaded": _case("zero2.json", "bf16", offload_optimizer=_CPU),
    "zero3 fp32": _case("zero3.json", "fp32", _TIED),
    "zero3 bf16 offloaded": _case("zero3.json", "bf16", offload_optimizer=_CPU, offload_param=_CPU),
    "zero3 bf16 hpz": _case("zero3.json", "bf16", zero_hpz_partition_size=2),
    "tp2 zero3 bf16": _case("zero3.json", "bf16", _TENSOR, _TIED, _GPT2, "model.qk_norm=false"),
    "pp2 zero1 bf16": _case("zero1.json", "bf16", _PIPELINE, _TIED),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that come into being under it, as long as they live.

    Attributes:
        most: the largest count so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is not None:
            return

        def gone(reference: weakref.ref[Any]) -> None:
            self.live -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.most = max(self.most, self.live)


def _start_all(comm: Any, device: torch.device, folder: Path) -> dict[str, tuple[int, int, Trace]]:
    rank_folder = folder / f"rank-{comm.rank}"
    rank_folder.mkdir()
    return {name: _start(comm, device, resolved(case, comm.size, rank_folder)) for name, case in CASES.items()}


def _start(comm: Any, device: torch.device, run: ResolvedRun) -> tuple[int, int, Trace]:
    """Bytes at most while the model is built, and until the engine is; the state that it starts from."""
    import deepspeed

    gc.collect()
    live, built = LiveBytes(), 0
    initialize = deepspeed.initialize

    def initialize_and_look(**options: Any) -> Any:
        nonlocal built
        built = live.most
        return initialize(**options)

    deepspeed.initialize = initialize_and_look
    try:
        with live:
            engine = build_engine(run, shape_of(run), device, comm)
    finally:
        deepspeed.initialize = initialize
    return built, live.most, Trace([], [], snapshot(engine))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, tuple[int, int, Trace]]]]:
    folder = tmp_path_factory.mktemp("start")
    return folder, run_ranks(RANKS, _start_all, folder)


@pytest.mark.parametrize("name", list(CASES))
def test_the_plan_has_the_start(started: Any, name: str) -> None:
    folder, ranks = started
    run = resolved(CASES[name], RANKS, folder)
    for plan in _plans(run):
        here = [rank for rank in range(RANKS) if run.topology.coordinate(rank).pipeline == plan.stage]
        most = max(ranks[rank][name][1] for rank in here)
        assert 0.9 < plan.start / most < 1.1, (plan.start, most)


@pytest.mark.parametrize("name", [name for name in CASES if "zero3" in name and "hpz" not in name])
def test_zero_3_builds_its_share_and_one_block(started: Any, name: str) -> None:
    """Beside one weight of 4 bytes an element, which a rank draws, and the rotary tables."""
    folder, ranks = started
    run = resolved(CASES[name], RANKS, folder)
    shape, low = shape_of(run), {"fp32": 4, "bf16": 2}[run.precision]
    sizes = {key: math.prod(size) for key, size in shape.parameters().items()}
    share = low * sum(-(-size // run.topology.data) for size in sizes.values()) // run.topology.tensor
    block = low * sum(size for key, size in sizes.items() if key.startswith("layers.0."))
    tables = 4 * run.config.data.sequence_length * shape.head_dim
    limit = 1.02 * share + block + 4 * max(sizes.values()) + tables
    assert limit < 4 * sum(sizes.values()), "a whole model in fp32 does not pass"
    assert max(rank[name][0] for rank in ranks) < limit


@pytest.mark.parametrize("name", list(CASES))
def test_initial_weights_are_those_of_their_names(started: Any, name: str) -> None:
    folder, ranks = started
    run = resolved(CASES[name], RANKS, folder)
    shape = shape_of(run)
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    state = whole_state([rank[name][2] for rank in ranks])
    for key, size in shape.parameters().items():
        expected = initial_weight(key, size, shape, run.config.train.seed).to(dtype).float().flatten()
        np.testing.assert_array_equal(state[key, "master"], expected.numpy(), err_msg=key)


def _plans(run: ResolvedRun) -> Iterator[Any]:
    return estimate_stages(run.memory_case(shape_of(run)))
