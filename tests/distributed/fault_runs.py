"""What each rank of test_collective_faults.py runs: rows of the matrix, cut short, watched or with collectives broken.

Not in the test's own module, which searches the whole source for sites when it is imported: each rank would do so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalm.parity.state_comparison import Outcome
from tests.distributed.faults import Broken, Fault, Site, Watch
from tests.distributed.parity import Row, train
from tests.distributed.training import Case

STEPS, SEQUENCES = 2, 4
Break = tuple[tuple[Site, ...], Fault]


def _short(case: Case) -> Case:
    """The row with fewer sequences a step: a wrong sum is as wrong in two micro-batches as in eight."""
    return replace(case, settings={**case.settings, "train_batch_size": SEQUENCES})


def _finished(folder: Path, rank: int) -> Path:
    return folder / f"finished-{rank}"


def count_finished(folder: Path, ranks: int) -> int:
    """How many breaks of the last `train_broken` all ranks have gone through."""
    return min(int(_finished(folder, rank).read_text()) for rank in range(ranks))


def train_broken(
    comm: Any, device: torch.device, row: Row, breaks: Sequence[Break], prefix: Path, folder: Path
) -> list[Outcome]:
    """The row with each break, one after the other, and at last with none."""
    outcomes = []
    _finished(folder, comm.rank).write_text("0")
    for sites, fault in breaks:
        with Broken(sites, fault):
            outcomes.append(train(comm, device, _short(row.case()), prefix, folder, STEPS))
        _finished(folder, comm.rank).write_text(str(len(outcomes)))
    return [*outcomes, train(comm, device, _short(row.case()), prefix, folder, STEPS)]


def train_watched(
    comm: Any, device: torch.device, rows: Sequence[Row], sites: Sequence[Site], prefix: Path, folder: Path
) -> list[tuple[Outcome, dict[Site, set[str]]]]:
    """Each row's outcome, and the sites that it met."""
    found = []
    for row in rows:
        with Watch(sites) as watch:
            outcome = train(comm, device, _short(row.case()), prefix, folder, STEPS)
        found.append((outcome, watch.met))
    return found


def train_references(
    comm: Any, device: torch.device, rows: Sequence[Row], prefix: Path, folder: Path
) -> dict[str, Outcome]:
    """One rank's run of each row's job, by its name."""
    cases = {row.reference: _short(row.reference_case()) for row in rows}
    return {name: train(comm, device, case, prefix, folder, STEPS) for name, case in cases.items()}
