"""The towers of a multimodal model stay in bf16, unless the configuration asks for them, too.

A tower is what vLLM marks as one while it creates a model: what turns images, videos or sounds
into embeddings, in most models with the projector behind it. No name of a layer is known here.

initialize_model    listens for the marks, where a bf16 checkpoint is quantized
_mark_tower_model   whatever layer is created inside stays as it is
get_quant_method    what each layer asks while it is created

A checkpoint that is quantized already says itself what it leaves in bf16.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from flashquant.patches.channels import Ambient
from flashquant.patches.decided import keeps_towers
from flashquant.patches.point import PatchPoint

logger = logging.getLogger(__name__)

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]


class Towers:
    """What vLLM marks as towers of the model that it creates.

    Attributes:
        names: of their modules in the model.

    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._depth = 0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run a block in which a tower is created."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def hold(self, layer: str) -> bool:
        """Whether a layer that is created now belongs to one.

        By its name where a model is marked first and its layers are replaced afterwards, as those
        of transformers' own models are.
        """
        return self._depth > 0 or any(layer.startswith(f"{name}.") for name in self.names)

    def tell(self, model: nn.Module) -> None:
        """Say, once a model is created, what was left in bf16."""
        kept = {name: count for name in self.names if (count := _linear(model, name))}
        if kept:
            logger.info(
                "the towers of %s stay in bf16: %s. `quantize_towers: true` in an entry of the "
                "file that FLASHRL_CONFIG names quantizes them, too",
                type(model).__name__,
                ", ".join(f"{name} ({count} linear layers)" for name, count in kept.items()),
            )


_OF_MODEL = Ambient[Towers]("flashquant_towers")


@contextmanager
def in_bf16(vllm_config: Any) -> Iterator[Towers]:
    """Create a model whose towers are left as the checkpoint has them; yields which they are."""
    towers = Towers()
    listening = keeps_towers(vllm_config) and vllm_config.quant_config is not None
    with _OF_MODEL.given(towers) if listening else nullcontext():
        yield towers


@contextmanager
def _mark_tower_model(
    original: Any, model: Any, vllm_config: Any, modalities: Any, *, targets: Kinds | None = None
) -> Iterator[None]:
    towers = _OF_MODEL.get()
    with (
        original(model, vllm_config, modalities, targets=targets),
        _creating(towers, targets),
    ):
        yield
    if towers is not None:
        towers.names += model._tower_model_names


@contextmanager
def _creating(towers: Towers | None, targets: Kinds | None) -> Iterator[None]:
    """All that is created is of a tower; or, where classes are named, what is created by these."""
    with ExitStack() as stack:
        if towers is not None and targets is None:
            stack.enter_context(towers.inside())
        elif towers is not None and targets is not None:
            for kind in targets if isinstance(targets, tuple) else (targets,):
                stack.enter_context(_created_by(kind, towers))
        yield


@contextmanager
def _created_by(kind: Any, towers: Towers) -> Iterator[None]:
    own, create = vars(kind).get("__init__"), kind.__init__

    @functools.wraps(create)
    def noticed(self: Any, *args: Any, **kwargs: Any) -> None:
        with towers.inside():
            create(self, *args, **kwargs)

    kind.__init__ = noticed
    try:
        yield
    finally:
        if own is None:
            del kind.__init__
        else:
            kind.__init__ = own


def _get_quant_method(original: Any, config: Any, layer: nn.Module, prefix: str) -> Any:
    towers = _OF_MODEL.get()
    if towers is None or not towers.hold(prefix):
        return original(config, layer, prefix)
    # None: embeddings, experts and attentions choose their own.
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _linear(model: nn.Module, name: str) -> int:
    """How many linear layers of a module are not quantized."""
    methods = (getattr(m, "quant_method", None) for m in model.get_submodule(name).modules())
    return sum(isinstance(method, UnquantizedLinearMethod) for method in methods)


_QUANTIZATION = "vllm.model_executor.layers.quantization"

POINTS = (
    PatchPoint(
        "vllm.model_executor.models.interfaces:SupportsMultiModal._mark_tower_model",
        expects=("self", "vllm_config", "modalities", "targets"),
        wrapper=_mark_tower_model,
    ),
    # The two that flashquant lets vLLM quantize a bf16 checkpoint by.
    *(
        PatchPoint(
            f"{_QUANTIZATION}.{owner}.get_quant_method",
            expects=("self", "layer", "prefix"),
            wrapper=_get_quant_method,
        )
        for owner in (
            "online.base:OnlineQuantizationConfig",
            "compressed_tensors.compressed_tensors:CompressedTensorsConfig",
        )
    ),
)
