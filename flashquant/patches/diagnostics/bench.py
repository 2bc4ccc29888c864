"""How long a weight sync takes on this machine: ours, vLLM's own, and the bytes alone.

    copy limit                  `copy_` of the same tensors into memory that is there already
    vLLM's own reload           `reload_weights` of an engine that flashquant does not look after
    flashquant                  `flashquant.reload_weights`, with its undo log and without

All live in one process and take turns, round after round: a slow minute of the machine is
everybody's. vLLM's reload is timed here, not judged; with some models it is silently wrong.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from vllm import LLM

from flashquant.config.schemes import ONLINE, SCHEMES
from flashquant.patches import patch
from flashquant.patches.remote import reload_weights
from flashquant.patches.seams.emulation import is_emulated
from flashquant.plan import named_tensors
from flashquant.update import ReloadReport

COPY_LIMIT = "copy limit"
NATIVE = "vLLM's own reload"

Sync = Callable[[Mapping[str, Tensor]], object]


@dataclass(frozen=True)
class Timing:
    """One way to sync: how long it took, in seconds.

    Attributes:
        first: the very first one, with what is learned only once (write plans, kernels).
        rounds: each one after it.
        phases: seconds in each phase of a reload, medians; of a sync that tells them.

    """

    name: str
    first: float
    rounds: list[float]
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return median(self.rounds)


@dataclass(frozen=True)
class Result:
    """Everything that one run found; plain data. The copy limit comes first, then vLLM in bf16."""

    model: str
    scheme: str
    device: str
    threads: int
    tensors: int
    bytes: int
    syncs: list[Timing]
    start: float  # seconds that a new engine of the scheme took, in this process


def measure(path: Path, scheme: str, rounds: int) -> Result:
    """Start engines on a checkpoint, and push it into each in turn.

    Args:
        path: a folder with a Hugging Face checkpoint in bf16.
        scheme: what FLASHRL_CONFIG would say: a scheme, or a file.
        rounds: how often each takes its turn, after one that does not count.

    Raises:
        ReloadError: the folder holds no safetensors, or a reload did not go through.
        ConfigError: what FLASHRL_CONFIG may not say.

    """
    weights = dict(named_tensors(path))
    patch()
    theirs = {NATIVE: start(path, None)}  # the first, so that it pays for what is global
    if scheme in ONLINE and not is_emulated(SCHEMES[scheme]):  # vLLM alone would not start
        theirs[f"{NATIVE}, {ONLINE[scheme]}"] = start(path, None, quantization=ONLINE[scheme])
    began = time.perf_counter()
    ours = start(path, scheme)
    seconds = time.perf_counter() - began
    device = ours.apply_model(_device)[0]
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    syncs: dict[str, Sync] = {COPY_LIMIT: copy_limit(weights)}
    syncs |= {name: native(llm) for name, llm in theirs.items()}
    syncs[f"flashquant, {scheme}"] = whole(ours, atomic=True)
    syncs[f"flashquant, {scheme}, atomic=False"] = whole(ours, atomic=False)
    return Result(
        model=path.name,
        scheme=scheme,
        device=str(device),
        threads=torch.get_num_threads(),  # vLLM decides it with the first engine
        tensors=len(weights),
        bytes=sum(tensor.nbytes for tensor in weights.values()),
        syncs=take_turns(syncs, [weights], rounds),
        start=seconds,
    )


def start(path: Path, config: str | None, **options: Any) -> LLM:
    """An engine as a trainer starts it; without FLASHRL_CONFIG, flashquant leaves it alone."""
    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 16 << 20,
        "max_model_len": 128,
        "dtype": "bfloat16",
    }
    with flashrl_config(config):
        return LLM(str(path), **(defaults | room_for_others() | options))


def room_for_others() -> dict[str, float]:
    """What a small engine is told of a GPU that it shares with others.

    Where `kv_cache_memory_bytes` is given, vLLM takes what it needs and no more. But it does not
    start unless this share of the memory is free, and its default is nearly all of it.
    """
    return {"gpu_memory_utilization": 0.05} if torch.cuda.is_available() else {}


@contextmanager
def flashrl_config(config: str | None) -> Iterator[None]:
    """The environment variable as this engine shall find it."""
    kept = os.environ.pop("FLASHRL_CONFIG", None)
    if config is not None:
        os.environ["FLASHRL_CONFIG"] = config
    try:
        yield
    finally:
        os.environ.pop("FLASHRL_CONFIG", None)
        if kept is not None:
            os.environ["FLASHRL_CONFIG"] = kept


def copy_limit(weights: Mapping[str, Tensor]) -> Sync:
    """`copy_` into memory that exists already, tensor by tensor."""
    live = {name: tensor.clone() for name, tensor in weights.items()}

    def sync(weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            live[name].copy_(tensor)
        _wait()

    return sync


def native(llm: LLM) -> Sync:
    """vLLM's layerwise reload of an engine that flashquant does not look after."""

    def sync(weights: Mapping[str, Tensor]) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        _wait()

    return sync


def whole(llm: LLM, *, atomic: bool) -> Sync:
    """One call for everything, with undo log or without."""

    def sync(weights: Mapping[str, Tensor]) -> object:
        report = reload_weights(llm, weights, atomic=atomic)
        _wait()
        return report

    return sync


def _wait() -> None:
    """Until a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(
    syncs: Mapping[str, Sync],
    policies: Sequence[Mapping[str, Tensor]],
    rounds: int,
    lost: Callable[[str, Exception], None] | None = None,
) -> list[Timing]:
    """Time A B C A B C ..., after one turn that nobody counts; the policies alternate.

    Args:
        syncs: everybody who takes a turn, by name.
        policies: what they bring in.
        rounds: how often each takes a turn that counts.
        lost: called with what a sync raises, which is then left out; else that is raised.

    """
    syncs = dict(syncs)
    seconds: dict[str, list[float]] = {name: [] for name in syncs}
    phases: dict[str, list[Mapping[str, float]]] = {name: [] for name in syncs}
    for turn in range(rounds + 1):
        for name, sync in list(syncs.items()):
            try:
                took, report = timed(sync, policies[(turn + 1) % len(policies)])
            except Exception as failure:
                if lost is None:
                    raise
                lost(name, failure)
                del syncs[name]
                continue
            seconds[name].append(took)
            if isinstance(report, ReloadReport) and turn:
                phases[name].append(report.phases)
    return [
        Timing(name, first, rest, _medians(phases[name]))
        for name, (first, *rest) in ((name, seconds[name]) for name in syncs)
    ]


def timed(sync: Sync, weights: Mapping[str, Tensor]) -> tuple[float, object]:
    """Seconds of one sync, without a garbage collection that another one made necessary."""
    gc.collect()
    began = time.perf_counter()
    said = sync(weights)
    return time.perf_counter() - began, said


def _medians(phases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in phases for name in each)
    return {name: median(each.get(name, 0.0) for each in phases) for name in names}


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
