"""What a trainer sends by NCCL is received to its end, also where some of it is refused.

It is sent in one go, however many tensors and buckets that are, and each of them is a collective:
a worker that raises in the middle leaves the trainer, and the other workers, waiting for ever. So
the first refusal is kept until everything has come, and raised then. flashquant's own transfer
over gloo does the same (transfer/gloo_worker.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from flashquant.patches.channels import Ambient
from flashquant.patches.point import PatchPoint


@dataclass
class _Reception:
    """One call that receives; `failure` is the first that was raised in it."""

    failure: Exception | None = None


_UNDER_WAY: Final = Ambient[_Reception]("flashquant_reception")

Push = Callable[[Iterable[tuple[str, Tensor]]], object]


def received(push: Push, weights: Iterable[tuple[str, Tensor]]) -> object:
    """Push; but while a transfer is under way, a failure waits for its end.

    What comes after a failure is taken and dropped: its update has been rolled back.
    """
    reception = _UNDER_WAY.get()
    if reception is None:
        return push(weights)
    weights = iter(weights)
    if reception.failure is None:
        try:
            return push(weights)
        except Exception as failure:  # whatever it is, the trainer goes on sending
            reception.failure = failure
    for _ in weights:
        pass
    return set()


def _receive_weights(original: Any, engine: Any, *args: Any, **kwargs: Any) -> None:
    reception = _Reception()
    with _UNDER_WAY.given(reception):
        original(engine, *args, **kwargs)
    if reception.failure is not None:
        raise reception.failure


POINTS = (
    PatchPoint(
        "vllm.distributed.weight_transfer.nccl_engine:NCCLWeightTransferEngine.receive_weights",
        expects=("self", "update_info", ...),
        wrapper=_receive_weights,
    ),
)
