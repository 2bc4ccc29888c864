"""Names that trainers send with the marks of their wrappers, and without them.

    _orig_mod.model.norm.weight                                    torch.compile
    module.model.norm.weight                                       DDP, DeepSpeed
    model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight         FSDP1
    model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight   activation checkpointing
    base_model.model.model.layers.0.mlp.up_proj.base_layer.weight  PEFT, merged

A mark is taken off only where the engine's checkpoint has the rest and not the name as it came.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Final, Protocol

from torch import Tensor

from flashquant.plan.weights import NamedTensors

logger = logging.getLogger(__name__)

_PREFIXES: Final = ("base_model.model.", "module.")
_ANYWHERE: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
_LORA: Final = frozenset(
    ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
)


class _Known(Protocol):
    def knows(self, name: str, tensor: Tensor) -> bool:
        """Whether the engine has this weight under this name."""
        ...


def unwrapped(name: str) -> str:
    """The name without the marks of well-known wrappers; the same where there are none."""
    bare, before = name, ""
    while bare != before:
        before = bare
        bare = ".".join(part for part in bare.split(".") if part not in _ANYWHERE)
        for prefix in _PREFIXES:
            bare = bare.removeprefix(prefix)
    return bare


def hint(name: str, known: Collection[str]) -> str:
    """What to do about a name that the engine does not know; nothing if nothing comes to mind."""
    if not _LORA.isdisjoint(name.split(".")):
        return (
            " It is a factor of a LoRA adapter: merge the adapter into its weights (PEFT: "
            "merge_adapter()) and send those, or give the adapter to vLLM."
        )
    bare = unwrapped(name)
    near = difflib.get_close_matches(bare, known, n=1)
    wrapped = "" if bare == name else f" Without its wrappers it is {bare!r}, unknown as well."
    return wrapped + (f" Did you mean {near[0]!r}?" if near else "")


class Names:
    """The engine's own name of each tensor that is pushed.

    Args:
        known: tells the names that the engine has.

    """

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._own: dict[str, str] = {}
        self._said = False

    def of(self, weights: NamedTensors) -> NamedTensors:
        """The same tensors; a list of them stays one."""
        if isinstance(weights, list | tuple):
            return list(self._stream(weights))
        return self._stream(weights)

    def _stream(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield self._own.get(name) or self._find(name, tensor), tensor

    def _find(self, name: str, tensor: Tensor) -> str:
        bare = unwrapped(name)
        if not isinstance(tensor, Tensor):
            return name  # whoever looks at it next will say so
        if bare == name or self._known.knows(name, tensor):
            self._own[name] = name
        elif self._known.knows(bare, tensor):
            self._own[name] = bare
            self._say(name, bare)
        return self._own.get(name, name)

    def _say(self, name: str, bare: str) -> None:
        if not self._said:
            logger.info(
                "the trainer's names carry the marks of wrappers, which are taken off: %s is %s, "
                "and so on",
                name,
                bare,
            )
        self._said = True
