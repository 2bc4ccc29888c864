"""What each layer costs when it is quantized, and which to keep in bf16 for a budget.

    cost of a layer   KL(bf16 || that layer alone quantized), nats a token, on the user's text
    what is kept      the layers that cost most for their size, as few weights as the budget allows

A layer is computed as its kernel does: codes and scales by the definition of the scheme, and
activations rounded as well where the kernel rounds them. Layers that read the same tensor (q, k
and v; gate and up) are one, as vLLM computes them as one and keeps them as one. Costs add up only
roughly, so what is kept is measured, all other layers quantized, and not summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from flashquant.config.schemes import SCHEMES
from flashquant.errors import ProfileError
from flashquant.profiles.making.discovery import linear_layers
from flashquant.profiles.profile import Profile
from flashquant.schemes import DEFINITIONS, fp8_channel, fp8_tensor, int8_channel

Rounding = Callable[[Tensor], Tensor]
Layers = tuple[str, ...]

_POSITIONS: Final = 256  # whose distributions are compared at a time


@dataclass(frozen=True)
class Cost:
    """Of layers that vLLM computes as one.

    Attributes:
        layers: modules of the checkpoint.
        weights: how many numbers they have.
        kl: nats a token, with these alone quantized.

    """

    layers: Layers
    weights: int
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        scheme: its name.
        costs: in the order of the model.
        whole: nats a token, with every layer quantized.
        kept: the layers to keep for the budget; none where it is met without.
        left: nats a token, with all others quantized.

    """

    scheme: str
    costs: tuple[Cost, ...]
    whole: float
    kept: tuple[Cost, ...]
    left: float

    @property
    def keep(self) -> list[str]:
        """As `keep` in an entry of a configuration has it."""
        return [name for cost in self.kept for name in cost.layers]

    @property
    def kept_part(self) -> float:
        """Which part of the weights of linear layers stays in bf16."""
        return sum(c.weights for c in self.kept) / sum(c.weights for c in self.costs)


def sensitivity(
    model: nn.Module,
    windows: Sequence[Tensor],
    scheme: str,
    budget: float,
    *,
    profile: Profile | None = None,
    known: Sensitivity | None = None,
    note_progress: Callable[[str, float], None] = lambda phase, done: None,
) -> Sensitivity:
    """Measure what each layer costs, and choose what to keep.

    Args:
        model: a decoder of transformers, in evaluation mode, ideally in float32. Its weights are
            not changed.
        windows: of tokens, `[1, length]` each.
        scheme: by its name.
        budget: the KL that may be left, nats a token.
        profile: by which int8 is smoothed.
        known: of the same for another budget: its costs are not measured again.
        note_progress: called with the phase, and which part of it is done.

    Raises:
        ProfileError: there is no text, the budget is not above 0, what the scheme computes is
            not known here (vLLM alone quantizes it), or the model stacks experts.

    """
    if not windows or not budget > 0:
        raise ProfileError(f"{len(windows)} windows of text and a budget of {budget:g}: give both")
    _check_unstacked(model)
    layers = linear_layers(model)
    rounder = _Rounder(scheme, layers, profile)
    units = _together(model, layers, windows[0])
    measured = _Measured(model, windows, rounder)
    if known is None:
        *each, whole = measured.of([*((u,) for u in units), units], "layer by layer", note_progress)
        costs = tuple(
            Cost(unit, sum(layers[name].weight.numel() for name in unit), kl)
            for unit, kl in zip(units, each, strict=True)
        )
    else:
        costs, whole = known.costs, known.whole
    if whole <= budget:
        return Sensitivity(scheme, costs, whole, (), whole)
    ranked = sorted(costs, key=lambda cost: cost.kl / cost.weights, reverse=True)

    def left(count: int) -> float:
        others = [cost.layers for cost in ranked[count:]]
        return measured.of([others], f"{count} of {len(units)} kept", note_progress)[0]

    count, kl = _fewest(left, len(ranked), budget)
    kept = set(ranked[:count])
    return Sensitivity(scheme, costs, whole, tuple(c for c in costs if c in kept), kl)


def _fewest(left: Callable[[int], float], most: int, budget: float) -> tuple[int, float]:
    """How many of the first have to be kept, and what is then left: by bisection."""
    low, high, kl = 0, most, 0.0  # with all of them kept, nothing differs
    while high - low > 1:
        middle = (low + high) // 2
        found = left(middle)
        if found <= budget:
            high, kl = middle, found
        else:
            low = middle
    return high, kl


def _together(
    model: nn.Module, layers: Mapping[str, nn.Linear], tokens: Tensor
) -> tuple[Layers, ...]:
    """Layers that read the same tensor, in the order of the model."""
    read: dict[tuple[int, ...], list[str]] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the address of one that was read

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            alive.append(x)
            read.setdefault((x.data_ptr(), *x.shape), []).append(name)

        return hook

    handles = [layers[name].register_forward_pre_hook(look(name)) for name in layers]
    try:
        with torch.no_grad():
            model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    together = [tuple(dict.fromkeys(names)) for names in read.values()]
    ran = {name for names in together for name in names}
    # Where this text did not come by, as at an expert of its own: each by itself.
    return (*together, *((name,) for name in layers if name not in ran))


