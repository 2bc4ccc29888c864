"""Trainers as they are, a tiny engine that they push to, and what is right after each sync."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

import flashquant
from flashquant.errors import ReloadError, TornWeights
from flashquant.patches.guard import vllm_is
from flashquant.update import Status
from tests.engine.serving import serve
from tools.models import tiny_models

POLICIES = "abc"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FROZEN = {
    "nothing": (),
    "the embeddings": ("embed_tokens",),
    "a layer": ("o_proj", "gate_proj", "up_proj"),
    "shards": ("k_proj", "up_proj"),
    "norms": ("norm",),
    "all but q and v": ("embed", "norm", "k_proj", "o_proj", "mlp"),
}
SPOILED: dict[str, Callable[[str, Tensor], tuple[str, Tensor]]] = {
    "NaN": lambda name, tensor: (name, tensor * torch.nan),
    "shape": lambda name, tensor: (name, tensor[..., :-1]),
    "name": lambda name, tensor: (f"{name}.of_another_model", tensor),
}


@dataclass(frozen=True)
class Trainer:
    """One sync of one trainer."""

    policy: str
    door: str = "one"  # a tensor a call; few: buckets; all: one call; or a bracket of some kind
    order: str = "file"
    frozen: str = "nothing"
    head: str = "not sent"  # that is tied to the embeddings
    says_done: bool = False
    bad: tuple[tuple[int, str], ...] = ()  # places of tensors that are spoiled, and how
    when_refused: str = "goes on"
    dies_after: int | None = None  # tensors
    leaves_open: bool = False  # a bracket in which it dies


@dataclass(frozen=True)
class Writer:
    """Somebody who writes into one live parameter, past every door."""

    place: int
    counted: bool  # by torch, as copy_ is; a write through .data is not


BRACKETS = ("bracket", "whole", "part")
_NO = st.none()
_BAD = st.tuples(st.integers(0, 14), st.sampled_from(sorted(SPOILED)))
TRAINERS = st.builds(
    Trainer,
    policy=st.sampled_from(POLICIES),
    door=st.sampled_from(["one", "one", "one", "few", "all", *BRACKETS]),
    order=st.sampled_from(["modules", "file"]),
    frozen=st.sampled_from(["nothing", "nothing", "nothing", *FROZEN]),
    head=st.sampled_from(["not sent", "not sent", "equal", "equal", "another"]),
    says_done=st.booleans(),
    bad=st.one_of(*[st.just(())] * 4, st.lists(_BAD, min_size=1, max_size=2).map(tuple)),
    when_refused=st.sampled_from(["goes on", "sends it again", "gives up"]),
    dies_after=st.one_of(*[_NO] * 4, st.integers(0, 14)),
    leaves_open=st.booleans(),
)
WRITERS = st.builds(Writer, place=st.integers(0, 40), counted=st.booleans())
RESETS = ["vLLM resets"] if vllm_is(">=0.32") else []
OTHERS = st.one_of(WRITERS, WRITERS, st.sampled_from(["a step is asked for", *RESETS]))
STEPS = st.lists(st.one_of(*[TRAINERS] * 4, OTHERS), min_size=3, max_size=8)


class Engine:
    """A tiny engine, and what a fresh one holds of each policy, layer by layer."""

    def __init__(self, scheme: str, folder: Path) -> None:
        paths = {
            policy: tiny_models.make(
                "qwen3",
                number,
                folder / policy,
                tied=True,
                hidden=128,
                layers=1,
                intermediate=128,
            )
            for number, policy in enumerate(POLICIES)
        }
        self.pushed = {policy: tiny_models.tensors(path) for policy, path in paths.items()}
        self.live = serve(paths["a"], scheme)
        self.right: dict[str, dict[str, str]] = {}
        for policy in POLICIES:
            flashquant.reload_weights(self.live.llm, self.pushed[policy])
            self.right[policy] = dict(self.status.parameters)
        fresh = serve(paths["b"], scheme)
        assert dict(flashquant.status(fresh.llm).parameters) == self.right["b"]
        self.kept: tuple[str, ...] = ()  # parameters of which the last sync left a part
        self.seen: Counter[str] = Counter()

    @property
    def status(self) -> Status:
        return flashquant.status(self.live.llm)

    @cached_property
    def layers(self) -> dict[str, tuple[set[str], set[str]]]:
        """The things that kernels read of each layer, and the names that trainers send of it."""
        session = self.live.session
        return {
            layer.name: (
                {name for name, _ in layer.contents()},
                {
                    name
                    for name in self.pushed["a"]
                    if not set(layer.targets).isdisjoint(session.plan[name].targets)
                },
            )
            for layer in session._engine.layers
        }

    def start(self) -> None:
        """Policy A, whole, whatever earlier steps have left; and nothing that they have taught."""
        flashquant.reload_weights(self.live.llm, self.pushed["a"])
        now = self.status
        assert dict(now.parameters) == self.right["a"]
        said = (now.pending, now.dropped, now.refused, now.foreign, now.torn, now.quiet is None)
        assert said == ({}, {}, (), (), False, True)
        self.live.session.check_nothing_waits()

    def tensors(self, trainer: Trainer) -> list[tuple[str, Tensor]]:
        """What it wants to send, in its order."""
        weights = dict(self.pushed[trainer.policy])
        if trainer.head != "not sent":
            weights[HEAD] = weights[EMBEDDINGS] * (1 if trainer.head == "equal" else 2)
        left_out = FROZEN[trainer.frozen]
        names = [name for name in weights if not any(part in name for part in left_out)]
        names.sort(key=_place if trainer.order == "modules" else str)
        return [(name, weights[name]) for name in names]

    def run(self, trainer: Trainer) -> bool:
        """One sync; whether it came to its end, and nothing of it is refused still."""
        pairs, bad, self.kept = self.tensors(trainer), dict(trainer.bad), ()
        spoiled = [
            SPOILED[bad[place]](*pair) if place in bad else pair for place, pair in enumerate(pairs)
        ]
        if trainer.door in BRACKETS:
            return self._bracket(trainer, spoiled)
        size, whole = {"one": 1, "few": 4, "all": len(pairs)}[trainer.door], True
        for first in range(0, len(pairs), size):
            if trainer.dies_after is not None and first >= trainer.dies_after:
                return False
            if self._push(spoiled[first : first + size]):
                continue
            if trainer.when_refused == "gives up":
                return False
            again = trainer.when_refused == "sends it again"
            whole &= again and self._push(pairs[first : first + size])
        if trainer.says_done:
            try:
                self.live.session.check_nothing_waits()
            except ReloadError:
                return False
        return whole

    def _push(self, pairs: list[tuple[str, Tensor]]) -> bool:
        """One call; where it is refused, nothing has changed, and `status` says so."""
        before = self.status
        try:
            self.live.model.load_weights(pairs)
        except ReloadError:
            now, missed = self.status, {name for name, _ in pairs}
            if before.quiet is None:  # else the bracket that was open is rolled back, all of it
                assert now.digest == before.digest
            if self.live.session.transactions.current is None:
                assert missed <= set(now.refused)
                assert now.refusal is not None
                assert set(now.refusal.names) == missed
            return False
        return True

    def _bracket(self, trainer: Trainer, pairs: list[tuple[str, Tensor]]) -> bool:
        """All of it or nothing; or it is left open, and `status` says so."""

        def sent() -> Iterator[tuple[str, Tensor]]:
            for number, pair in enumerate(pairs):
                if number == trainer.dies_after:
                    raise TrainerDied
                yield pair

        session, own = self.live.session, trainer.door == "bracket"
        if self.status.quiet is not None:
            session.abandon()  # as it begins it would, but what is live then is to be known
        before = self.status.digest
        try:
            if own:
                session.begin()
                for pair in sent():
                    session.push([pair])
                session.finish()
            else:
                strict = trainer.door == "whole"
                report = flashquant.reload_weights(self.live.llm, sent(), strict=strict)
                self.kept = report.kept
        except (ReloadError, TrainerDied) as failure:
            if own and isinstance(failure, TrainerDied) and trainer.leaves_open:
                assert self.status.quiet is not None
                return False
            if own:
                session.abandon()
            assert self.status.digest == before
            return False
        return True

    def check(self, trainer: Trainer, before: Status) -> None:
        """After a whole sync: each layer that was sent is the policy's, or is named; the others
        are as they were."""
        status, right = self.status, self.right[trainer.policy]
        sent = {name for name, _ in self.tensors(trainer)}
        if HEAD in sent and not _waits(status, HEAD):
            assert trainer.head == "equal"
            assert status.parameters[EMBEDDINGS] == right[EMBEDDINGS] or _names(status, "lm_head")
        for layer, (things, names) in self.layers.items():
            wanted = before.parameters if names.isdisjoint(sent) else right
            same = all(status.parameters[thing] == wanted[thing] for thing in things)
            kept = any(name.rpartition(".")[0] == layer for name in self.kept)
            self.seen["right" if same else "kept" if kept else "named"] += 1
            assert same or kept or _names(status, layer) or before.quiet is not None, (
                f"{layer} is a mixture, and nobody says so: {status}"
            )

    def writes(self, writer: Writer) -> None:
        live = [p for p in self.live.model.parameters() if p.numel()]
        parameter, before = live[writer.place % len(live)], self.status
        (parameter if writer.counted else parameter.data).zero_()
        now = self.status
        changed = now.digest != before.digest
        assert not changed or now.foreign or now.quiet is not None

    def other(self, step: Writer | str) -> None:
        """What happens beside trainers."""
        if isinstance(step, Writer):
            self.writes(step)
        elif step == "vLLM resets":
            self.live.llm.collective_rpc("reset_weights")
            assert self.status.torn
        elif self.status.quiet is not None or self.status.torn:
            with suppress(TornWeights):  # it may be that nothing has come of the update
                self.live.session.check_servable()
        else:
            self.live.session.check_servable()


class TrainerDied(Exception):
    """Its process is gone."""


def _names(status: Status, layer: str) -> bool:
    """Whether a status says that something of a layer is not as it was sent."""
    of_all = status.torn or status.quiet is not None
    written = any(name.rpartition(".")[0] == layer for name in status.foreign)
    return of_all or written or layer in status.pending or layer in status.dropped


def _waits(status: Status, name: str) -> bool:
    """Whether a status says that something came under this name which is not live."""
    of_all = status.torn or status.quiet is not None
    return of_all or any(name in waiting for waiting in status.pending.values())


def _place(name: str) -> tuple[int, str]:
    """Where modules stand in the model."""
    parts = ("embed", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    parts += ("gate", "up", "down", "post", "model.norm", "lm_head")
    return next(place for place, part in enumerate(parts) if part in name), name
