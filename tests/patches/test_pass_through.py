"""Which parameters go live by themselves, by what processing a twin shows."""

from __future__ import annotations

from typing import Any

import torch

from flashquant.patches.layers.pass_through import passed_through
from tests.support.modules import created, pack, parameter, probe, process

WEIGHT, BIAS, SCALE = torch.rand(4, 8), torch.rand(4).bfloat16(), torch.rand(4, 1)


def widen(layer: Any) -> None:
    """As vLLM's CPU kernels do with a bias."""
    pack(layer)
    layer.bias = parameter(layer.bias.float())


def test_a_bias_that_is_only_widened_goes_alone_into_what_is_live_of_it() -> None:
    blueprint = process(created(widen, weight=WEIGHT, bias=BIAS))

    (live,) = passed_through([blueprint], probe())["layer.bias"]

    assert live is blueprint.module.bias
    assert live.dtype == torch.float32


def test_a_bias_that_is_kept_twice_is_written_twice() -> None:
    def keep(layer: Any) -> None:
        pack(layer)
        layer.again = layer.bias.detach().float()

    blueprint = process(created(keep, weight=WEIGHT, bias=BIAS))

    live = passed_through([blueprint], probe())["layer.bias"]

    assert [tensor.dtype for tensor in live] == [torch.bfloat16, torch.float32]


def test_a_weight_that_stays_where_it_lies_goes_alone_whatever_was_tried_with_it() -> None:
    """VLLM tries oneDNN with a router, which may refuse it, and multiplies it as it is then."""

    def try_to_pack(layer: Any) -> None:
        layer.weight.t().contiguous()
        layer.bias = parameter(layer.bias.float())

    blueprint = process(created(try_to_pack, weight=WEIGHT, bias=BIAS))

    assert set(passed_through([blueprint], probe())) == {"layer.weight", "layer.bias"}


def test_a_weight_that_is_packed_does_not_go_alone() -> None:
    blueprint = process(created(widen, weight=WEIGHT, bias=BIAS))

    assert set(passed_through([blueprint], probe())) == {"layer.bias"}


def test_a_bias_that_anything_is_computed_from_does_not_go_alone() -> None:
    def fold(layer: Any) -> None:
        layer.weight = parameter(layer.weight + layer.bias[:, None])

    blueprint = process(created(fold, weight=WEIGHT, bias=BIAS))

    assert passed_through([blueprint], probe()) == {}


def test_a_copy_that_is_computed_with_counts_as_the_bias_itself() -> None:
    def fold(layer: Any) -> None:
        wide = layer.bias.detach().float()
        layer.weight = parameter(layer.weight + wide[:, None])

    blueprint = process(created(fold, weight=WEIGHT, bias=BIAS))

    assert passed_through([blueprint], probe()) == {}


def test_scales_never_go_without_their_codes() -> None:
    blueprint = process(created(pack, weight=WEIGHT, weight_scale=SCALE, bias=BIAS))

    assert set(passed_through([blueprint], probe())) == {"layer.bias"}


def test_all_parameters_of_a_module_that_is_not_processed_go_alone() -> None:
    blueprint = created(None, weight=WEIGHT, bias=BIAS)

    found = passed_through([blueprint], probe())

    assert found["layer.weight"][0] is blueprint.module.weight
    assert found["layer.bias"][0] is blueprint.module.bias


def test_the_only_parameter_of_a_processed_module_has_nothing_to_go_alone_of() -> None:
    assert passed_through([process(created(pack, weight=WEIGHT))], probe()) == {}
