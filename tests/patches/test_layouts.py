"""For each kernel that vLLM can choose on a GPU: its storage, and our bytes beside vLLM's.

No GPU is here: see `tests.layouts.machine` for what stands in for it, and docs/layouts.md for
what follows. `python -m tests.layouts` writes the table there from the same cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.checkpoints import config_name
from tests.layouts.cases import CORNERS, EXPERTS, LINEAR, REFUSED, Case
from tests.layouts.layout import load, look


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.mark.parametrize("case", [*LINEAR, *EXPERTS, *CORNERS], ids=lambda case: case.id)
def test_two_reloads_leave_what_vllm_loads_where_it_was(case: Case, folder: Path) -> None:
    """Every byte that kernels would read; no tensor has moved; the storage is the one expected."""
    layout = look(case, folder)

    assert case.kernel in layout.kernels
    assert layout.stored[case.parameter].kind == case.weight
    assert layout.different == ()
    assert layout.moved == ()
    assert layout.compared > 0


@pytest.mark.parametrize(("case", "says"), REFUSED, ids=lambda value: getattr(value, "id", ""))
def test_what_vllm_cannot_load_is_refused_with_its_own_words(
    case: Case, says: str, folder: Path
) -> None:
    for scheme in (None, config_name(case.scheme)):
        with pytest.raises((ValueError, AssertionError), match=says):
            load(case, folder, "a", scheme)
