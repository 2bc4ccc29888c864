"""What vLLM marks as a tower while it creates a model is not quantized."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.models.interfaces import SupportsMultiModal

from flashquant.patches.decided import ADDITIONAL_CONFIG_KEY, STARTS_ON_FLOATS, TOWERS_KEY
from flashquant.patches.seams import towers

# vLLM's own, whether it is patched by now or not.
_ORIGINAL = contextmanager(inspect.unwrap(SupportsMultiModal._mark_tower_model))
QUANTIZED = "quantized"


def vllm_config(quant_config: Any = QUANTIZED, **decided: Any) -> Any:
    multimodal = SimpleNamespace(get_limit_per_prompt=lambda _modality: 1)
    return SimpleNamespace(
        additional_config={ADDITIONAL_CONFIG_KEY: {STARTS_ON_FLOATS: True, **decided}},
        quant_config=quant_config,
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
    )


class Model(nn.Module, SupportsMultiModal):  # type: ignore[misc]
    """Asks for the method of each layer that it creates, as vLLM's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.methods: dict[str, Any] = {}

    def layer(self, prefix: str) -> nn.Module:
        linear = LinearBase.__new__(LinearBase)
        self.methods[prefix] = towers._get_quant_method(lambda *_: QUANTIZED, None, linear, prefix)
        return nn.Identity()

    def mark(self, config: Any, **kwargs: Any) -> Any:
        return towers._mark_tower_model(_ORIGINAL, self, config, {"image", "video"}, **kwargs)

    @property
    def left(self) -> set[str]:
        """The layers that are not quantized."""
        kinds = {name: isinstance(m, UnquantizedLinearMethod) for name, m in self.methods.items()}
        return {name for name, is_left in kinds.items() if is_left}


class Eyes(nn.Module):
    def __init__(self, model: Model, prefix: str) -> None:
        super().__init__()
        self.blocks = model.layer(f"{prefix}.blocks.0")


@pytest.fixture
def model() -> Model:
    return Model()


def test_what_is_created_in_a_marked_block_is_left_and_nothing_else(model: Model) -> None:
    config = vllm_config()

    with towers.in_bf16(config) as found:
        with model.mark(config):
            model.seeing = Eyes(model, "whatever.it.is.called")
            model.behind = model.layer("projector")
        model.language = model.layer("language.layers.0.mlp")

    assert model.left == {"whatever.it.is.called.blocks.0", "projector"}
    assert found.names == ["seeing", "behind"]


def test_of_a_block_that_names_classes_only_what_these_create_is_left(model: Model) -> None:
    """As vLLM marks models that make everything at once (Idefics, GLM-4V)."""
    config, create = vllm_config(), Eyes.__init__

    with towers.in_bf16(config) as found, model.mark(config, targets=(Eyes,)):
        model.inner = nn.Module()
        model.inner.eyes = Eyes(model, "eyes")
        model.inner.text = model.layer("text.mlp")

    assert model.left == {"eyes.blocks.0"}
    assert found.names == ["inner.eyes"]
    assert Eyes.__init__ is create


def test_layers_that_replace_those_of_a_marked_tower_are_left(model: Model) -> None:
    """As vLLM serves transformers' own models."""
    config = vllm_config()

    with towers.in_bf16(config):
        with model.mark(config):
            model.eyes = nn.Sequential(nn.Linear(2, 2))
        model.layer("eyes.0")
        model.layer("eyesight.0")

    assert model.left == {"eyes.0"}


def test_a_model_that_cannot_be_created_leaves_nothing_behind(model: Model) -> None:
    config, create = vllm_config(), Eyes.__init__

    with pytest.raises(KeyError), towers.in_bf16(config), model.mark(config, targets=Eyes):
        raise KeyError

    model.layer("later")
    assert model.left == set()
    assert Eyes.__init__ is create


@pytest.mark.parametrize(
    "config",
    [
        vllm_config(**{TOWERS_KEY: True}),
        vllm_config(**{STARTS_ON_FLOATS: False}),  # a checkpoint of codes says itself what it left
        vllm_config(quant_config=None),
    ],
    ids=["asked for", "codes", "bf16"],
)
def test_otherwise_vllm_decides(model: Model, config: Any) -> None:
    with towers.in_bf16(config), model.mark(config):
        model.seeing = Eyes(model, "seeing")

    assert model.left == set()
