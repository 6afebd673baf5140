"""Every parallel layout trains the model that one rank trains; the rows and their tolerances are in parity.py.

On every change a Latin square of the matrix, which meets every pair of layout, model and ZeRO stage; the other rows are
`slow`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.distributed.parity import CLIPPING, LAYOUTS, MODELS, SELDOM, STEPS, Row, latin_square, rows
from tests.distributed.parity_table import BEGIN, DOCUMENT, END, Matrix, keys
from tests.distributed.selection import selected

pytestmark = pytest.mark.distributed

ROWS = [row for layout in LAYOUTS for row in rows(layout)]
ON_EVERY_CHANGE = [row for layout in LAYOUTS for row in latin_square(layout)]
PARAMETERS = [
    pytest.param(row, id=row.name, marks=[] if row in ON_EVERY_CHANGE else [pytest.mark.slow]) for row in ROWS
]


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"), selected(request, "row"), STEPS)


@pytest.mark.parametrize("row", PARAMETERS)
def test_equal_to_one_rank(matrix: Matrix, row: Row) -> None:
    assert not matrix.difference(row).beyond(row.tolerance)


@pytest.mark.parametrize("alone", [row for row in rows("dp2") if row.zero == 1], ids=lambda row: row.reference)
def test_the_job_shows_mistakes(matrix: Matrix, alone: Row) -> None:
    """Equal to a reference that stands still, never clips or predicts nothing new would prove little."""
    trained = matrix.reference(alone).trained
    assert trained.losses[STEPS - 1] < trained.losses[0] - 0.01  # a thousand tolerances
    assert min(trained.norms) > CLIPPING
    assert np.ptp(trained.norms) > 0.01


def _met(some: Sequence[Row]) -> set[tuple[object, ...]]:
    """In fp32 every pair of layout, model and ZeRO stage; of other precisions and offload the layout."""
    exact = [row for row in some if row.numbers == "fp32"]
    return {
        *((row.layout, row.model) for row in exact),
        *((row.layout, row.zero) for row in exact),
        *((row.model, row.zero) for row in exact),
        *((row.layout, row.numbers) for row in some if row not in exact),
    }


def test_every_change_meets_every_pair() -> None:
    assert set(ON_EVERY_CHANGE) <= set(ROWS)
    every_change = _met([row for row in ROWS if row.layout not in SELDOM])
    assert _met(ON_EVERY_CHANGE) == every_change
    whole = [name for name, layout in LAYOUTS.items() if layout.ranks <= 4 and not layout.few]
    assert {(layout, model) for layout in whole for model in MODELS} <= _met(ROWS)
    assert {(model, stage) for model in MODELS for stage in range(4)} <= _met(ROWS)
    for row in ON_EVERY_CHANGE:
        assert _met([other for other in ON_EVERY_CHANGE if other != row]) < every_change, f"{row.name} adds nothing"


def test_the_document_shows_these_rows() -> None:
    text = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    assert [tuple(line[:5]) for line in lines] == [cells for layout in LAYOUTS for cells in keys(layout)]
    assert {line[5] for line in lines} == {"equal"}
