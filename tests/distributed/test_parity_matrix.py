"""Every parallel layout trains the model that one rank trains; the rows and their tolerances are in parity.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.parity import LAYOUTS, TOLERANCES, Row, rows
from tests.distributed.parity_table import BEGIN, DOCUMENT, END, Matrix, keys

pytestmark = pytest.mark.distributed

ROWS = [
    pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.is_slow else [])
    for name in LAYOUTS
    for row in rows(name)
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("row", ROWS)
def test_equal_to_one_rank(matrix: Matrix, row: Row) -> None:
    assert not matrix.difference(row).beyond(TOLERANCES[row.precision])


@pytest.mark.parametrize("row", [row for row in rows("dp2") if row.zero == 1], ids=lambda row: row.name)
def test_the_job_shows_mistakes(matrix: Matrix, row: Row) -> None:
    """Equal to a reference that stands still, never clips or predicts nothing new would prove little."""
    trained = matrix.reference(row).trained
    assert trained.losses[-1] < trained.losses[0] - 0.05
    assert min(trained.norms) > row.clipping > 0
    assert np.ptp(trained.norms) > 0.01


def test_the_document_shows_these_rows() -> None:
    text = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    assert [tuple(line[:5]) for line in lines] == [cells for layout in LAYOUTS for cells in keys(layout)]
    assert {line[5] for line in lines} == {"equal"}
