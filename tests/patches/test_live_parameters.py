"""Which live tensors still are the parameters that were loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashquant.errors import ReloadError
from flashquant.patches.layers.live_parameters import LiveParameters
from flashquant.update import digests
from tests.support.modules import Process, created, pack, parameter, process

WEIGHT, BIAS = torch.rand(4, 8), torch.rand(4).bfloat16()


def found(by: Process) -> tuple[LiveParameters, Any]:
    blueprint = created(by, weight=WEIGHT.clone(), bias=BIAS.clone())
    loaded = digests(blueprint.loaded())
    return LiveParameters([process(blueprint)], blueprint.forms, loaded), blueprint.module


def test_what_processing_leaves_alone_is_written_where_it_is() -> None:
    parameters, module = found(pack)

    assert parameters.kept == {"layer.bias"}
    assert parameters.in_place("layer.bias").data_ptr() == module.bias.data_ptr()
    assert parameters.in_place("layer.weight") is None


def test_other_values_in_the_same_layout_are_not_the_parameter() -> None:
    """As scales that are made anew of codes in place."""

    def double(layer: Any) -> None:
        layer.weight.data.mul_(2)

    parameters, _ = found(double)

    assert parameters.in_place("layer.weight") is None
    assert torch.equal(parameters.value("layer.weight"), WEIGHT * 2)


def test_what_processing_makes_something_of_is_not_the_parameter_whatever_it_shows() -> None:
    blueprint = created(pack, weight=WEIGHT.clone(), bias=torch.zeros(4))
    loaded = digests(blueprint.loaded())
    metas = blueprint.forms

    parameters = LiveParameters([process(blueprint)], metas, loaded, {"layer.bias"})

    assert parameters.kept == set()


def test_a_bias_that_was_widened_is_narrowed_to_be_read_back() -> None:
    def widen(layer: Any) -> None:
        layer.bias = parameter(layer.bias.float())

    parameters, _ = found(widen)

    assert parameters.in_place("layer.bias") is None
    assert torch.equal(parameters.value("layer.bias"), BIAS)


def test_what_no_layout_shows_cannot_be_read_back() -> None:
    parameters, _ = found(pack)

    assert parameters.read_back("layer.weight") is None
    with pytest.raises(ReloadError, match=r"layer\.weight was not sent, and cannot be read back"):
        parameters.value("layer.weight")


def test_two_values_of_what_vllm_stores_once_are_refused() -> None:
    def tie(layer: Any) -> None:
        layer.other = layer.weight

    blueprint = created(tie, weight=WEIGHT, other=WEIGHT.clone())
    loaded = digests(blueprint.loaded())
    parameters = LiveParameters([process(blueprint)], blueprint.forms, loaded)
    same = {"layer.weight": WEIGHT, "layer.other": WEIGHT.clone()}

    parameters.check_ties(same)
    with pytest.raises(ReloadError, match=r"layer\.weight and layer\.other arrived with different"):
        parameters.check_ties(same | {"layer.other": WEIGHT + 1})
