"""How much memory a reload needs beside the live weights: measured, not reasoned.

    python -m benchmarks.memory [--model smollm2 qwen2.5-0.5b] [--scheme int8 ...]
                                [--out benchmarks/out]

Two independent measurements of one reload, taken of two reloads after a warm one:

    tensors     a dispatch mode sees every tensor that torch makes, and when its storage is
                freed: exact, to the byte, but blind to what kernels allocate inside (oneDNN)
                and to what is reserved for undo logs
    resident    VmHWM, the high-water mark that the kernel keeps, reset just before: blind to
                nothing, but in whole pages (malloc is told to give freed blocks back at once)

Each engine has a process of its own: what another one left would be taken for its own. The
trainer's tensors exist before the reload, so they do not count; what an undo log reserves for the
next one is given back before, so that it does. The limit is the largest single
layer as it arrives, and, with an undo log, everything that is overwritten.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import contenders, environment, models
from benchmarks.results import (
    described,
    earlier,
    machine,
    markdown,
    save_json,
    save_plot,
    save_text,
)

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")


@dataclass(frozen=True)
class Peak:
    """One kind of reload of one model; bytes.

    Attributes:
        tensors: most bytes of storages that existed at once and did not exist before.
        resident: how far resident memory rose above what it was before.
        undo: what the undo log says that it took; memory inside of handlers is not in it.
        layer: of the largest layer: its incoming tensors, as the trainer sends them.
        live: all that a reload overwrites, which is what an undo log has to keep.

    """

    model: str
    scheme: str
    atomic: bool
    tensors: int
    resident: int
    undo: int
    layer: int
    largest: str
    live: int

    @property
    def limit(self) -> int:
        return self.layer + (self.live if self.atomic else 0)

    @property
    def of_limit(self) -> float:
        return max(self.tensors, self.resident) / self.limit


class Allocations(TorchDispatchMode):
    """The bytes of all storages made since it was entered, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._at_peak: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_real(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_real(leaf) and _storage(leaf) not in known | self._sizes.keys():
                self._watch(leaf)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta and leaf.layout == torch.strided


def peaks(model: str, scheme: str) -> list[Peak]:
    """Both kinds of reload of one engine, each measured both ways; in a process of its own."""
    environment.prepare()
    give_back_at_once()
    import flashquant
    from flashquant.patches.diagnostics import bench

    flashquant.patch()
    path = models.checkpoint(model)
    llm = bench.start(path, scheme)
    old, new = models.both_policies(path)
    flashquant.reload_weights(llm, old)  # learns the plan
    largest, layer = largest_layer(llm, new)
    live = live_bytes(llm)
    found = []
    for atomic in (True, False):
        flashquant.reload_weights(llm, new, atomic=atomic)
        with Allocations() as allocations:
            flashquant.reload_weights(llm, old, atomic=atomic)
        contenders.session(llm).transactions.free()
        before = reset_high_water_mark()
        report = flashquant.reload_weights(llm, new, atomic=atomic)
        resident = high_water_mark() - before
        found.append(
            Peak(
                model=model,
                scheme=scheme,
                atomic=atomic,
                tensors=allocations.peak,
                resident=resident,
                undo=report.undo_bytes,
                layer=layer,
                largest=largest,
                live=live,
            )
        )
    return found


def largest_layer(llm: Any, weights: models.Weights) -> tuple[str, int]:
    """The layer whose incoming tensors have the most bytes, by the engine's own write plan."""
    plan = contenders.session(llm).plan
    incoming: dict[str, int] = {}
    for name, tensor in weights.items():
        targets = plan[name].targets if name in plan else ()
        for layer in {target.rpartition(".")[0] for target in targets}:
            incoming[layer] = incoming.get(layer, 0) + tensor.nbytes
    name = max(incoming, key=lambda layer: incoming[layer])
    return name, incoming[name]


def live_bytes(llm: Any) -> int:
    """Of all that a whole reload overwrites: parameters, packed copies, the memory of handlers."""
    from flashquant.patches.layers import kernel_state

    model = llm.apply_model(lambda model: model)[0]
    storages: dict[int, int] = {}
    handlers: dict[int, int] = {}  # of which tied modules hold one
    for module in model.modules():
        if hasattr(module, "kv_cache"):
            continue
        for path, leaf in kernel_state.leaves(module).items():
            if kernel_state.is_handle(leaf):
                size = leaf.k * leaf.n * (2 if path.startswith("cpu_linear") else 1)
                handlers[id(leaf)] = size
            elif path not in module._buffers:
                storages[_storage(leaf)] = leaf.untyped_storage().nbytes()
    return sum(storages.values()) + sum(handlers.values())


def give_back_at_once() -> None:
    """Let malloc map each block of 128 kB or more by itself, and unmap it when it is freed.

    Otherwise resident memory would tell what the allocator holds back, not what is in use.
    """
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def reset_high_water_mark() -> int:
    """Give unused memory back, let the kernel count anew, and say what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def high_water_mark() -> int:
    """The most bytes that were resident since it was reset."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status says nothing of {key}")


def table(found: list[Peak]) -> str:
    """One row a reload."""
    rows = [
        (
            f"{peak.model}, {peak.scheme}{'' if peak.atomic else ', atomic=False'}",
            _mb(peak.tensors),
            _mb(peak.resident),
            _mb(peak.undo),
            _mb(peak.live) if peak.atomic else "",
            f"{_mb(peak.layer)} ({peak.largest})",
            f"{peak.of_limit:.2f}",
        )
        for peak in found
    ]
    titles = (
        "reload",
        "tensors",
        "resident",
        "undo log says",
        "overwritten",
        "largest layer",
        "of the limit",
    )
    return markdown(titles, rows)


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def plot(found: list[Peak], path: Path) -> None:
    """Bars of both measurements, and the limit that they may not pass."""
    with save_plot(path, figsize=(8.5, 0.45 * len(found) + 1.2)) as axes:
        for row, peak in enumerate(found):
            axes.barh(row - 0.2, peak.tensors / 1e6, 0.36, color="#4477aa")
            axes.barh(row + 0.2, peak.resident / 1e6, 0.36, color="#8fb3d9")
            axes.plot([peak.limit / 1e6] * 2, [row - 0.45, row + 0.45], color="#c0392b")
        kinds = [f"{p.model}, {p.scheme}{'' if p.atomic else ', no undo log'}" for p in found]
        axes.set_yticks(range(len(found)), kinds, fontsize=8)
        axes.invert_yaxis()
        handles = [*axes.containers[:2], axes.lines[0]]
        names = ["tensors", "resident memory", "limit: largest layer (+ undo)"]
        axes.legend(handles, names, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_xlabel("peak memory beside the live weights, MB")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="how much memory a reload needs"
    )
    parser.add_argument("--model", nargs="+", default=["smollm2", "qwen2.5-0.5b"])
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    arguments = parser.parse_args(argv)
    file = arguments.out / "memory.json"
    anew = {(model, scheme) for model in arguments.model for scheme in arguments.scheme}
    known = [Peak(**peak) for peak in earlier(file)]
    found = [peak for peak in known if (peak.model, peak.scheme) not in anew]
    for model in arguments.model:
        models.checkpoint(model)
        for scheme in arguments.scheme:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                found += process.submit(peaks, model, scheme).result()
            print(table(found[-2:]), flush=True)
    facts = machine()
    text = f"{described(facts)}\n\n{table(found)}"
    print(f"\n{text}")
    save_text(text, arguments.out / "memory.md")
    save_json(found, facts, file)
    plot(found, arguments.out / "memory.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
