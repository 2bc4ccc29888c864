"""Weights that the engine has put away cannot be written, and some do not come back.

sleep(1)             weights move to host memory and come back as they were
sleep(2), discard    their memory is given up; what comes back holds anything
the KV cache         no undo log can lie in it while it is put away; one that does is played back
reset_weights        vLLM's weight checker sets them to zero, to see an update come

vLLM keeps buffers over level 2, and a push brings weights. What is neither is kept here: what
kernels work in or take as constants (locks of Marlin, strides, ranges of an attention), and, up
to 0.27, the scales of a W8A8 model's attention, which are parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from flashquant.patches.channels import CACHE_AWAY
from flashquant.patches.layers import leaves
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.loading import find_session, models_of
from flashquant.update import Session

_WEIGHTS, _CACHE = "weights", "kv_cache"
_SCALES = ("_q_scale", "_k_scale", "_v_scale")  # of an attention layer, for its cache
_LARGEST = 1 << 20  # bytes: what is larger was made of weights, and a push makes it again

# What models asleep at level 2 get back when they wake up.
_kept: WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def _sleep(original: Any, worker: Any, level: int = 1) -> None:
    if level >= 2:
        _keep(worker)
    for session in _sessions(worker):
        session.sleep(keeps_weights=level < 2)
    CACHE_AWAY.put(worker, True)
    original(worker, level)


def _discard(original: Any, worker: Any, tags: tuple[str, ...]) -> None:
    if _CACHE in tags:
        CACHE_AWAY.put(worker, True)
        for session in _sessions(worker):
            session.transactions.give_back()
    if _WEIGHTS in tags:
        _keep(worker)
        for session in _sessions(worker):
            session.sleep(keeps_weights=False)
    original(worker, tags)


def _wake_up(original: Any, worker: Any, tags: list[str] | None = None) -> None:
    original(worker, tags)
    if tags is None or _CACHE in tags:
        CACHE_AWAY.take(worker)
    if tags is None or _WEIGHTS in tags:
        _give_back(worker)
        for session in _sessions(worker):
            session.wake_up()
    for session in _sessions(worker):
        session.restore_cache_scales()


def _reset_weights(original: Any, worker: Any) -> None:
    session = find_session(worker.get_model())
    if session is not None:
        session.overwritten()
    original(worker)


def _keep(worker: Any) -> None:
    """Unless it sleeps already: then there may be no memory to read."""
    if any(session.transactions.serving.asleep for session in _sessions(worker)):
        return
    for model in models_of(worker):
        if model not in _kept:
            _kept[model] = [(tensor, tensor.cpu().clone()) for tensor in _of_no_push(model)]


def _give_back(worker: Any) -> None:
    for model in models_of(worker):
        for tensor, kept in _kept.pop(model, ()):
            tensor.copy_(kept)


def _of_no_push(model: nn.Module) -> Iterator[Tensor]:
    """What neither vLLM keeps nor a push brings."""
    for module in model.modules():
        for path, leaf in leaves(module).items():
            is_kept = path in module._buffers
            is_weight = path in module._parameters and path not in _SCALES
            if isinstance(leaf, Tensor) and not (is_kept or is_weight or leaf.nbytes > _LARGEST):
                yield leaf.data


def _sessions(worker: Any) -> list[Session]:
    """Those of the model, and of its speculative draft."""
    found = (find_session(model) for model in models_of(worker))
    return [session for session in found if session is not None]


_WORKER = "vllm.v1.worker.gpu_worker:Worker"

POINTS = (
    PatchPoint(f"{_WORKER}.sleep", expects=("self", "level"), wrapper=_sleep),
    PatchPoint(f"{_WORKER}.wake_up", expects=("self", "tags"), wrapper=_wake_up),
    PatchPoint(f"{_WORKER}.discard", expects=("self", "tags"), wrapper=_discard, within=">=0.31"),
    PatchPoint(
        f"{_WORKER}.reset_weights", expects=("self",), wrapper=_reset_weights, within=">=0.32"
    ),
)
