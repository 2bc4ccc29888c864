"""One cell of the table: an architecture in a scheme, on two real engines.

`exact` means: B is pushed over A, A over B and B over A once more, as one iterator and a
tensor at a time; each time everything the kernels read, the log-probs of four prompts and
4 greedy tokens of each are bit for bit those of an engine that was started there. An
update that is taken back leaves no trace, and no live tensor has moved.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

import tests.conftest  # noqa: F401  (the environment in which engines share a process)
from flashquant.errors import FlashquantError
from flashquant.update import footprints
from tools.architectures import write
from tools.compatibility.cell import DIED, EXACT, REFUSED, WRONG, Cell
from tools.models import tiny_models

# Most of a cell is generation: enough for the kernels that serve few rows.
_TOKENS = 4


def kernels() -> str:
    """As on a machine with AMX, where vLLM's build for this CPU has kernels for it.

    vLLM has its fp8 blocks and its int8 experts for no other. (Without AMX these kernels run
    on AVX512-BF16: slower, from the same bytes.)
    """
    from tests.engine.kernels import has_amx_kernels

    return "amx" if has_amx_kernels() else "portable"


def policy(folder: Path, architecture: str, which: str) -> Path:
    """The checkpoint of policy `a` or `b`."""
    return write(architecture, "ab".index(which), folder / architecture / which)


def judge(architecture: str, scheme: str, folder: Path) -> Cell:
    """Start both engines, push, compare."""
    from tests.engine.serving import choosing

    try:
        with choosing(kernels()):
            complaint = _differences(architecture, scheme, folder)
    except FlashquantError as error:
        return Cell(architecture, scheme, REFUSED, str(error))
    except Exception as error:  # whatever an engine dies of
        return Cell(architecture, scheme, DIED, f"{type(error).__name__}: {error}")
    return Cell(architecture, scheme, WRONG if complaint else EXACT, complaint)


def _differences(architecture: str, scheme: str, folder: Path) -> str:
    from tests.engine.serving import serve

    paths = {which: policy(folder, architecture, which) for which in "ab"}
    live, fresh = (serve(paths[which], scheme, kernels(), tokens=_TOKENS) for which in "ab")
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


def _one_iterator(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_weights((name, tensor) for name, tensor in weights.items())


def _by_tensor(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        model.load_weights([(name, tensor)])
