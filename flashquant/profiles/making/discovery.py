"""Where a model can be smoothed, found by running it and not by its names.

A norm feeds the linear layers whose input is its output, the very same memory. Whether rows of
one layer are what another one reads cannot be seen so (`down(act(gate(x)) * up(x))`): so
every layer of fitting width in the same block is tried. Nothing is believed: each kind of
site is divided by random powers of two, multiplied back, and kept only if the model still gives the
same logits. Kinds are sites whose names differ in numbers alone: one run proves all blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from flashquant.profiles.making.factors import Producer, Site

# Powers of two are exact in every float format, so sums come out the same but for their order.
_SAME: Final = 1e-3
_NUMBER: Final = re.compile(r"\.\d+(?=\.)")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that W8A8 stores as codes: all linear ones but the head, by name."""
    head = _head(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def find_sites(model: nn.Module, tokens: Tensor) -> list[Site]:
    """Where this model can be smoothed.

    Args:
        model: a decoder of transformers, in evaluation mode; its weights are changed while this
            runs, and put back.
        tokens: `[batch, length]`; some dozens are enough.

    """
    layers = linear_layers(model)
    parameters = dict(model.named_parameters())
    read = _norm_of_layers(model, layers, tokens)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits

        def holds(sites: Sequence[Site]) -> bool:
            with _smoothed(parameters, sites):
                found = model(input_ids=tokens).logits
            return bool((found - logits).abs().max() <= _SAME * logits.abs().max())

        sites = _proved(_after_norms(read, parameters), holds)
        sites += _proved(_after_layers(layers, read, parameters), holds)
    return sites


def _norm_of_layers(
    model: nn.Module, layers: Mapping[str, nn.Linear], tokens: Tensor
) -> dict[str, str]:
    """Which norm's output each layer reads, where it reads one as it is."""
    made: dict[tuple[int, int], tuple[str, Tensor]] = {}  # tensors are kept: memory is not reused
    read: dict[str, str] = {}

    def note_made(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                made[output.data_ptr(), output.numel()] = (name, output)

        return hook

    def note_read(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            found = made.get((inputs[0].data_ptr(), inputs[0].numel()))
            if found is not None:
                read[name] = found[0]

        return hook

    handles = [
        module.register_forward_hook(note_made(name))
        for name, module in model.named_modules()
        if _is_norm(module)
    ]
    handles += [
        module.register_forward_pre_hook(note_read(name)) for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return read


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not any(module.children())


def _after_norms(read: Mapping[str, str], parameters: Mapping[str, Tensor]) -> Iterator[list[Site]]:
    """Candidates: a norm and all that read it, multiplied by its weight, or by 1 + its weight."""
    fed: dict[str, list[str]] = defaultdict(list)
    for layer, norm in read.items():
        fed[norm].append(f"{layer}.weight")
    for norms in _by_kind(fed).values():
        yield from (
            [Site(_vectors(norm, offset, parameters), tuple(fed[norm])) for norm in norms]
            for offset in (0.0, 1.0)
        )


def _vectors(norm: str, offset: float, parameters: Mapping[str, Tensor]) -> tuple[Producer, ...]:
    weight = f"{norm}.weight"
    size = len(parameters[weight])
    bias = f"{norm}.bias"
    return (
        Producer(weight, 0, size, offset),
        *([Producer(bias, 0, size)] if bias in parameters else []),
    )


def _after_layers(
    layers: Mapping[str, nn.Linear], read: Mapping[str, str], parameters: Mapping[str, Tensor]
) -> Iterator[list[Site]]:
    """Candidates: rows of a layer, and one of the same block that reads as many channels."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        blocks[_block(name)].append(name)
    for names in blocks.values():
        consumers = [name for name in names if name not in read]
        if not consumers:
            continue
        for consumer in consumers:
            width = layers[consumer].in_features
            for maker in names:
                rows = layers[maker].out_features
                if maker != consumer and rows % width == 0:
                    for start in range(0, rows, width):
                        yield _same_everywhere(maker, consumer, start, width, layers, parameters)
        return  # the first block that has some stands for all of its kind


def _same_everywhere(
    maker: str,
    consumer: str,
    start: int,
    width: int,
    layers: Mapping[str, nn.Linear],
    parameters: Mapping[str, Tensor],
) -> list[Site]:
    """The site, and those of the same kind in every other block."""
    sites = []
    for name in layers:
        other = _renumbered(consumer, name) if kind_of(name) == kind_of(maker) else None
        if other in layers:
            made = [f"{name}.weight", f"{name}.bias"]
            producers = tuple(Producer(m, start, start + width) for m in made if m in parameters)
            sites.append(Site(producers, (f"{other}.weight",)))
    return sites


def _proved(candidates: Iterator[list[Site]], holds: Callable[[list[Site]], bool]) -> list[Site]:
    """Those that change nothing; each channel is divided for one reader only."""
    sites: list[Site] = []
    taken: set[str] = set()
    for kind in candidates:
        wanted = {name for site in kind for name in site.consumers}
        if taken.isdisjoint(wanted) and holds(kind):
            sites += kind
            taken |= wanted
    return sites


@contextmanager
def _smoothed(parameters: Mapping[str, Tensor], sites: Sequence[Site]) -> Iterator[None]:
    """Divide and multiply by powers of two, and put everything back."""
    names = {p.name for s in sites for p in s.producers} | {c for s in sites for c in s.consumers}
    before = {name: parameters[name].detach().clone() for name in names}
    dice = torch.Generator().manual_seed(0)
    try:
        for site in sites:
            by = 2.0 ** torch.randint(-2, 3, (site.channels,), generator=dice, device="cpu")
            for producer in site.producers:
                part = parameters[producer.name].data[producer.start : producer.stop]
                shape = (-1, *[1] * (part.dim() - 1))
                part.add_(producer.offset).div_(by.to(part).view(shape)).sub_(producer.offset)
            for consumer in site.consumers:
                parameters[consumer].data.mul_(by.to(parameters[consumer]))
        yield
    finally:
        for name, value in before.items():
            parameters[name].data.copy_(value)


def _by_kind(names: Mapping[str, object]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[kind_of(name)].append(name)
    return kinds


def kind_of(name: str) -> str:
    """The name with its numbers left out: what is the same in every block."""
    return _NUMBER.sub(".*", name)


def _block(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`; all of it where nothing is numbered."""
    first = _NUMBER.search(name)
    return name[: first.end()] if first else name


def _renumbered(name: str, like: str) -> str:
    """The name with the numbers of another one of its block."""
    numbers = iter(_NUMBER.findall(like))
    return _NUMBER.sub(lambda found: next(numbers, found[0]), name)


def _head(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = get() if get is not None else None
    return head
