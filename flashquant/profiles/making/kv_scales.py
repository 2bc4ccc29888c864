"""The scales of a KV cache, from what a model caches of some prompts.

    scale = 2 ** (j / 8) * 2 ** e        of the keys of a layer, and of its values

e4m3 reaches 448. The power e has the largest that was seen cached as 112 to 224: another text may
go twice as far. Within that octave, j is the one of eight at which rounding moves keys (or values)
least, in squares. Floats of three bits round some numbers far better than others, and what a layer
caches is not spread evenly: the large channels of keys have much the same values in every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from flashquant.errors import ProfileError
from flashquant.plan import unwrapped

_REACH: Final = 224.0  # half of what e4m3 holds
_MOST: Final = 125  # powers of two of a float32 that is normal
_STEPS: Final = 2.0 ** (torch.arange(8, dtype=torch.float64, device="cpu") / 8)
_E4M3: Final = torch.float8_e4m3fn
Prompt = Sequence[int] | Tensor


def kv_scales(model: nn.Module, prompts: Iterable[Prompt]) -> dict[str, tuple[float, float]]:
    """`flashquant.kv_scales`, which is where it is described."""
    seen: dict[str, tuple[_Side, _Side]] = {}
    _check_caches_keys(model)
    with _evaluated(model), _callers(model) as callers, torch.no_grad():
        for prompt in prompts:
            model(input_ids=_tokens(model, prompt), past_key_values=_cache(callers, seen))
    if not seen:
        raise ProfileError(
            "the model has cached no key: there was no prompt, or its layers do not take "
            "transformers' cache (past_key_values). Give it a handful of prompts."
        )
    return {
        name: (_scale(name, "keys", keys), _scale(name, "values", values))
        for name, (keys, values) in seen.items()
    }


@dataclass
class _Side:
    """What was cached of the keys, or of the values, of one layer.

    Attributes:
        peak: max |x|.
        moved: `[8]` float64, by how much rounding moves them under each scale of the octave; sums
            of squares.

    """

    peak: Tensor
    moved: Tensor

    @classmethod
    def of(cls, cached: Tensor) -> _Side:
        held = cached.float()
        peak = held.abs().amax()
        scales = _octave(peak)
        moved = [((held / s).to(_E4M3).float() * s - held).square().sum() for s in scales]
        return cls(peak, torch.stack(moved).double())

    def add(self, other: _Side) -> None:
        # NaN stays: torch.maximum hands it on.
        self.peak, self.moved = torch.maximum(self.peak, other.peak), self.moved + other.moved


def _octave(peak: Tensor) -> Tensor:
    """`[8]` scales under which the largest is cached as 112 to 224; of nothing, about 1."""
    steps = _STEPS.to(peak.device)
    power = (peak.double() / _REACH / steps).log2().ceil().nan_to_num(0.0, 0.0, 0.0)
    return (steps * power.clamp(-_MOST, _MOST).exp2()).float()


def _scale(name: str, side: str, seen: _Side) -> float:
    largest = float(seen.peak)
    if not torch.isfinite(seen.peak):
        raise ProfileError(
            f"the {side} of {name} reach {largest}, so no scale holds them. Are the weights sound, "
            "and do prompts hold tokens of this model?"
        )
    if largest == 0:
        return 1.0  # nothing to scale
    return float(_octave(seen.peak)[int(seen.moved.argmin())])


def _check_caches_keys(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "kv_lora_rank", None):
        raise ProfileError(
            f"{type(model).__name__} caches keys and values as one compressed vector in vLLM "
            "(MLA), which transformers does not compute alike. Leave its scales at 1.0."
        )


def _tokens(model: nn.Module, prompt: Prompt) -> Tensor:
    """`[1, length]`, where the model is."""
    device = next(model.parameters()).device
    tokens = torch.as_tensor(prompt, dtype=torch.int64, device=device).flatten()
    if not len(tokens):
        raise ProfileError("a prompt is empty; give token ids, at least one")
    return tokens.unsqueeze(0)


def _cache(callers: Sequence[str], seen: dict[str, tuple[_Side, _Side]]) -> Any:
    """A cache of transformers that looks at what comes, and keeps nothing of it."""
    try:
        from transformers import DynamicCache
    except ImportError as missing:
        raise ProfileError(f"transformers is needed to run the model: {missing}") from missing

    class Watching(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            keys, values = _Side.of(key_states), _Side.of(value_states)
            if callers[-1] in seen:
                for before, now in zip(seen[callers[-1]], (keys, values), strict=True):
                    before.add(now)
            else:
                seen[callers[-1]] = keys, values
            return key_states, value_states

    return Watching()


@contextmanager
def _callers(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, innermost last: who fills the cache."""
    running: list[str] = []

    def leaves(*_: object) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        enters = partial(_enters, running, unwrapped(name))
        handles += [module.register_forward_pre_hook(enters), module.register_forward_hook(leaves)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _enters(running: list[str], name: str, *_: object) -> None:
    running.append(name)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """No dropout, and no checkpointing, which would switch the cache off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
