"""One look for each kind of module; what is kept out of sight is refused, whoever shares it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from flashquant.errors import UnsupportedEngine
from flashquant.patches.layers import LayerBlueprint, LayerChoice, memory_layouts
from flashquant.patches.layers import probe as module_of_probe
from flashquant.update import digests
from tests.support.modules import CPU, created, pack, probe, process

WEIGHT = torch.rand(4, 8)


class Holder:
    """A class of which flashquant knows nothing, as vLLM's MoE quant configs are."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def hide(layer: Any) -> None:
    vars(layer)["config"] = Holder(layer.weight.reciprocal())


def choice(loaded: Mapping[str, str] = MappingProxyType({}), *compared: str) -> LayerChoice:
    return LayerChoice(
        contextlib.nullcontext,
        CPU,
        loaded,
        None,
        shares_scales=False,
        aliases=(),
        compared=frozenset(compared),
    )


def tied(blueprint: LayerBlueprint, other: LayerBlueprint) -> list[LayerBlueprint]:
    """Two modules that hold one weight, as embeddings and a head do."""
    held = blueprint.module._parameters["weight"]
    assert isinstance(held, nn.Parameter)
    other.module._parameters["weight"] = held
    return [blueprint, replace(other, targets=blueprint.targets)]


def test_modules_of_one_kind_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[nn.Module] = []

    def look(twin: nn.Module, *rest: Any) -> Any:
        looked_at.append(twin)
        return memory_layouts(twin, *rest)

    monkeypatch.setattr(module_of_probe, "memory_layouts", look)
    probing = probe()

    first, second = (probing.layouts(created(pack, name, weight=WEIGHT)) for name in "ab")

    assert first is second
    assert len(looked_at) == 1


def test_another_form_is_another_kind() -> None:
    probing = probe()

    one, other = (probing.layouts(created(pack, weight=torch.rand(4, k))) for k in (8, 16))

    assert one is not other


def test_a_look_leaves_the_live_module_alone() -> None:
    blueprint = created(pack, weight=WEIGHT.clone())

    probe().layouts(blueprint)

    assert torch.equal(blueprint.module.weight, WEIGHT)


def test_a_module_without_a_method_is_not_looked_at() -> None:
    assert probe().layouts(created(None, weight=WEIGHT)) == {}


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "tied"])
def test_what_is_kept_out_of_sight_is_refused_by_the_modules_name(shares: bool) -> None:
    head = created(hide, "lm_head", weight=WEIGHT)
    group = tied(created(None, "embed", weight=WEIGHT), head) if shares else [head]

    with pytest.raises(UnsupportedEngine, match=r"lm_head\.weight \(Module, Method\): what .*made"):
        choice().layer(group)


def test_what_is_packed_is_processed_and_what_is_left_alone_is_written_in_place() -> None:
    packed, plain = created(pack, weight=WEIGHT), created(lambda _: None, weight=WEIGHT)

    layers = [choice().layer([process(blueprint)]) for blueprint in (packed, plain)]

    assert [layer.placement for layer in layers] == ["staged", "direct"]
    assert [dict(layer.homes) != {} for layer in layers] == [False, True]


def test_a_module_without_a_method_is_written_in_place_if_it_is_as_it_was_loaded() -> None:
    """A model may change a norm by itself when it has been loaded, and will not do so again."""
    norm = created(None, "norm", weight=torch.rand(8))
    loaded = digests(norm.loaded())
    (target,) = loaded

    assert set(choice(loaded).layer([norm]).homes) == {target}
    assert not choice(loaded, target).layer([norm]).homes
    norm.module.weight.data += 1
    assert not choice(loaded).layer([norm]).homes
