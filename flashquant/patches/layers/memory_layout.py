"""Which memory of a checkpoint-format layer is the memory that its kernels read.

Found by watching one processing of a twin, not from the names of kernels:

    rows    processing hands on the very memory, perhaps as a view (`weight.t()`): rows
            may be written where the kernels read them
    codes   processing quantizes it, and leaves just the codes and scales that flashquant's
            quantizer makes of its rows: those may be written where the kernels read them
    packed  other bytes are made of it: a stage, and the kernel's own packing of a twin
    hidden  something made of it is kept where flashquant does not look (`kernel_state`
            finds no way to it), so that it would go stale: `probe` refuses the layer

Whatever the kind, a parameter may be passed through: its `copies` are it, and nothing more is
made of it.

Limits
1. What is launched past torch's dispatcher (a Triton kernel on raw pointers) is not seen.
   Bytes that it changes in a parameter are, and so is memory that only it can have filled;
   what it adds to memory that torch has filled is not, nor a single number that was computed
   elsewhere and came back as a tensor.
2. A parameter that no leaf shows any more, but something out of sight, is not told from one
   that is gone.
3. Processing of attentions is not watched: what they make of their children's weights is compared
   with what is live, leaf by leaf (`twins`), and nothing else that they keep is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashquant.patches.layers import kernel_state
from flashquant.patches.layers.provenance import Provenance
from flashquant.plan import storage_of
from flashquant.update import digests

Kind = Literal["rows", "codes", "packed", "hidden"]
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MemoryLayout:
    """What became of one parameter's memory.

    Attributes:
        leaves: what the kernels read of it, as paths in `kernel_state`: the views of its
            memory (`rows`), first the codes and then the scales (`codes`), or whatever was
            made of it.
        reason: why it is not `rows`.
        copies: the leaves that are the parameter, in whatever dtype, where processing only
            passes it through; none where anything else was done to it.
        stays: whether its module shows it under its name as before, in whatever dtype.

    """

    kind: Kind
    leaves: tuple[str, ...] = ()
    reason: str = ""
    copies: tuple[str, ...] = ()
    stays: bool = False


def memory_layouts(
    twin: nn.Module, own: Mapping[str, Tensor], quantize: Quantize | None = None
) -> dict[str, MemoryLayout]:
    """Process `twin`, and say of each of its parameters what became of its memory.

    Args:
        twin: a layer in checkpoint format; it is processed, and taken apart, by this call.
        own: its parameters by name, each in memory of its own, which this call may change.
            Their values count: where they are all zeros, a change in place may not show,
            nor whether two ways to quantize are the same.
        quantize: what would make codes and scales of a parameter of floats, `[N, K]`, or of
            each `[N, K]` where several are stacked.

    """
    held = {storage_of(leaf) for _, leaf in _tensor_leaves(twin)}
    before = digests(own.items())
    watcher = Provenance(own)
    with watcher:
        method: Any = twin.quant_method
        method.process_weights_after_loading(twin)
    made = _Made(twin, watcher, held)
    after = digests(own.items())
    changed = {name for name in own if after[name] != before[name]}
    found = {
        name: _layout(name, tensor, made, changed=name in changed) for name, tensor in own.items()
    }
    if quantize is not None:
        found |= _quantized(own, made, found, quantize)
    shown = digests(_shown(twin, own))
    kernel_state.take_apart(twin)
    return {
        name: replace(layout, copies=made.copies(name), stays=shown.get(name) == before[name])
        for name, layout in found.items()
    }


def _shown(twin: nn.Module, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What is left under the name of each parameter, in its dtype, if it is laid out alike."""
    for name, tensor in own.items():
        left = twin._parameters.get(name)
        if left is not None and (left.shape, left.stride()) == (tensor.shape, tensor.stride()):
            yield name, left.detach().to(tensor.dtype)


