"""What a reload did, and how a model stands now.

Plain data without tensors: both travel from workers to the front end and into
logs. Times are seconds, sizes are bytes; `str()` prints ms and MB (10^6 bytes).

    reload 7: 290 tensors, 988.1 MB in, 494.6 MB out, 24 layers in 412.3 ms (...)
    fp8_vllm at version 7: 24 direct, 2 staged, 0 fallback, digest 3f2a90c1d4e8
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flashquant.schemes import digest

WhyInBf16 = Literal["keep", "tower", "router", "vllm"]
_IN_BF16: Mapping[WhyInBf16, str] = {
    "keep": "kept in bf16",
    "tower": "of towers in bf16",
    "router": "routers in bf16",
    "vllm": "left in bf16 by vLLM",
}

_NAMES_SHOWN = 3
_DIGEST_SHOWN = 12


@dataclass(frozen=True)
class Drift:
    """What an update did to the codes of one weight.

    Attributes:
        size: elements of the weight, unsharded.
        changed: the fraction of its codes that are others than before, by a sample of 1,024;
            None where there is nothing to compare with.
        clipped: the fraction that frozen scales of a profile have clipped; None without.
        peak: max |w| / (127 * scale), about 1 where frozen scales fit; None without.

    """

    size: int
    changed: float | None = None
    clipped: float | None = None
    peak: float | None = None


@dataclass(frozen=True)
class ReloadReport:
    """What one reload did to one model.

    Attributes:
        version: how many updates this model has committed, this one included.
        tensors: incoming tensors read.
        bytes_in: bytes of these tensors, as the trainer sent them.
        bytes_out: bytes written into live storage, of all workers.
        undo_bytes: memory that the undo log took, of all workers; 0 with `atomic=False`.
            Not counted: the packed weights of oneDNN handlers, of which the log keeps the old ones.
        seconds: wall time from the first tensor to the last check.
        phases: seconds spent in each phase, by its name.
        layers_committed: layers that now serve the new weights.
        ignored: names the engine's own loader drops, such as a tied `lm_head.weight`.
        pending: parameters that have not arrived, so their layers still serve old weights.
        kept: parameters of which a part arrived, and the rest stayed as it was (`strict=False`).
        digest: fingerprint of all live weights (hex), or None where it was not taken.
        ranks: the digest of each worker, by rank; they hold different shards.
        drift: of each weight that arrived as codes or was made into them here, by name; fp8
            that vLLM itself quantizes is not among them.
        undo_cache_bytes: of `undo_bytes`, what lay in the KV cache (`FLASHQUANT_UNDO=cache`), so
            that it took no memory of its own; the rest lay on the host.
        prepare_seconds: of `seconds`, those in which the engine could generate (`prepare`).
        pause_seconds: of `seconds`, those in which it could not.

    """

    version: int
    tensors: int
    bytes_in: int
    bytes_out: int
    undo_bytes: int
    seconds: float
    phases: Mapping[str, float]
    layers_committed: int
    ignored: tuple[str, ...]
    pending: tuple[str, ...]
    digest: str | None
    ranks: tuple[str | None, ...]
    drift: Mapping[str, Drift] = field(default_factory=dict)
    prepare_seconds: float = 0.0
    pause_seconds: float = 0.0
    kept: tuple[str, ...] = ()
    undo_cache_bytes: int = 0

    @property
    def changed(self) -> float | None:
        """The fraction of all codes that are others than before, by sample."""
        return _mean((drift.size, drift.changed) for drift in self.drift.values())

    @property
    def clipped(self) -> float | None:
        """The fraction of all weights that frozen scales of a profile have clipped."""
        return _mean((drift.size, drift.clipped) for drift in self.drift.values())

    @property
    def peak(self) -> float | None:
        """How far the furthest weight is out: max |w| / (127 * scale), under frozen scales."""
        return max((d.peak for d in self.drift.values() if d.peak is not None), default=None)

    @classmethod
    def of_workers(cls, reports: Sequence[ReloadReport]) -> ReloadReport:
        """One report of an update that every worker has committed, in order of rank.

        Every worker reads all incoming tensors and writes its own shard of them, or, in a pipeline,
        those of its own layers. The slowest one is what the trainer waited for.
        """
        slowest = max(reports, key=lambda report: report.seconds)
        ignored = [set(report.ignored) for report in reports]
        ranks = tuple(part for report in reports for part in report.ranks)
        return replace(
            reports[0],
            bytes_out=sum(report.bytes_out for report in reports),
            undo_bytes=sum(report.undo_bytes for report in reports),
            undo_cache_bytes=sum(report.undo_cache_bytes for report in reports),
            seconds=slowest.seconds,
            prepare_seconds=max(report.prepare_seconds for report in reports),
            pause_seconds=max(report.pause_seconds for report in reports),
            phases=slowest.phases,
            ignored=tuple(n for n in reports[0].ignored if all(n in each for each in ignored)),
            pending=tuple(dict.fromkeys(name for report in reports for name in report.pending)),
            kept=tuple(dict.fromkeys(name for report in reports for name in report.kept)),
            digest=_digest_of(ranks),
            ranks=ranks,
        )

    def with_digests(self, ranks: Sequence[str | None]) -> ReloadReport:
        """The same report, with the digest of each worker, by rank."""
        return replace(self, digest=_digest_of(tuple(ranks)), ranks=tuple(ranks))

    def __str__(self) -> str:
        """One line for a log."""
        phases = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in self.phases.items())
        parts = [
            f"reload {self.version}: {self.tensors} tensors",
            f"{_mb(self.bytes_in)} in",
            f"{_mb(self.bytes_out)} out",
            f"{self.layers_committed} layers in {_ms(self.seconds)}"
            + (f" ({phases})" if phases else ""),
        ]
        if self.prepare_seconds:
            parts.append(f"paused for {_ms(self.pause_seconds)} of it")
        if self.undo_bytes:
            kept = f", {_mb(lent)} of it in the KV cache" if (lent := self.undo_cache_bytes) else ""
            parts.append(f"undo log {_mb(self.undo_bytes)}{kept}")
        if self.changed is not None:
            parts.append(f"{self.changed:.1%} of codes changed")
        if self.clipped and self.peak is not None:
            parts.append(f"{self.clipped:.3%} clipped (up to {self.peak:.2f} times)")
        if self.ignored:
            parts.append(f"ignored {some_of(self.ignored)}")
        if self.pending:
            parts.append(f"waiting for {some_of(self.pending)}")
        if self.kept:
            parts.append(f"kept a part of {some_of(self.kept)}")
        if self.digest is not None:
            parts.append(f"digest {self.digest[:_DIGEST_SHOWN]}")
        return ", ".join(parts)


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
        return f"last refusal {when}: {self.what}"


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
        """One status of an engine, from those of its workers in order of rank."""
        if len(statuses) == 1:
            return statuses[0]
        ranks = tuple(part for status in statuses for part in status.ranks)
        refusals = [status.refusal for status in statuses if status.refusal is not None]
        quiet = [status.quiet for status in statuses if status.quiet is not None]
        by_layer: dict[str, Any] = {
            key: {name: said for status in statuses for name, said in getattr(status, key).items()}
            for key in ("pending", "dropped", "in_bf16", "overrides")
        }
        named: dict[str, Any] = {
            key: tuple(dict.fromkeys(name for status in statuses for name in getattr(status, key)))
            for key in ("refused", "foreign", "direct", "staged", "fallback")
        }
        return replace(
            statuses[0],
            **by_layer,
            **named,
            scheme=", ".join(dict.fromkeys(status.scheme for status in statuses)),
            torn=any(status.torn for status in statuses),
            asleep=any(status.asleep for status in statuses),
            refusal=max(refusals, key=lambda refusal: refusal.when, default=None),
            quiet=min(quiet, default=None),
            digest=_digest_of(ranks),
            ranks=ranks,
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
            parts.append(f"digest {self.digest[:_DIGEST_SHOWN]}")
        return ", ".join(parts)


def _digest_of(ranks: Sequence[str | None]) -> str | None:
    """One digest of a whole engine: that of its only worker, or one of all of theirs."""
    if len(ranks) == 1:
        return ranks[0]
    known = {str(rank): part for rank, part in enumerate(ranks) if part is not None}
    return digest(known) if len(known) == len(ranks) else None


def _mean(parts: Iterable[tuple[int, float | None]]) -> float | None:
    """Of what is known, weighted by size."""
    known = [(size, part) for size, part in parts if part is not None]
    total = sum(size for size, _ in known)
    return sum(size * part for size, part in known) / total if total else None


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def some_of(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = tuple(names)
    shown = ", ".join(every[:_NAMES_SHOWN])
    hidden = len(every) - _NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown
