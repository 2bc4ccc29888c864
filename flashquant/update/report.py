"""What an update did.

Plain data without tensors, which travels from workers to the front end. Times are seconds, sizes
are bytes; `str()` is one line, in ms and MB (10^6 bytes).

    reload 7: 290 tensors, 988.1 MB in, 494.6 MB out, 24 layers in 412.3 ms (...)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flashquant.update.ranks import digest_of_ranks, merged, union
from flashquant.update.wording import shortened, some_of


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
        layers: those that now serve the new weights.
        ignored: names the engine's own loader drops, such as a tied `lm_head.weight`.
        pending: parameters that have not arrived, so their layers still serve old weights.
        kept: parameters of which a part arrived, and the rest stayed as it was (`strict=False`).
        digest: fingerprint of all live weights (hex), or None where it was not taken.
        ranks: the digest of each worker, by rank; they hold different shards.
        drift: of each weight that arrived as codes or was made into them here, by name; fp8
            that vLLM itself quantizes is not among them.
        undo_cache_bytes: of `undo_bytes`, what lay in the KV cache (`FLASHQUANT_UNDO`), so that
            it took no memory of its own; the rest lay on the host.
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
    layers: tuple[str, ...]
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
        those of its own layers. The slowest one is what the trainer waited for. Of what several
        of them say of one weight, the first one's word is taken.
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
            layers=union(report.layers for report in reports),
            ignored=tuple(n for n in reports[0].ignored if all(n in each for each in ignored)),
            pending=union(report.pending for report in reports),
            kept=union(report.kept for report in reports),
            drift=merged(report.drift for report in reports),
            digest=digest_of_ranks(ranks),
            ranks=ranks,
        )

    def with_digests(self, ranks: Sequence[str | None]) -> ReloadReport:
        """The same report, with the digest of each worker, by rank."""
        return replace(self, digest=digest_of_ranks(tuple(ranks)), ranks=tuple(ranks))

    def __str__(self) -> str:
        """One line for a log."""
        phases = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in self.phases.items())
        parts = [
            f"reload {self.version}: {self.tensors} tensors",
            f"{_mb(self.bytes_in)} in",
            f"{_mb(self.bytes_out)} out",
            f"{len(self.layers)} layers in {_ms(self.seconds)}"
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
            parts.append(f"digest {shortened(self.digest)}")
        return ", ".join(parts)


def _mean(parts: Iterable[tuple[int, float | None]]) -> float | None:
    """Of what is known, weighted by size."""
    known = [(size, part) for size, part in parts if part is not None]
    total = sum(size for size, _ in known)
    return sum(size * part for size, part in known) / total if total else None


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