def _layout(name: str, own: Tensor, made: _Made, *, changed: bool) -> MemoryLayout:
    if name in made.hidden:
        return MemoryLayout("hidden", made.of(name), made.hidden[name])
    views = [path for path, leaf in made.leaves if storage_of(leaf) == storage_of(own)]
    others = [path for path in made.of(name) if path not in views]
    if name in made.watcher.written:
        reason = f"{made.watcher.written[name]} writes into it"
    elif changed:
        reason = "its bytes change during processing"
    elif name in made.watcher.read_out:
        reason = f"{made.watcher.read_out[name]} takes it out of torch's sight"
    elif others:
        reason = f"{', '.join(others)} is made of it"
    elif made.handles:
        # What made it may have read anything: such operations pass torch's dispatcher unseen.
        reason = f"{', '.join(made.handles)} keeps memory of its own"
    elif not views:
        reason = "nothing that the kernels read is made of it"
    elif not all(_covers(leaf, own) for path, leaf in made.leaves if path in views):
        reason = f"{', '.join(views)} shows other bytes of it, or as another dtype"
    else:
        return MemoryLayout("rows", tuple(views))
    return MemoryLayout("packed", made.of(name), reason)


def _quantized(
    own: Mapping[str, Tensor], made: _Made, found: Mapping[str, MemoryLayout], quantize: Quantize
) -> dict[str, MemoryLayout]:
    """The parameters that are packed as `quantize` would, and of which nothing else is made."""
    leaves, codes = dict(made.leaves), {}
    for name, tensor in own.items():
        read = found[name].leaves
        alone = len(read) == 2 and all(made.made_of(path) == {name} for path in read)
        if found[name].kind != "packed" or not _is_weight(tensor) or not alone:
            continue
        expected = _per_expert(quantize, tensor.detach())
        for order in (read, read[::-1]):
            if all(_holds(leaves[path], e) for path, e in zip(order, expected, strict=True)):
                codes[name] = MemoryLayout("codes", order, found[name].reason)
    return codes


def _is_weight(tensor: Tensor) -> bool:
    """Whether this is something to be quantized."""
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.dim() in (2, 3)


def _per_expert(quantize: Quantize, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, or of stacked ones `[experts, N, K]`, one after another."""
    each = weight if weight.dim() == 3 else weight[None]
    codes, scales = zip(*map(quantize, each), strict=True)
    return torch.stack(codes), torch.stack(scales)


class _Made:
    """What a processed twin holds, and of which parameters it was made."""

    def __init__(self, twin: nn.Module, watcher: Provenance, held: set[int]) -> None:
        self.watcher = watcher
        self.leaves = _tensor_leaves(twin)
        everything = kernel_state.leaves(twin).items()
        self.handles = [path for path, leaf in everything if not isinstance(leaf, Tensor)]
        self._from = {path: self._provenance(leaf, held) for path, leaf in self.leaves}
        in_sight = {storage_of(leaf) for _, leaf in self.leaves}
        self.hidden = watcher.kept_outside(in_sight)

    def of(self, name: str) -> tuple[str, ...]:
        """The leaves that are, or were made of, a parameter."""
        return tuple(path for path, made_of in self._from.items() if name in made_of)

    def made_of(self, path: str) -> frozenset[str]:
        """The parameters of which a leaf was made."""
        return self._from[path]

    def copies(self, name: str) -> tuple[str, ...]:
        """The leaves that are a parameter, in whatever dtype, if it is only passed through."""
        if name in self.watcher.used:
            return ()
        copy_of = self.watcher.copy_of
        return tuple(path for path, leaf in self.leaves if copy_of.get(storage_of(leaf)) == name)

    def _provenance(self, leaf: Tensor, held: set[int]) -> frozenset[str]:
        storage = storage_of(leaf)
        unknown = not self.watcher.saw(storage) and storage not in held
        if unknown or storage in self.watcher.blank:
            return self.watcher.everything  # filled by something that cannot be watched
        return self.watcher.of.get(storage, frozenset())


def _tensor_leaves(module: nn.Module) -> list[tuple[str, Tensor]]:
    leaves = kernel_state.leaves(module).items()
    return [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]


def _covers(leaf: Tensor, own: Tensor) -> bool:
    """Whether two tensors of one storage show the same bytes, in whatever order of dimensions."""
    return (
        leaf.dtype == own.dtype
        and leaf.storage_offset() == own.storage_offset()
        and leaf.numel() == own.numel()
        and is_dense(leaf)
        and is_dense(own)
    )


def _holds(leaf: Tensor, rows: Tensor) -> bool:
    """Whether the memory behind a leaf is, byte for byte, that of contiguous `rows`."""
    if leaf.dtype != rows.dtype or leaf.numel() != rows.numel() or not is_dense(leaf):
        return False
    memory = leaf.as_strided((leaf.numel(),), (1,))
    return torch.equal(memory.view(torch.uint8), rows.contiguous().flatten().view(torch.uint8))


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has no gaps and no overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
