"""A thousand weight syncs of one live engine, a share of them made to fail.

    python -m benchmarks.soak [--reloads 1000] [--faults 0.3] [--seed 0] [--scheme int8]
                              [--model tiny|smollm2] [--out benchmarks/out]

Two policies alternate. After every failed reload the engine must hold what it held before, after
every good one what a fresh engine started on that policy holds; both by digest. (Two fresh engines,
each in a process that is gone before the soak begins, say what that is.) Exit code 1 if not.

The memory slope is the least-squares slope of resident memory over the reloads, without the first
fifth of them, in percent of mean resident memory, with a standard error (`benchmarks.trend`):

an hour of this loop          bytes per second of this loop's wall time x 3600: what an hour of
                              syncing back to back, digests and all, would add
an hour at one sync a minute  bytes per reload x 60: what an hour of such a trainer would add

Nothing is collected by hand, as in a trainer, and the loop writes its notes into memory that is
there before it begins: at twenty reloads a second a short list would be a slope of its own.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

import flashquant
from benchmarks import environment
from benchmarks.results import machine
from benchmarks.safety_cost import SCHEMES
from benchmarks.soak_report import Result, save, tables
from flashquant.errors import ReloadError
from flashquant.update import footprints
from tests.engine import faults
from tools.models.policies import Policies

_FUSED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")

Pairs = list[tuple[str, Tensor]]
Stream = Iterator[tuple[str, Any]]


class Fault(NamedTuple):
    """One way to spoil an update at one of its tensors, and what must come of it."""

    stream: Callable[[Pairs, int], Stream]
    raises: type[BaseException] = ReloadError
    strict: bool = True


class Turn(NamedTuple):
    """What one reload of the soak is to be: whole, or with this fault at this tensor."""

    fault: str | None
    index: int


def half_a_layer(pairs: Pairs, index: int) -> Stream:
    """All but one shard of a fused layer: the first shard at the index or after it."""
    shards = [place for place, (name, _) in enumerate(pairs) if name.endswith(_FUSED)]
    left_out = next((place for place in shards if place >= index), shards[0])
    return iter(pairs[:left_out] + pairs[left_out + 1 :])


FAULTS = {
    "iterator raises RuntimeError": Fault(
        faults.STREAMS["the iterator raises RuntimeError"], RuntimeError
    ),
    "iterator raises KeyboardInterrupt": Fault(
        faults.STREAMS["the iterator raises KeyboardInterrupt"], KeyboardInterrupt
    ),
    "NaN in a tensor": Fault(faults.STREAMS["NaN"]),
    "wrong shape": Fault(faults.STREAMS["a row too many"]),
    "wrong dtype": Fault(faults.STREAMS["int64"]),
    "unknown name": Fault(faults.STREAMS["an unknown name"]),
    "duplicate name": Fault(faults.STREAMS["twice"]),
    "missing tensor": Fault(faults.STREAMS["missing"]),
    "half a fused layer, not strict": Fault(half_a_layer, strict=False),
}


def measure(
    model: str, scheme: str, *, reloads: int, share: float, seed: int, warn: Callable[[str], None]
) -> Result:
    """Start one engine, soak it, and look whether anything moved."""
    with tempfile.TemporaryDirectory() as folder:
        policies = Policies(Path(folder), "llama" if model == "tiny" else model)
        paths = [policies.bf16(policy) for policy in "ab"]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            fresh = list(pool.map(fresh_digest, paths, [scheme] * 2))
        flashquant.patch()
        from flashquant.patches.diagnostics import start

        llm = start(paths[0], scheme)
        # Clones: a tensor that still lies in its file would count as resident when it is read.
        pairs = [[(n, t.clone()) for n, t in policies.tensors(policy).items()] for policy in "ab"]
    before = footprints(live_tensors(llm))
    loop = Soak(llm, pairs, fresh, turns(reloads, share, len(pairs[0]), seed), warn)
    loop.run()
    after = footprints(live_tensors(llm))
    return Result(
        machine=machine(),
        model=f"{model}-llama" if model == "tiny" else model,
        scheme=scheme,
        seed=seed,
        threads=torch.get_num_threads(),  # vLLM decides it with the first engine
        tensors=len(before),
        moved=[name for name in before | after if before.get(name) != after.get(name)],
        violations=loop.violations,
        raised={fault: dict(counts) for fault, counts in loop.raised.items()},
        faults=[turn.fault for turn in loop.turns],
        clock=list(loop.clock),
        seconds=list(loop.seconds),
        rss=list(loop.rss),
    )


def fresh_digest(path: Path, scheme: str) -> str | None:
    """What an engine holds that was started on a policy; runs in a process of its own."""
    flashquant.patch()
    from flashquant.patches.diagnostics import start

    digest: str | None = flashquant.status(start(path, scheme)).digest
    return digest


def live_tensors(llm: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the kernels read, by full name; a oneDNN handler shows its pointer."""
    from flashquant.patches.layers import kernel_state

    for name, module in llm.apply_model(lambda model: model)[0].named_modules():
        for path, tensor in kernel_state.tensors(module):
            yield f"{name}.{path}", tensor