def _check_unstacked(model: nn.Module) -> None:
    """Experts in one tensor are no linear layers: what they cost would be missing in every sum."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, module in model.named_modules():
        if not isinstance(module, convolutions) and any(
            parameter.dim() == 3 for parameter in module.parameters(recurse=False)
        ):
            raise ProfileError(
                f"{name} has its experts in one tensor, and only linear layers are measured here; "
                'choose for a mixture by hand, as with keep: ["*.experts"]'
            )


class _Measured:
    """KL to the model itself, window by window."""

    def __init__(self, model: nn.Module, windows: Sequence[Tensor], rounder: _Rounder) -> None:
        self._model, self._windows, self._rounder = model, windows, rounder

    @torch.no_grad()
    def of(
        self,
        cases: Sequence[Sequence[Layers]],
        phase: str,
        note_progress: Callable[[str, float], None],
    ) -> list[float]:
        """Nats a token, of each case: the units that are quantized in it."""
        sums = [0.0] * len(cases)
        steps, done = len(self._windows) * len(cases), 0
        for tokens in self._windows:
            wanted = self._logits(tokens)
            for index, units in enumerate(cases):
                with self._rounder.quantized([name for unit in units for name in unit]):
                    sums[index] += _divergence(wanted, self._logits(tokens))
                done += 1
                note_progress(phase, done / steps)
        count = sum(tokens.numel() for tokens in self._windows)
        return [total / count for total in sums]

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens).logits
        return logits.flatten(0, -2)


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """The sum of KL(wanted || found) over positions `[N, V]`, in float32, some at a time."""
    total = 0.0
    for p, q in zip(torch.split(wanted, _POSITIONS), torch.split(found, _POSITIONS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


class _Rounder:
    """Computes layers as the kernels of a scheme do."""

    def __init__(
        self, scheme: str, layers: Mapping[str, nn.Linear], profile: Profile | None
    ) -> None:
        if scheme not in _ROUND:
            raise ProfileError(
                f"what layers cost in {scheme} is not known here; it is for {', '.join(_ROUND)}"
            )
        if profile is not None and (scheme != "int8" or profile.scheme != "int8"):
            raise ProfileError(
                f"the profile is for {profile.scheme}, and what layers cost is measured with one "
                f"in int8 alone, not in {scheme}"
            )
        self._weights, self._inputs = _ROUND[scheme]
        self._layers, self._profile = layers, profile

    @contextmanager
    def quantized(self, names: Sequence[str]) -> Iterator[None]:
        """While it lasts, these layers are."""
        handles = [self._layers[name].register_forward_hook(self._hook(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Linear, inputs: tuple[Any, ...], _: Tensor) -> Tensor:
            x: Tensor = inputs[0]
            by = self._columns(name, x.device)
            rows = self._inputs((x.flatten(0, -2) / by).float())
            weight = self._weights((layer.weight.float() * by).to(torch.bfloat16))
            product = (rows @ weight.T).view(*x.shape[:-1], -1)
            return (product if layer.bias is None else product + layer.bias).to(x.dtype)

        return hook

    def _columns(self, name: str, device: torch.device) -> Tensor | float:
        """What the profile multiplies its columns by."""
        entry = None if self._profile is None else self._profile.entries.get(f"{name}.weight")
        if entry is None or entry.input_scale is None:
            return 1.0
        return entry.input_scale.to(device)


def _by(scheme: str) -> Rounding:
    """Weights `[N, K]` of bf16, as the codes of a scheme have them."""

    def rounded(weight: Tensor) -> Tensor:
        codes, scales = DEFINITIONS[scheme](weight)
        columns = weight.shape[1] // scales.shape[-1] if scales.dim() == 2 else 1
        return codes.float() * scales.float().repeat_interleave(columns, -1)

    return rounded


def _as_read(x: Tensor) -> Tensor:
    return x


def _tokens_in(quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Rounding:
    def rounded(x: Tensor) -> Tensor:
        codes, scales = quantize(x)
        return codes.float() * scales

    return rounded


_ROUND: Final[Mapping[str, tuple[Rounding, Rounding]]] = MappingProxyType(
    {
        "int8": (_by("int8"), _tokens_in(int8_channel)),
        "fp8_channel": (_by("fp8_channel"), _tokens_in(fp8_channel)),
        "fp8_tensor": (_by("fp8_tensor"), _tokens_in(fp8_channel)),
        "fp8_vllm": (_by("fp8_vllm"), _tokens_in(fp8_tensor)),
        **{name: (_by(name), _as_read) for name in DEFINITIONS if SCHEMES[name].group},
    }
)
"""What rounds weights and what rounds activations, by scheme: a token at a time, or all at once."""
