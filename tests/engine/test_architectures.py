"""Of each architecture two cells of docs/compatibility.md: bf16, and one scheme where it is exact.

`python -m tools.compatibility` makes the whole table; this holds it to what the code does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.kernels import NO_AMX_KERNELS, has_amx_kernels, want_int4
from tests.engine.serving import needs
from tools.compatibility.__main__ import ALONE, PAGE, PARTS, has_experts
from tools.compatibility.cell import EXACT, NO_EXPERTS, SCHEMES, Cell
from tools.compatibility.table import Part
from tools.compatibility.workers import Asked, Worker

pytestmark = [pytest.mark.engine, needs(">=0.32", "layers like those of the table")]

TABLE = ALONE.read(PAGE.read_text())


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


def _wants_amx(architecture: str, scheme: str) -> bool:
    return scheme == "fp8_block" or (scheme == "int8" and has_experts(architecture))


@pytest.fixture(scope="module")
def worker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """The process that looks at these cells, one test a cell: experts apart, and all others."""
    worker = Worker("judge", tmp_path_factory.mktemp(request.param))
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("worker", "cell"),
    [
        pytest.param("experts" if has_experts(cell[0]) else "dense", cell, id="-".join(cell))
        for cell in sorted(CELLS, key=lambda cell: has_experts(cell[0]))
    ],
    indirect=["worker"],
    scope="module",  # or a worker would be started for every cell
)
def test_a_reload_equals_a_restart(worker: Worker, cell: Asked) -> None:
    if _wants_amx(*cell) and not has_amx_kernels():
        pytest.skip(NO_AMX_KERNELS)
    want_int4(cell[1])
    assert worker.look(cell) == Cell(*cell, EXACT)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_no_cell_of_the_tables_is_blank_or_wrong(part: Part) -> None:
    table = part.read(PAGE.read_text())
    verdicts = {verdict.split(" (")[0] for cells in table.values() for verdict in cells.values()}

    assert verdicts <= {EXACT, "engine", "refused", NO_EXPERTS}
    assert all(set(cells) == set(part.columns) for cells in table.values())
    assert set(table) == set(part.rows)
