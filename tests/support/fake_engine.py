"""A fake engine of two layers, and its session: what an update is, without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace

import torch
from torch import Tensor

from flashquant.update import Session, Stage, WhyInBf16, write

CPU = torch.device("cpu")


class FakeLayer:
    """One layer whose live tensors are its checkpoint tensors, gathered in stages."""

    placement, device, homes = "staged", CPU, MappingProxyType({})

    def __init__(self, name: str, live: dict[str, Tensor]) -> None:
        # Parameters, so that writes by others than the session are looked for.
        self.live = {t: torch.nn.Parameter(p, requires_grad=False) for t, p in live.items()}
        self.name = name
        self._stages = {t: Stage(p.shape, p.stride(), p.dtype) for t, p in live.items()}
        self.on_commit: Callable[[], object] = lambda: None

    @property
    def targets(self):
        return tuple(self.live)

    @property
    def _started(self):
        return any(stage.started for stage in self._stages.values())

    @property
    def missing(self):
        return tuple(t for t, s in self._stages.items() if self._started and not s.complete)

    @property
    def ready(self):
        return self._started and not self.missing

    @property
    def editable(self):
        return self.homes

    def refresh(self, targets, undo):
        return 0

    def stage(self, target):
        return self._stages[target]

    def held(self, target):
        stage = self._stages[target]
        return stage.memory(CPU) if stage.started else self.live[target]

    def window(self, step, undo, reach):
        return step.target_view.into(self._stages[step.target].memory(CPU))

    def receive(self, step, incoming, undo, reach, maxima):
        write(step, incoming, self._stages[step.target], CPU, maxima)

    def drop(self):
        for stage in self._stages.values():
            stage.clear()

    def keep_rest(self):
        pass

    def commit(self, undo):
        for target, live in self.live.items():
            undo.remember(live)
            live.copy_(self._stages[target].memory(CPU))
        self.on_commit()
        self.drop()
        return sum(live.nbytes for live in self.live.values())

    def tensors(self):
        yield from self.live.items()

    contents = tensors


class FakeEngine:
    """Two layers: q and k fused into one parameter, and a norm. `lm_head` is dropped.

    `norm` is what the norm's loader does to the tensor before it copies it.
    """

    scheme, device, shares_scales, tied = "int8", CPU, False, MappingProxyType({})
    is_alone = True
    optional: frozenset[str] = frozenset()
    in_bf16: Mapping[str, WhyInBf16] = MappingProxyType({})
    overrides: Mapping[str, str] = MappingProxyType({})
    cache_scales = SimpleNamespace(
        contents=lambda: iter(()), set=lambda scales, undo: None, restore=lambda: None
    )

    def __init__(self, dtype: torch.dtype = torch.bfloat16, norm=lambda loaded: loaded) -> None:
        qkv = {"qkv.weight": torch.zeros(6, 4, dtype=dtype)}
        if dtype == torch.int8:
            qkv["qkv.weight_scale"] = torch.zeros(6, 1)
        self.qkv = FakeLayer("qkv", qkv)
        self.norm = FakeLayer("norm", {"norm.weight": torch.zeros(4, dtype=torch.bfloat16)})
        self.layers = (self.qkv, self.norm)
        self.live = self.qkv.live | self.norm.live
        self.targets = {name: param.to("meta") for name, param in self.live.items()}
        self.stored = self.targets
        self.loads: list[tuple[str, bool]] = []  # name, and whether it held values
        self._under: Mapping[str, Tensor] = self.live
        self._norm = norm

    def make_anew(self, undo) -> None:
        """Its modules keep nothing."""

    def load(self, weights) -> None:
        for name, loaded in weights:
            self.loads.append((name, not loaded.is_meta))
            if name == "lm_head.weight":
                continue
            target = name.replace("q.", "qkv.").replace("k.", "qkv.")
            window = {
                "q": lambda param: param.narrow(0, 0, 4),
                "k": lambda param: param.narrow(0, 4, 2),
                "norm": lambda param: param,
            }[name.partition(".")[0]](self._under[target])
            window.copy_(self._norm(loaded) if name == "norm.weight" else loaded)

    @contextmanager
    def laid_out(self, values=None) -> Iterator[None]:
        kept, self._under = self._under, {**self.targets, **(values or {})}
        try:
            yield
        finally:
            self._under = kept


def weights(seed: int) -> dict[str, Tensor]:
    """One complete set, as a trainer sends it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q.weight": (4, 4), "k.weight": (2, 4), "norm.weight": (4,), "lm_head.weight": (8, 4)}
    return {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }


OLD, NEW = weights(1), weights(2)


def serving(engine: FakeEngine, start: Mapping[str, Tensor] = OLD, **kwargs) -> Session:
    """A session whose engine has loaded `start`."""
    session = Session(engine, **kwargs)
    with torch.no_grad():
        session.first_load(iter(start.items()))
    session.open()
    engine.loads.clear()
    return session


def fresh(start: Mapping[str, Tensor], **kwargs) -> dict[str, Tensor]:
    """The live tensors of a new engine that started on these weights."""
    engine = FakeEngine(**kwargs)
    serving(engine, start)
    return engine.live


def serves(engine: FakeEngine, expected: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(engine.live[name], expected[name]) for name in engine.live)


def only(*names: str, of: Mapping[str, Tensor] = NEW) -> list[tuple[str, Tensor]]:
    return [(name, of[name]) for name in names]


def breaking(*names: str, error: BaseException, of: Mapping[str, Tensor] = NEW):
    """Yield these weights, then raise."""
    yield from only(*names, of=of)
    raise error
