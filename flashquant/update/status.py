"""How a model stands between two updates, and what it refused last.

Plain data without tensors, which travels from workers to the front end; `str()` is one line.

    fp8_vllm at version 7: 24 direct, 2 staged, 0 fallback, digest 3f2a90c1d4e8
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flashquant.update.ranks import digest_of_ranks, merged, union
from flashquant.update.wording import shortened, some_of

WhyInBf16 = Literal["keep", "tower", "router", "vllm"]
_IN_BF16: Mapping[WhyInBf16, str] = {
    "keep": "kept in bf16",
    "tower": "of towers in bf16",
    "router": "routers in bf16",
    "vllm": "left in bf16 by vLLM",
}


@dataclass(frozen=True)
class Refusal:
    """The last push, or end of an update, that was refused.

    Attributes:
        what: the error and what it said.
        when: seconds since 1970.
        names: the tensors of the push, those that were at hand; none for the end of an update.
        version: the one that was served then, and still is if nothing has gone live since.

    """

    what: str
    when: float
    names: tuple[str, ...]
    version: int

    def __str__(self) -> str:
        """A part of one line for a log."""
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(self.when))
        return f"last refusal {when}: {self.what.removesuffix('.')}"


@dataclass(frozen=True)
class Status:
    """How one model stands between two reloads.

    Attributes:
        scheme: canonical name of the scheme of its layers, but for `overrides`; of several, where
            data-parallel replicas serve different ones.
        version: how many updates it has committed; 0 is the checkpoint it started on.
        torn: its live weights are a mixture and it refuses to serve.
        asleep: the engine has put its weights away; no push is taken until it wakes up.
        pending: layer -> parameters that must still arrive before it can commit.
        digest: fingerprint of all live weights (hex); None while they are asleep.
        ranks: the digest of each worker, by rank; they hold different shards.
        parameters: the fingerprint of each thing the kernels read, by name; with several
            workers, by `rank 1: name`.
        foreign: live parameters that were modified outside flashquant since their layer was last
            updated; one complete update puts them right.
        direct: layers that are written without the engine's own processing: row by row where the
            kernels read them, each parameter quantized into that place when all of it has
            come, or copied there.
        staged: layers gathered beside the live memory in checkpoint format, processed there on a
            twin by the engine's own code, then carried over.
        fallback: layers, of either kind, of which a tensor is placed by the engine's own loader
            at every push, because it does more than copy.
        drafts: speculative drafts beside the model, and how many updates each has committed: they
            take pushes of their own.
        dropped: layer -> parameters that were not complete when the sync ended that brought a
            part of it; that part was dropped, and the layer serves its old weights until all
            of it has come.
        refused: tensors of pushes outside a bracket that failed, and have not come again: the
            engine serves what it had of them, beside the new weights of others.
        refusal: the last push, or end of an update, that was refused; None if none ever was.
        in_bf16: the linear layers and experts that stay in bf16 in an engine of codes, by their
            names in the checkpoint, and why: `keep` (the configuration keeps them), `tower` (of a
            multimodal model), `router` (of a mixture), or `vllm` (it leaves them by itself).
        overrides: those that are stored in another scheme, and in which.
        quiet: of an update that was begun and is not finished, the seconds since anything came of
            it; None where none is open. Until it is over, `digest` and `parameters` are of what
            it has written so far.

    """

    scheme: str
    version: int
    torn: bool
    asleep: bool
    pending: Mapping[str, tuple[str, ...]]
    digest: str | None
    ranks: tuple[str | None, ...]
    parameters: Mapping[str, str]
    foreign: tuple[str, ...]
    direct: tuple[str, ...]
    staged: tuple[str, ...]
    fallback: tuple[str, ...]
    drafts: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    refusal: Refusal | None = None
    in_bf16: Mapping[str, WhyInBf16] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    quiet: float | None = None

    @classmethod
    def of_workers(cls, statuses: Sequence[Status]) -> Status:
        """One status of an engine, from those of its workers in order of rank.

        They hold shards of the same layers, or, in a pipeline, layers of their own.
        """
        if len(statuses) == 1:
            return statuses[0]
        ranks = tuple(part for status in statuses for part in status.ranks)
        refusals = [status.refusal for status in statuses if status.refusal is not None]
        quiet = [status.quiet for status in statuses if status.quiet is not None]
        return replace(
            statuses[0],
            scheme=", ".join(dict.fromkeys(status.scheme for status in statuses)),
            torn=any(status.torn for status in statuses),
            asleep=any(status.asleep for status in statuses),
            pending=merged(status.pending for status in statuses),
            dropped=merged(status.dropped for status in statuses),
            refused=union(status.refused for status in statuses),
            refusal=max(refusals, key=lambda refusal: refusal.when, default=None),
            quiet=min(quiet, default=None),
            digest=digest_of_ranks(ranks),
            ranks=ranks,
            foreign=union(status.foreign for status in statuses),
            direct=union(status.direct for status in statuses),
            staged=union(status.staged for status in statuses),
            fallback=union(status.fallback for status in statuses),
            drafts=merged(status.drafts for status in statuses),
            in_bf16=merged(status.in_bf16 for status in statuses),
            overrides=merged(status.overrides for status in statuses),
            parameters={
                f"rank {rank}: {name}": part
                for rank, status in enumerate(statuses)
                for name, part in status.parameters.items()
            },
        )

    def __str__(self) -> str:
        """One line for a log."""
        fallback = f"{len(self.fallback)} fallback"
        if self.fallback:
            fallback += f" ({some_of(self.fallback)})"
        parts = [
            f"{self.scheme} at version {self.version}: {len(self.direct)} direct",
            f"{len(self.staged)} staged",
            fallback,
        ]
        for why, said in _IN_BF16.items():
            if names := [name for name, because in self.in_bf16.items() if because == why]:
                parts.append(f"{len(names)} {said} ({some_of(names)})")
        for scheme in dict.fromkeys(self.overrides.values()):
            names = [name for name, held in self.overrides.items() if held == scheme]
            parts.append(f"{len(names)} in {scheme} ({some_of(names)})")
        if self.torn:
            parts.append("TORN, refuses to serve until a complete reload")
        if self.foreign:
            parts.append(f"MODIFIED OUTSIDE FLASHQUANT: {some_of(self.foreign)}")
        if self.asleep:
            parts.append("asleep")
        if self.quiet is not None:
            parts.append(f"an update is open, nothing has come of it for {self.quiet:.0f} s")
        parts += [f"{layer} waits for {some_of(names)}" for layer, names in self.pending.items()]
        parts += [f"draft {name} at version {version}" for name, version in self.drafts.items()]
        if self.dropped:
            parts.append(f"had arrived in part and was dropped: {some_of(self.dropped)}")
        if self.refused:
            parts.append(f"refused and not sent again: {some_of(self.refused)}")
        if self.refusal is not None and self.refusal.version == self.version:
            parts.append(str(self.refusal))
        if self.digest is not None:
            parts.append(f"digest {shortened(self.digest)}")
        return ", ".join(parts)
