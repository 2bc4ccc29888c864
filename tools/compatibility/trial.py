"""One cell of the table: an architecture in a scheme, on two real engines.

`exact` means: B is pushed over A, A over B and B over A once more, as one iterator and a
tensor at a time; each time everything the kernels read, the log-probs of four prompts and
4 greedy tokens of each are bit for bit those of an engine that was started there. An
update that is taken back leaves no trace, and no live tensor has moved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor, nn

import tests.conftest  # noqa: F401  (the environment in which engines share a process)
from flashquant.errors import FlashquantError
from flashquant.update import footprints
from tools.architectures import write
from tools.compatibility.cell import DIED, EXACT, REFUSED, WRONG, Cell, options_of, scheme_of
from tools.models import tiny_models

# Most of a cell is generation: enough for the kernels that serve few rows.
_TOKENS = 4
_KEPT: list[Any] = []  # an engine that is collected takes the others' parallel state along


def kernels() -> str:
    """As on a machine with AMX, where vLLM's build for this CPU has kernels for it.

    vLLM has its fp8 blocks and its int8 experts for no other. (Without AMX these kernels run
    on AVX512-BF16: slower, from the same bytes.)
    """
    from tests.engine.kernels import has_amx_kernels

    return "amx" if has_amx_kernels() else "portable"


def policy(folder: Path, architecture: str, which: str) -> Path:
    """The checkpoint of policy `a` or `b`."""
    from tests.engine import sights

    path, seed = folder / architecture / which, "ab".index(which)
    if architecture in sights.SIGHTS:
        return path if path.exists() else sights.make(architecture, path, seed)
    return write(architecture, seed, path)


def judge(architecture: str, column: str, folder: Path) -> Cell:
    """Start both engines, push, compare."""
    from tests.engine import sights
    from tests.engine.serving import choosing

    try:
        with choosing(kernels()):
            look = _differences_seen if architecture in sights.SIGHTS else _differences
            complaint = look(architecture, column, folder)
    except FlashquantError as error:
        return Cell(architecture, column, REFUSED, str(error))
    except Exception as error:  # whatever an engine dies of
        return Cell(architecture, column, DIED, f"{type(error).__name__}: {error}")
    return Cell(architecture, column, WRONG if complaint else EXACT, complaint)


def _differences(architecture: str, column: str, folder: Path) -> str:
    from tests.engine.serving import serve

    paths = {which: policy(folder, architecture, which) for which in "ab"}
    scheme, options = scheme_of(column), options_of(column)
    live, fresh = (
        serve(paths[which], scheme, kernels(), tokens=_TOKENS, **options) for which in "ab"
    )
    if live.start.outputs == fresh.start.outputs:
        return "policies a and b say the same, so nothing is shown"
    before = footprints(live.tensors().items())
    for push, which in ((_one_iterator, "b"), (_by_tensor, "a"), (_by_tensor, "b")):
        push(live.model, tiny_models.tensors(paths[which]))
        expected = (live if which == "a" else fresh).start
        if different := live.snapshot().different_from(expected):
            return f"after {push.__name__} of {which}: {different}"
    live.session.begin()
    _one_iterator(live.model, tiny_models.tensors(paths["a"]))
    live.session.abandon()
    if different := live.snapshot().different_from(fresh.start):
        return f"after an update that was taken back: {different}"
    after = footprints(live.tensors().items())
    moved = [name for name, where in after.items() if before.get(name) != where]
    return f"moved: {moved[:3]}" if moved else ""


def _differences_seen(architecture: str, scheme: str, folder: Path) -> str:
    """Of a model that is shown images: as `tests/engine/test_vision.py` looks at it."""
    from tests.engine.programs import seen

    a, b = (policy(folder, architecture, which) for which in "ab")
    for caching in (False, True):
        fresh = [seen.stands(_shown(path, scheme, caching)) for path in (a, b)]
        if fresh[0][2] in (fresh[0][1], fresh[1][2]):
            return "an image or a policy makes no difference, so nothing is shown"
        told = seen.converse(_shown(a, scheme, caching), a, b)
        wrong = [at for at, one in enumerate(told) if one != fresh[at % 2]]
        if wrong:
            return f"after pushes {wrong} of b, a, b, a ({caching=})"
    return ""


def _shown(path: Path, scheme: str, caching: bool) -> Any:
    """An engine that takes images; it stays until the process ends."""
    from vllm import LLM

    import flashquant
    from tests.engine import sights
    from tests.support import fp8

    flashquant.patch()
    fp8.multiply_as_everywhere()
    asked = {"FLASHRL_CONFIG": scheme, "FLASHQUANT_EMULATE": "1"}
    with mock.patch.dict(os.environ, asked), sights.understood():
        _KEPT.append(LLM(str(path), **sights.options(enable_prefix_caching=caching)))
    return _KEPT[-1]


def _one_iterator(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_weights((name, tensor) for name, tensor in weights.items())


def _by_tensor(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        model.load_weights([(name, tensor)])
