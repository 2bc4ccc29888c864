"""For each kernel that vLLM can choose on a GPU: its storage, and our bytes beside vLLM's.

No GPU is here: see `tests.layouts.machine` for what stands in for it, and docs/layouts.md for
what follows. `python -m tests.layouts` writes the table there from the same cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.checkpoints import Policies
from tests.layouts.cases import EXPERTS, LINEAR, Case
from tests.layouts.layout import look


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.mark.parametrize("case", [*LINEAR, *EXPERTS], ids=lambda case: case.id)
def test_two_reloads_leave_what_vllm_loads_where_it_was(case: Case, folder: Path) -> None:
    """Every byte that kernels would read; no tensor has moved; the storage is the one expected."""
    layout = look(case, Policies(folder, case.kind))

    assert case.kernel in layout.kernels
    assert layout.stored[case.parameter].kind == case.weight
    assert layout.different == ()
    assert layout.moved == ()
    assert layout.compared > 0
