"""A start that fails inside one layer says which, in which scheme, and what can be done.

vLLM's own words are those of a kernel ("invalid weight input features 108"). The traceback knows
more: somewhere in it a quantization is choosing a method for a layer, making its weights, or
processing them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from flashquant.errors import ConfigError, FlashquantError, UnsupportedEngine

# What vLLM calls of a quantization while a model starts.
_STEPS = frozenset({"get_quant_method", "create_weights", "process_weights_after_loading"})


@contextmanager
def naming_the_layer(
    scheme: str, model: nn.Module | None = None, *, keeps: bool = False
) -> Iterator[None]:
    """Raise what fails inside a layer as an UnsupportedEngine that names it; the rest as it is.

    Args:
        scheme: that the model is to be served in.
        model: if it has been made.
        keeps: whether modules stay in bf16 by the configuration; a part of a layer cannot.

    """
    try:
        yield
    except (FlashquantError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # whatever a kernel of vLLM's says
        found = _layer_in(failure.__traceback__, model)
        if found is None or scheme == "bf16":
            raise
        name, layer = found
        if keeps and isinstance(failure, ValueError) and (shards := _shards(failure, name)):
            raise ConfigError(
                f"keep leaves a part of {name} in bf16, and vLLM computes all of it as one layer "
                f"({failure}). Keep {', '.join(shards)}, or none of them."
            ) from failure
        raise UnsupportedEngine(
            f"{name or 'a layer'} ({type(layer).__name__}) cannot be served in {scheme} on this "
            f"machine: {type(failure).__name__}: {str(failure).strip(' .')}. Leave it in bf16 by "
            f"quantization_config={{'ignore': ['{_pattern(name, model)}']}}, an argument of the "
            "engine, or by `keep` in a file of FLASHRL_CONFIG; or serve the model in another "
            "scheme: docs/compatibility.md says which run where."
        ) from failure


def _layer_in(traceback: TracebackType | None, model: nn.Module | None) -> tuple[str, Any] | None:
    """The innermost layer that was being made, by name; None where none was."""
    names = {} if model is None else {id(m): name for name, m in model.named_modules()}
    found, prefix = None, ""
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        said = frame.f_locals.get("prefix")
        prefix = said if isinstance(said, str) and said else prefix
        if (layer := _worked_on(frame)) is not None:
            own = names.get(id(layer)) or getattr(layer, "prefix", "") or prefix
            found = str(own), layer
    return found


def _worked_on(frame: FrameType) -> nn.Module | None:
    """The layer that a step of vLLM's is about, if this is such a step."""
    if frame.f_code.co_name not in _STEPS:
        return None
    said = (frame.f_locals.get(name) for name in ("layer", "self"))  # an attention is itself one
    return next((one for one in said if isinstance(one, nn.Module)), None)


def _shards(failure: ValueError, name: str) -> list[str]:
    """What a layer is made of, if this is vLLM's refusal of a method for a fused one."""
    traceback = failure.__traceback__
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        if frame.f_code.co_name == "get_quant_method":
            fused = getattr(frame.f_locals.get("self"), "packed_modules_mapping", {})
            return list(fused.get(name.rpartition(".")[2], ()))
    return []


def _pattern(name: str, model: nn.Module | None) -> str:
    """What leaves layers like this one in bf16; a fused one is named by its shards."""
    last = next((part for part in reversed(name.split(".")) if not part.isdigit()), name)
    shards = getattr(model, "packed_modules_mapping", {}).get(last, [last])
    return f"re:.*({'|'.join(shards)}).*" if len(shards) > 1 else f"re:.*{shards[0]}.*"
