"""A kernel's words get the layer's name, the scheme, and what helps; all other failures stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashquant.errors import MisfitTensor, UnsupportedEngine
from flashquant.patches.seams.blame import naming_the_layer


class Method:
    """Of a quantization; it fails in the middle of a layer."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._pack()

    def create_weights(self, layer: nn.Module) -> None:
        self._pack()

    def _pack(self) -> None:
        raise self.failure


class Model(nn.Module):
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"gate_up_proj": nn.Linear(2, 2)})])


def processing(failure: Exception, scheme: str = "fp8_vllm") -> None:
    model = Model()
    with naming_the_layer(scheme, model):
        Method(failure).process_weights_after_loading(model.layers[0]["gate_up_proj"])


def test_a_layer_that_fails_while_it_is_processed_is_named():
    with pytest.raises(UnsupportedEngine) as refused:
        processing(RuntimeError("invalid weight input features 108"))

    said = str(refused.value)
    assert said.startswith("layers.0.gate_up_proj (Linear) cannot be served in fp8_vllm")
    assert "RuntimeError: invalid weight input features 108" in said
    assert "{'ignore': ['re:.*(gate_proj|up_proj).*']}" in said
    assert isinstance(refused.value.__cause__, RuntimeError)


def test_a_layer_that_fails_while_it_is_made_is_named_by_its_prefix():
    """There is no model yet that it could be found in."""

    def make(prefix: str) -> None:
        Method(ValueError("no kernel")).create_weights(nn.Linear(2, 2))

    with pytest.raises(UnsupportedEngine, match=r"^model\.layers\.3\.mlp \(Linear\).*no kernel"):  # noqa: SIM117
        with naming_the_layer("int8"):
            make("model.layers.3.mlp")


def test_what_fails_outside_of_a_layer_is_not_blamed_on_one():
    with pytest.raises(FileNotFoundError), naming_the_layer("int8", Model()):
        raise FileNotFoundError("config.json")


@pytest.mark.parametrize(
    "failure", [MisfitTensor("ours"), torch.OutOfMemoryError("full"), MemoryError()], ids=repr
)
def test_what_says_enough_by_itself_stays_as_it_is(failure):
    with pytest.raises(type(failure)) as raised:
        processing(failure)

    assert raised.value is failure


def test_an_engine_in_bf16_fails_in_vllms_words():
    with pytest.raises(RuntimeError, match=r"^odd$"):
        processing(RuntimeError("odd"), "bf16")
