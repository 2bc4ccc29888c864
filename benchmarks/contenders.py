"""Every way to bring a policy into an engine that `sync_latency` times, by the name of its row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.flashrl_method import Method, int8_rows
from flashquant.config.checks import Checks
from flashquant.config.schemes import ONLINE
from flashquant.profiles import Entry, Profile, save_profile
from tools.models import tiny_models

if TYPE_CHECKING:
    from flashquant.patches.diagnostics import Sync

FLASHRL = "FlashRL's method"
_BUCKET = 64 << 20  # bytes of a bucket
# vLLM's own name of a scheme, where it has an online load of it.


def config(path: Path, scheme: str) -> str:
    """What FLASHRL_CONFIG says: a scheme, or a file that names a profile."""
    if not scheme.startswith("int8 "):
        return scheme
    file = path.with_name(f"{path.name}-{scheme.split()[1]}.yaml")
    profile = path.with_name(f"{path.name}-profile.safetensors")
    if not profile.exists():
        save_profile(_profile(path), profile)
    file.write_text(f"configs:\n- fn: int8\n  profile: {profile}\n  scales: {scheme.split()[1]}\n")
    return str(file)


def _profile(path: Path) -> Profile:
    """One that smooths nothing, but is multiplied by: its factors are ones."""
    stored = tiny_models.tensors(models.quantized(path))
    entries = {
        name: Entry(
            torch.int8,
            torch.ones(codes.shape[1]),
            stored[f"{name}_scale"].flatten().reciprocal(),
            stored[f"{name}_scale"].flatten(),
        )
        for name, codes in stored.items()
        if codes.dtype == torch.int8
    }
    return Profile(entries, "benchmark")


def unpatched(path: Path, scheme: str, bf16: Any) -> dict[str, Sync]:
    """What can be done without flashquant, in the same scheme."""
    from flashquant.patches.diagnostics import bench

    if scheme == "bf16":
        return {f"{FLASHRL}, bf16": Method(bf16)}
    if scheme in ONLINE:
        llm = bench.start(path, None, quantization=ONLINE[scheme])
        name = ONLINE[scheme]
        return {f"{bench.NATIVE}, {name}": bench.native(llm), f"{FLASHRL}, {name}": Method(llm)}
    if scheme != "int8":  # through a profile: the same engine as without
        return {}
    sibling = models.quantized(path)
    try:
        llm = bench.start(sibling, None)
    except NotImplementedError:  # W8A8 experts without AMX: vLLM itself cannot serve them
        return {}
    codes = tiny_models.tensors(sibling)
    scales = {name: tensor for name, tensor in codes.items() if name.endswith("_scale")}
    return {
        f"{bench.NATIVE}, int8 <- int8": _always(bench.native(llm), codes),
        f"{FLASHRL}, int8": Method(llm, int8_rows(scales)),
    }


def _always(sync: Sync, codes: Mapping[str, Tensor]) -> Sync:
    """Whatever the policy: vLLM cannot quantize, so it is handed codes."""
    return lambda _: sync(codes)


def flashquants(llm: Any) -> dict[str, Sync]:
    """Every way of ours, into one engine."""
    from flashquant.patches.diagnostics import bench

    whole, torn = bench.whole(llm, atomic=True), bench.whole(llm, atomic=False)
    return {
        "flashquant": whole,
        "flashquant, no digest": without_digest(llm, whole),
        "flashquant, atomic=False": torn,
        "flashquant, atomic=False, no digest": without_digest(llm, torn),
        "flashquant, from an iterator": lambda weights: whole(iter(weights.items())),
        "flashquant, buckets of 64 MB": by_calls(llm, buckets),
        "flashquant, one tensor a call": by_calls(llm, lambda weights: [[p] for p in weights]),
    }


def without_digest(llm: Any, sync: Sync) -> Sync:
    """As with FLASHQUANT_DIGEST=0, which is read when an engine starts: this saves a second one."""
    proofs = session(llm).proofs
    kept = proofs.checks

    def undigested(weights: Mapping[str, Tensor]) -> object:
        proofs.checks = Checks(ledger=kept.ledger, digest=False)
        try:
            return sync(weights)
        finally:
            proofs.checks = kept

    return undigested


def by_calls(llm: Any, cut: Callable[[list[Any]], Any]) -> Sync:
    """`model.load_weights` as most trainers call it: without a beginning and an end."""
    model = llm.apply_model(lambda model: model)[0]

    def sync(weights: Mapping[str, Tensor]) -> None:
        for part in cut(list(weights.items())):
            model.load_weights(part)

    return sync


def buckets(weights: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours, up to 64 MB together."""
    rest = iter(weights)
    while first := list(islice(rest, 1)):
        bucket, size = first, first[0][1].nbytes
        for pair in rest:
            bucket.append(pair)
            size += pair[1].nbytes
            if size >= _BUCKET:
                break
        yield bucket


def session(llm: Any) -> Any:
    """Flashquant's, of an engine in this process."""
    from flashquant.patches.seams.loading import session_of

    return session_of(llm.apply_model(lambda model: model)[0])
