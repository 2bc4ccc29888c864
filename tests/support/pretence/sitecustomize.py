"""Run at the start of every Python that a pretending test starts: see tests/support/isa.py."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "flashquant_pretence", Path(__file__).parents[1] / "isa.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_isa = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_isa)
_isa.pretend()
