"""One cell of the table: an architecture in a scheme, on two real engines.

`exact` means: A is pushed over B and B over A, once as one iterator and once a tensor at a
time; each time everything the kernels read, prompt log-probs and 16 greedy tokens are bit
for bit those of an engine started there, and no live tensor has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import tests.conftest  # noqa: F401  (the environment in which engines share a process)
from flashquant.errors import FlashquantError
from flashquant.verify import footprints
from tests import tiny_models
from tests.architectures import write

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel", "fp8_block")
EXACT, ENGINE, REFUSED, WRONG = "exact", "engine", "refused", "WRONG"


@dataclass(frozen=True)
class Cell:
    """What came out, and the reason where it is not `exact`."""

    architecture: str
    scheme: str
    verdict: str
    why: str = ""


def policy(folder: Path, architecture: str, which: str) -> Path:
    """The checkpoint of policy `a` or `b`."""
    return write(architecture, "ab".index(which), folder / architecture / which)


def judge(architecture: str, scheme: str, folder: Path, kernels: str = "amx") -> Cell:
    """Start both engines, push, compare. An engine that cannot start is nobody's fault yet."""
    from tests.engine.serving import choosing

    try:
        with choosing(kernels):
            complaint = _differences(architecture, scheme, folder, kernels)
    except FlashquantError as error:
        return Cell(architecture, scheme, REFUSED, f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever an engine dies of: `control` looks again
        return Cell(architecture, scheme, WRONG, f"{type(error).__name__}: {error}")
    return Cell(architecture, scheme, WRONG if complaint else EXACT, complaint)


def _differences(architecture: str, scheme: str, folder: Path, kernels: str) -> str:
    from tests.engine.serving import serve

    paths = {which: policy(folder, architecture, which) for which in "ab"}
    live, fresh = (serve(paths[which], scheme, kernels) for which in "ab")
    if live.start.outputs == fresh.start.outputs:
        return "policies a and b say the same, so nothing is shown"
    before = footprints(live.tensors().items())
    for push, which in ((_one_iterator, "b"), (_by_tensor, "a"), (_by_tensor, "b")):
        push(live.model, tiny_models.tensors(paths[which]))
        expected = (live if which == "a" else fresh).start
        if different := live.snapshot().different_from(expected):
            return f"after {push.__name__} of {which}: {different}"
    moved = [
        name
        for name, where in footprints(live.tensors().items()).items()
        if before.get(name) != where
    ]
    return f"moved: {moved[:3]}" if moved else ""


def _one_iterator(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_weights((name, tensor) for name, tensor in weights.items())


def _by_tensor(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        model.load_weights([(name, tensor)])
