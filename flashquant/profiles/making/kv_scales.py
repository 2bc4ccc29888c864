"""The scales of a KV cache, from what a model caches of some prompts.

    scale = 2 ** ceil(log2(max |x| / 224))        of the keys of a layer, and of its values

e4m3 reaches 448, so the largest that was seen is cached as 112 to 224: another text may go twice as
far. Powers of two, because division by one is exact: what is rounded is rounded once, and just as
it would be under 1.0. So a scale takes away what 1.0 loses at the ends of the range, and adds
nothing; and the sums of another device, of other ranks or of another kernel end at the same scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from flashquant.errors import ProfileError
from flashquant.plan import unwrapped

_REACH: Final = 224.0  # half of what e4m3 holds
_MOST: Final = 126  # powers of two of a float32 that is normal
Prompt = Sequence[int] | Tensor


def kv_scales(model: nn.Module, prompts: Iterable[Prompt]) -> dict[str, tuple[float, float]]:
    """`flashquant.kv_scales`, which is where it is described."""
    peaks: dict[str, tuple[Tensor, Tensor]] = {}
    _check_caches_keys(model)
    with _evaluated(model), _callers(model) as callers, torch.no_grad():
        for prompt in prompts:
            model(input_ids=_tokens(model, prompt), past_key_values=_cache(callers, peaks))
    if not peaks:
        raise ProfileError(
            "the model has cached no key: there was no prompt, or its layers do not take "
            "transformers' cache (past_key_values). Give it a handful of prompts."
        )
    return {
        name: (_scale(name, "keys", keys), _scale(name, "values", values))
        for name, (keys, values) in peaks.items()
    }


def _scale(name: str, side: str, peak: Tensor) -> float:
    largest = float(peak)
    if not torch.isfinite(peak):
        raise ProfileError(
            f"the {side} of {name} reach {largest}, so no scale holds them. Are the weights sound, "
            "and do prompts hold tokens of this model?"
        )
    if largest == 0:
        return 1.0  # nothing to scale
    power = torch.tensor(largest / _REACH, dtype=torch.float64).log2().ceil()
    return float(2.0 ** power.clamp(-_MOST, _MOST))


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


def _cache(callers: Sequence[str], peaks: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """A cache of transformers that looks at what comes, and keeps nothing of it."""
    try:
        from transformers import DynamicCache
    except ImportError as missing:
        raise ProfileError(f"transformers is needed to run the model: {missing}") from missing

    class Watching(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            name = callers[-1]
            found = [side.detach().abs().amax().float() for side in (keys, values)]
            before = peaks.get(name, found)
            # NaN stays: torch.maximum hands it on.
            key, value = map(torch.maximum, found, before)
            peaks[name] = key, value
            return keys, values

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
