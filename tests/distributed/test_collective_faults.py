"""Every place of the parallel code that communicates, skipped and doubled in turn: each time the parity matrix fails.

The sites come from the source, so that a new one cannot be forgotten. What is trained is a part of the matrix that
reaches all of them, for two steps of two micro-batches.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megalm.parity.state_comparison import Outcome, difference
from tests.distributed.fault_runs import Break, count_finished, train_broken, train_references, train_watched
from tests.distributed.faults import FAULTS, ROOT, Fault, Site, find_sites, sites_of
from tests.distributed.parity import NO_CAPACITY, Row
from tests.distributed.training import make_dataset
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROWS = (
    Row("dp2", "composed MQA tied", 1),  # weights drawn by turns
    Row("tp2", "composed MQA tied", 1),
    Row("sp2", "gpt2 tied", 0),
    Row("sp2", "composed MQA tied", 1),
    Row("tp2", "composed MQA untied", 2),
    Row("pp2", "llama GQA untied", 1),
    Row("pp2", "gpt2 tied", 0),
    Row("pp2v2", "composed MQA tied", 1),
    Row("tp2", "llama GQA untied", 1, muon=True),
    Row("cp2", "composed MQA untied", 1),  # experts have capacities, and are balanced, in whole sequences
    Row("ring2", "llama GQA untied", 1),
    Row("ep2", "composed MQA untied", 1),
    # DeepSpeed sums the norm of bf16 otherwise; with larger outputs of experts it shows whether all of them count.
    Row("ep2", "composed MQA untied", 1, "bf16", job=("model.routed_scaling_factor=3", *NO_CAPACITY)),
)
# What is no part of training's arithmetic: (file, function) -> why no number of the matrix can depend on it.
CONTROL = {
    ("megalm/engine/distributed.py", "DistributedCommunicator.barrier"): "waits, and moves nothing",
    ("megalm/engine/distributed.py", "DistributedCommunicator.broadcast"): "decisions and texts of the loop",
    ("megalm/engine/distributed.py", "DistributedCommunicator.gather"): "reports and failures of the loop",
    ("megalm/engine/distributed.py", "DistributedCommunicator._shared"): "what one rank prepares for all",
    ("megalm/engine/distributed.py", "DistributedCommunicator.once"): "what one rank prepares for all",
    ("megalm/engine/distributed.py", "DistributedCommunicator.once_per_node"): "what one rank prepares for all",
    ("megalm/engine/distributed.py", "DistributedCommunicator.max"): "refusals, measured times",
    ("megalm/engine/distributed.py", "DistributedCommunicator.sum"): "bytes of a validation text, measured speeds",
    ("megalm/engine/distributed.py", "DistributedCommunicator._reduce"): "what `max` and `sum` give the loop",
    ("megalm/engine/base_engine.py", "EngineBase.counters"): "the updates that a checkpoint counts",
    ("megalm/engine/base_engine.py", "EngineBase.refused_gradients"): "a report",
    (
        "megalm/engine/base_engine.py",
        "UpdateCheck._admits",
    ): "asks whether any rank refuses; test_update_check.py has that",
    ("megalm/engine/base_engine.py", "UpdateCheck.install.checked"): "asks whether any rank refuses",
    ("megalm/engine/build.py", "measured_costs"): "measured times, from which stages are cut",
    ("megalm/engine/build.py", "_balance"): "measured times, from which stages are cut",
    ("megalm/engine/build.py", "build_engine"): "measured times, from which stages are cut",
}
# Made twice these give what they give once. They are not taken at their word: the result, with all of a row made twice,
# must be equal bit for bit.
COPIES = {"all_gather_into_tensor", "all_to_all_single", "broadcast", "maximum", "send", "recv", "isend", "irecv"}

ALL_SITES = find_sites()
SITES = [site for site in ALL_SITES if (site.path, site.function) not in CONTROL]

# So many are tried by one pair of processes, one after the other, and then an unbroken run, which must be whole.
TOGETHER = 24


@dataclass
class Runs:
    """The unbroken runs, and the broken ones as they are asked for.

    Attributes:
        met: the rows that reach a site, and by which collectives.
    """

    folder: Path
    references: dict[str, Outcome]
    unbroken: dict[Row, list[Outcome]] = field(default_factory=dict)
    met: dict[Site, dict[Row, set[str]]] = field(default_factory=dict)
    _broken: dict[tuple[Row, Break], list[Outcome] | None] = field(default_factory=dict)

    def broken(self, row: Row, one: Break) -> list[Outcome] | None:
        """Each rank's outcome; None where a rank failed or waited forever."""
        if (row, one) not in self._broken:
            near = self._breaks(row)
            if one not in near:  # another row is the first that reaches it
                near = [one]
            first = near.index(one) // TOGETHER * TOGETHER
            self._run(row, near[first : first + TOGETHER])
        return self._broken[row, one]

    def copies(self, row: Row) -> tuple[Site, ...]:
        """The sites that this row is the first to reach, and whose collectives may be made twice."""
        return tuple(site for site in self._reached_first(row) if self._is_copy(site))

    def _reached_first(self, row: Row) -> list[Site]:
        return [site for site in SITES if next(iter(self.met.get(site, ())), None) == row]

    def _is_copy(self, site: Site) -> bool:
        return all(kinds <= COPIES for kinds in self.met[site].values())

    def _breaks(self, row: Row) -> list[Break]:
        found: list[Break] = [((site,), "skipped") for site in self._reached_first(row)]
        found += [((site,), "doubled") for site in self._reached_first(row) if not self._is_copy(site)]
        return [*found, (self.copies(row), "doubled")]

    def _run(self, row: Row, breaks: list[Break]) -> None:
        try:
            ranks = run_ranks(2, train_broken, row, breaks, self.folder / "data", self.folder)
        except (AssertionError, queue.Empty):
            if len(breaks) == 1:
                self._broken[row, breaks[0]] = None
                return
            # By itself it has to fail too, and those before it are whole only if an unbroken run after them is.
            failed = min(count_finished(self.folder, 2), len(breaks) - 1)
            for part in (breaks[:failed], breaks[failed : failed + 1], breaks[failed + 1 :]):
                if part:
                    self._run(row, part)
            return
        *outcomes, last = zip(*ranks, strict=True)
        assert _equal(last, self.unbroken[row]), "a fault has outlived its run"
        self._broken |= {(row, one): list(found) for one, found in zip(breaks, outcomes, strict=True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("faults")
    make_dataset(folder / "data")
    (references,) = run_ranks(1, train_references, ROWS, folder / "data", folder)
    result = Runs(folder, references)
    ranks = run_ranks(2, train_watched, ROWS, SITES, folder / "data", folder)
    for row, *outcomes in zip(ROWS, *ranks, strict=True):
        result.unbroken[row] = [outcome for outcome, _ in outcomes]
        for _, met in outcomes:
            for site, kinds in met.items():
                result.met.setdefault(site, {}).setdefault(row, set()).update(kinds)
    return result


def test_unbroken_it_is_equal_to_one_rank(runs: Runs) -> None:
    for row, outcomes in runs.unbroken.items():
        assert not difference(outcomes, runs.references[row.reference]).beyond(row.tolerance), row.name


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_matrix_shows_a_broken_collective(runs: Runs, site: Site, fault: Fault) -> None:
    assert site in runs.met, f"no row reaches {site}: add one, or say in CONTROL why no number depends on it"
    met = runs.met[site]
    row = next(iter(met))
    if fault == "doubled" and site in (copies := runs.copies(row)):
        broken = runs.broken(row, (copies, fault))
        names = ", ".join(map(str, copies))
        assert broken is not None, f"{row.name} fails when these are made twice: {names}"
        assert _equal(broken, runs.unbroken[row]), f"{row.name} is another when these are made twice: {names}"
        return
    for row in met:
        broken = runs.broken(row, ((site,), fault))
        if broken is None or difference(broken, runs.references[row.reference]).beyond(row.tolerance):
            return
    pytest.fail(f"{site}, {fault}: still equal to one rank in {', '.join(row.name for row in met)}")


def _equal(one: Sequence[Outcome], other: Sequence[Outcome]) -> bool:
    """Bit for bit."""
    return all(
        (a.trained.losses, a.trained.norms, a.validation) == (b.trained.losses, b.trained.norms, b.validation)
        and np.array_equal(a.logits, b.logits)
        and np.array_equal(a.choices, b.choices)
        and all(
            key == other_key and np.array_equal(values, other_values)
            for (key, values), (other_key, other_values) in zip(a.trained.fragments, b.trained.fragments, strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


def test_what_is_control_is_still_there() -> None:
    """An entry for what is gone would hide what comes under its name."""
    assert CONTROL.keys() <= {(site.path, site.function) for site in ALL_SITES}


def test_new_sites_are_found() -> None:
    source = """
import torch.distributed as dist
from megalm.parallel import collectives

class Rule(torch.autograd.Function):
    def forward(ctx, tensor, group):
        return tensor
    def backward(ctx, gradient):
        return collectives.sum_over(gradient, ctx.group), None

def spread(tensor):
    dist.broadcast(tensor, src=0)

def use(tensor):
    spread(Rule.apply(tensor.gather(1, max(0, 1))))
"""
    known = (ROOT / "megalm/parallel/collectives.py").read_text()
    sites = sites_of({"collectives.py": known, "new.py": source})
    calls = [(site.function, site.call) for site in sites if site.path == "new.py"]
    assert calls == [
        ("Rule.backward", "collectives.sum_over"),
        ("spread", "dist.broadcast"),
        ("use", "spread"),
        ("use", "Rule.apply"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\nbegin = dist.all_reduce",
        "import torch.distributed\nf(torch.distributed.all_reduce)",
        "from torch.distributed import all_reduce",
        "from deepspeed.comm import broadcast",
    ],
)
def test_hidden_sites_are_refused(source: str) -> None:
    with pytest.raises(AssertionError, match=r"all_reduce|broadcast"):
        sites_of({"new.py": source})
