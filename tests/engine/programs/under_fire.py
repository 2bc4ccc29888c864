"""A mixture over two ranks, one of which fails alone, is late or dies, at any point of an update.

Usage: python -m tests.engine.programs.under_fire A B tensors|experts FAULTS SEED
The third says whether each rank has a part of every expert, or every second expert.
Prints one JSON object: what each fault was, and what both ranks held after it; the same with each
of `BROKEN`, which is to be seen; and what was raised when a rank died.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.engine.programs.engine import OPTIONS, print_result
from tests.engine.programs.failing import raised_by
from tests.engine.programs.rank_under_fire import BROKEN, POINTS

_LATE = {"is late": 0.1, "is too late": 2.5}  # seconds; the other rank looks once a second
_BROKEN_ON = 1  # the rank that does not keep the promise
_TRIES = 12  # until that is seen


class Fault(NamedTuple):
    """One rank does something at one call of a function, in one way of pushing."""

    way: str
    rank: int
    point: int
    at: int
    does: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.way}: rank {self.rank} {self.does} at call {self.at} of {POINTS[self.point]}"


class UnderFire:
    """One engine over two ranks, and what both are to hold of each policy."""

    def __init__(self, paths: dict[str, str], cut: str, seed: int) -> None:
        from vllm import LLM

        self._paths, self._dice = paths, random.Random(seed)
        self._llm = LLM(
            paths["a"],
            **OPTIONS,
            tensor_parallel_size=2,
            enable_expert_parallel=cut == "experts",
            enable_prefix_caching=False,
            worker_extension_cls="tests.engine.programs.rank_under_fire.UnderFire",
        )
        self._ways = _ways(self._llm)
        self._right = {"a": self._digests()}
        self._ways["reload_weights"](paths["b"])
        self._right["b"], self._serves = self._digests(), "b"
        self._calls = {way: self._counted(way) for way in self._ways}

    def inject(self, fault: Fault) -> dict[str, Any]:
        """What came of a fault; afterwards one complete update, which is to equal the first."""
        before, other = self._serves, self._other
        self._ask("arm", *fault[1:])
        kind, says, seconds = raised_by(lambda: self._ways[fault.way](self._paths[other]))
        reached, held = any(self._ask("disarm")), self._held()
        told = {
            "fault": str(fault),
            "does": fault.does,
            "reached": reached,
            "raised": f"{kind}: {says}",
            "seconds": seconds,
            "held": {before: "old", other: "new"}.get(held, held),
        }
        self._serves = held if held in self._right else before
        self._ask("mend")
        self.update()
        return told | {"afterwards": self._held() == self._serves}

    def update(self) -> None:
        """To the other policy, completely."""
        self._ways["reload_weights"](self._paths[self._other])
        self._serves = self._other

    def any_fault(self) -> Fault:
        """One rank raises, or is late, as often in each way as in any other."""
        does = self._dice.choice((*["raises"] * 9, *["is late"] * 3, "is too late"))
        return self._somewhere(self._dice.choice(tuple(self._ways)), does)

    def broken(self, how: str) -> bool:
        """Whether it is seen that a rank does not keep the promise."""
        for _ in range(_TRIES):
            fault = self._somewhere("reload_weights", "raises", rank=0)
            self._ask("break_promise", _BROKEN_ON, how)
            if self.inject(fault)["held"] not in ("old", "new"):
                return True
        return False

    def lost(self) -> tuple[Fault, tuple[str, str, float]]:
        """A rank dies, and the engine with it."""
        fault = self._somewhere(self._dice.choice(("reload_weights", "prepared")), "dies")
        self._ask("arm", *fault[1:])
        return fault, raised_by(lambda: self._ways[fault.way](self._paths[self._other]))

    def _somewhere(self, way: str, does: str, rank: int | None = None) -> Fault:
        calls = self._calls[way]
        point = self._dice.choice([point for point, count in enumerate(calls) if count])
        rank = self._dice.randrange(2) if rank is None else rank
        return Fault(
            way, rank, point, self._dice.randrange(calls[point]), does, _LATE.get(does, 0.0)
        )

    def _counted(self, way: str) -> list[int]:
        """How often each function is called in an update, on the rank where that is less often."""
        self._ask("count")
        self._ways[way](self._paths[self._other])
        self._serves = self._other
        return [min(counts) for counts in zip(*self._ask("disarm"), strict=True)]

    @property
    def _other(self) -> str:
        return "b" if self._serves == "a" else "a"

    def _held(self) -> str:
        """The policy that both ranks hold, whole; or what they do hold."""
        import flashquant

        status, digests = flashquant.status(self._llm), self._digests()
        same = [policy for policy, right in self._right.items() if right == digests]
        if same and not status.pending and not status.torn:
            return same[0]
        of = {d: p for p, right in self._right.items() for d in right}
        return f"ranks {[of.get(d, 'a mixture') for d in digests]}, pending {dict(status.pending)}"

    def _digests(self) -> tuple[str | None, ...]:
        import flashquant

        return flashquant.status(self._llm).ranks

    def _ask(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = self._llm.collective_rpc(method, args=args)
        return answers


def _ways(llm: Any) -> dict[str, Callable[[str], object]]:
    """The calls in which the ranks agree, each given a checkpoint."""
    import flashquant
    from tools.models import tiny_models

    return {
        "reload_weights": lambda path: flashquant.reload_weights(llm, Path(path)),
        "prepared": lambda path: flashquant.reload_weights(
            llm, tiny_models.tensors(Path(path)), prepare=True
        ),
        "vLLM's own": lambda path: llm.collective_rpc(
            "reload_weights", kwargs={"weights_path": path}
        ),
        "in a bracket": lambda path: llm.collective_rpc("take", args=("layerwise_bracket", path)),
    }


def main(a: str, b: str, cut: str, faults: str, seed: str) -> dict[str, Any]:
    engine = UnderFire({"a": a, "b": b}, cut, int(seed))
    told = [engine.inject(engine.any_fault()) for _ in range(int(faults))]
    broken = {how: engine.broken(how) for how in BROKEN}
    fault, lost = engine.lost()
    return {"told": told, "broken": broken, "died": fault.rank, "lost": lost}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
