"""Of each architecture two cells of docs/compatibility.md: bf16, and one scheme where it is exact.

`python -m tests.compatibility` makes the whole table; this holds it to what the code does.
"""

from __future__ import annotations

from itertools import chain

import pytest

from tests.compatibility import workers
from tests.compatibility.__main__ import PAGE, has_experts
from tests.compatibility.table import read
from tests.compatibility.trial import EXACT, SCHEMES, Cell
from tests.engine.serving import needs

pytestmark = [pytest.mark.engine, needs(">=0.32", "layers like those of the table")]

TABLE = read(PAGE.read_text())


def _two_of(row: int, cells: dict[str, str]) -> list[str]:
    """bf16 as it is, and a scheme that is exact: another one for every row."""
    quantized = [scheme for scheme in SCHEMES[1:] if cells[scheme] == EXACT]
    return ["bf16", *quantized[row % len(quantized) :][:1]] if quantized else ["bf16"]


CELLS = [
    (name, scheme)
    for row, (name, cells) in enumerate(TABLE.items())
    for scheme in _two_of(row, cells)
    if cells[scheme] == EXACT
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Cell]:
    """Every cell, looked at in two processes: experts apart, and all others."""
    folder = tmp_path_factory.mktemp("architectures")
    groups = ([cell for cell in CELLS if has_experts(cell[0]) == one] for one in (False, True))
    looked = chain.from_iterable(workers.run("judge", group, folder) for group in groups)
    return {(cell.architecture, cell.scheme): cell for cell in looked}


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_reload_equals_a_restart(
    cell: tuple[str, str], found: dict[tuple[str, str], Cell]
) -> None:
    assert found[cell] == Cell(*cell, EXACT)


def test_no_cell_of_the_table_is_blank_or_wrong() -> None:
    verdicts = {verdict.split()[0] for cells in TABLE.values() for verdict in cells.values()}

    assert verdicts <= {EXACT, "engine", "refused"}
    assert all(set(cells) == set(SCHEMES) for cells in TABLE.values())