def turns(reloads: int, share: float, tensors: int, seed: int) -> list[Turn]:
    """What each reload is to be, thrown before the loop begins."""
    dice = random.Random(seed)
    return [
        Turn(dice.choice(list(FAULTS)) if dice.random() < share else None, dice.randrange(tensors))
        for _ in range(reloads)
    ]


class Soak:
    """The loop: reload, compare, note."""

    def __init__(
        self,
        llm: Any,
        policies: list[Pairs],
        fresh: list[str | None],
        turns: list[Turn],
        warn: Callable[[str], None],
    ) -> None:
        self.turns = turns
        self.violations: list[str] = []
        self.raised: dict[str, Counter[str]] = {fault: Counter() for fault in FAULTS}
        self.clock, self.seconds = (array("d", bytes(8 * len(turns))) for _ in range(2))
        self.rss = array("q", bytes(8 * len(turns)))
        self._llm, self._policies, self._fresh, self._warn = llm, policies, fresh, warn
        self._serves, self._digest = 0, fresh[0]

    def run(self) -> None:
        """Take every turn."""
        self._look("the start", fresh=True)
        process, began = psutil.Process(), time.perf_counter()
        for number, turn in enumerate(self.turns):
            self._take(number, turn)
            self.clock[number] = time.perf_counter() - began
            self.rss[number] = process.memory_info().rss

    def _take(self, number: int, turn: Turn) -> None:
        other = 1 - self._serves
        fault = FAULTS[turn.fault] if turn.fault else None
        weights = self._policies[other]
        sent = fault.stream(weights, turn.index) if fault else weights
        strict = fault is None or fault.strict
        began = time.perf_counter()
        raised = attempt(
            lambda: flashquant.reload_weights(self._llm, sent, strict=strict),
            () if fault is None else (fault.raises,),
        )
        self.seconds[number] = time.perf_counter() - began
        what = f"reload {number}, {turn.fault or 'good'}, at tensor {turn.index}"
        if turn.fault and raised:
            self.raised[turn.fault][raised.__name__] += 1
        if not as_meant(fault, raised):
            self._note(f"{what}: raised {raised}")
        if fault is None:
            self._serves = other
        self._look(what, fresh=fault is None)

    def _look(self, what: str, *, fresh: bool) -> None:
        """The engine holds what it held before or, after a good reload, what a fresh one does."""
        status = flashquant.status(self._llm)
        if status.digest != (self._fresh[self._serves] if fresh else self._digest):
            self._note(f"{what}: the engine serves neither the old weights nor a fresh start")
        if status.pending or status.torn:
            self._note(f"{what}: pending {dict(status.pending)}, torn: {status.torn}")
        self._digest = status.digest

    def _note(self, violation: str) -> None:
        self.violations.append(violation)
        self._warn(f"VIOLATION: {violation}")


def attempt(
    call: Callable[[], object], meant: tuple[type[BaseException], ...]
) -> type[BaseException] | None:
    """What a call raised, by class: a traceback would keep the tensors of its frames alive."""
    try:
        call()
    except (Exception, *meant) as failure:  # not somebody's own Ctrl-C
        return type(failure)
    return None


def as_meant(fault: Fault | None, raised: type[BaseException] | None) -> bool:
    if fault is None or raised is None:
        return fault is None and raised is None
    return issubclass(raised, fault.raises)


def main(argv: list[str] | None = None) -> int:
    """Soak, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description="reload one engine a thousand times"
    )
    parser.add_argument("--reloads", type=int, default=1000)
    parser.add_argument("--faults", type=float, default=0.3, help="share of reloads made to fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", choices=SCHEMES, default="int8")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    environment.prepare()
    print(", ".join(f"{fact}: {value}" for fact, value in machine().items()), flush=True)
    result = measure(
        arguments.model,
        arguments.scheme,
        reloads=arguments.reloads,
        share=arguments.faults,
        seed=arguments.seed,
        warn=lambda line: print(line, flush=True),
    )
    print(f"\n{result.model} in {result.scheme}, seed: {result.seed}, threads: {result.threads}")
    print(f"\n{tables(result)}\n")
    for path in save(result, arguments.out):
        print(f"wrote {path}")
    return 1 if result.violations or result.moved else 0


if __name__ == "__main__":
    raise SystemExit(main())
