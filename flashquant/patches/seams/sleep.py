"""Weights that the engine has put away cannot be written, and some do not come back.

sleep(1)             weights move to host memory and come back as they were
sleep(2), discard    their memory is given up; what comes back holds anything
the KV cache         no undo log can lie in it while it is put away; one that does is played back
reset_weights        vLLM's weight checker sets them to zero, to see an update come

vLLM keeps buffers over level 2. Up to 0.27 the scales of a W8A8 model's attention are parameters,
which no push brings back: they are kept here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from flashquant.patches.channels import CACHE_AWAY
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.loading import find_session, models_of
from flashquant.update import Session

_WEIGHTS, _CACHE = "weights", "kv_cache"
_SCALES = ("_q_scale", "_k_scale", "_v_scale")  # of an attention layer, for its cache

# What models asleep at level 2 get back when they wake up.
_kept: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def _sleep(original: Any, worker: Any, level: int = 1) -> None:
    for session in _sessions(worker):
        session.sleep(keeps_weights=level < 2)
    CACHE_AWAY.put(worker, True)
    if level >= 2:
        _keep_scales(worker)
    original(worker, level)


def _discard(original: Any, worker: Any, tags: tuple[str, ...]) -> None:
    if _CACHE in tags:
        CACHE_AWAY.put(worker, True)
        for session in _sessions(worker):
            session.transactions.give_back()
    if _WEIGHTS in tags:
        for session in _sessions(worker):
            session.sleep(keeps_weights=False)
    original(worker, tags)


def _wake_up(original: Any, worker: Any, tags: list[str] | None = None) -> None:
    original(worker, tags)
    if tags is None or _CACHE in tags:
        CACHE_AWAY.take(worker)
    if tags is None or _WEIGHTS in tags:
        _give_scales_back(worker)
        for session in _sessions(worker):
            session.wake_up()
    for session in _sessions(worker):
        session.restore_cache_scales()


def _reset_weights(original: Any, worker: Any) -> None:
    session = find_session(worker.get_model())
    if session is not None:
        session.overwritten()
    original(worker)


def _keep_scales(worker: Any) -> None:
    for model in models_of(worker):
        if model not in _kept:  # else it sleeps already, and there may be no memory to read
            _kept[model] = {name: scale.cpu().clone() for name, scale in _scales(model)}


def _give_scales_back(worker: Any) -> None:
    for model in models_of(worker):
        kept = _kept.pop(model, {})
        for name, scale in _scales(model):
            if name in kept:
                scale.copy_(kept[name])


def _scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _SCALES:
            yield name, parameter.data


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
