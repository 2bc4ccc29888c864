"""vLLM's processing on twins: what it makes, beside what is live."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashquant.patches.layers import LayerBlueprint
from flashquant.patches.layers.blueprint import attention_blueprint
from flashquant.patches.layers.kernel_state import Carry
from flashquant.patches.layers.twins import Twins, echoes
from flashquant.update import Stage
from tests.support.modules import Method, created, pack, parameter, process

WEIGHT, NEW = torch.rand(4, 8), torch.rand(4, 8)


def made(blueprints: list[LayerBlueprint], values: dict[str, Tensor]) -> list[Carry]:
    stages = {t: Stage(v.shape, v.stride(), v.dtype) for t, v in values.items()}
    return list(Twins(blueprints, contextlib.nullcontext).processed(values, stages))


def test_what_processing_makes_is_put_beside_what_is_live() -> None:
    blueprint = process(created(pack, weight=WEIGHT))
    live = blueprint.module.weight

    (carry,) = made([blueprint], {"layer.weight": NEW})

    assert torch.equal(live, WEIGHT.t())
    assert carry.apply() == live.nbytes
    assert blueprint.module.weight is live
    assert torch.equal(live, NEW.t())


def test_one_twin_is_held_at_a_time() -> None:
    """Two would be a second set of a layer's weights."""
    processed: list[str] = []
    blueprints = [
        process(created(lambda layer: processed.append("twin") or pack(layer), name, weight=WEIGHT))
        for name in "ab"
    ]
    processed.clear()
    stages = {f"{n}.weight": Stage(NEW.shape, NEW.stride(), NEW.dtype) for n in "ab"}
    twins = Twins(blueprints, contextlib.nullcontext)

    making = twins.processed(dict.fromkeys(stages, NEW), stages)
    next(making)

    assert processed == ["twin"]


def test_the_surroundings_are_left_when_it_ends_early() -> None:
    inside = [0]

    @contextlib.contextmanager
    def surroundings() -> Iterator[None]:
        inside[0] += 1
        try:
            yield
        finally:
            inside[0] -= 1

    blueprint = process(created(pack, weight=WEIGHT))
    stages = {"layer.weight": Stage(NEW.shape, NEW.stride(), NEW.dtype)}

    with contextlib.closing(
        Twins([blueprint], surroundings).processed({"layer.weight": NEW}, stages)
    ):
        assert inside == [0]
    making = Twins([blueprint], surroundings).processed({"layer.weight": NEW}, stages)
    with contextlib.closing(making):
        next(making)
        assert inside == [1]

    assert inside == [0]


def test_a_module_that_holds_what_another_does_is_not_processed_again() -> None:
    def count(layer: Any) -> None:
        processed.append(layer)

    processed: list[Any] = []
    embeddings = created(count, "embed", weight=WEIGHT)
    head = created(count, "lm_head", weight=WEIGHT)
    head.module._parameters["weight"] = embeddings.module._parameters["weight"]

    assert list(echoes([embeddings, head])) == ["lm_head"]
    made([embeddings, head], {"embed.weight": NEW, "lm_head.weight": NEW})

    assert len(processed) == 1


def test_a_module_that_keeps_something_of_its_own_is_no_echo() -> None:
    embeddings = created(None, "embed", weight=WEIGHT)
    head = created(None, "lm_head", weight=WEIGHT)
    head.module._parameters["weight"] = embeddings.module._parameters["weight"]
    head.module.packed = torch.rand(2)

    assert list(echoes([embeddings, head])) == []


class Attention(nn.Module):
    """It reads what its implementation was handed, and has a buffer of its own."""

    def __init__(self, sinks: Tensor) -> None:
        super().__init__()
        self.register_buffer("_k_scale", torch.ones(1))
        self.impl = Method(pack)
        vars(self.impl)["sinks"] = parameter(sinks)

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        vars(self.impl)["sinks"] = vars(self.impl)["sinks"].to(dtype).clone()


def test_an_attention_may_hold_its_cache_scales_as_parameters() -> None:
    """Where they are buffers until it is processed: GPT-OSS in int8, before vLLM 0.32."""
    attention = Attention(WEIGHT)
    handed = vars(attention.impl)["sinks"]
    blueprint = attention_blueprint("attn", attention, {id(handed): "attn.sinks"})
    attention._k_scale = scale = parameter(torch.full((1,), 0.5))
    attention.process_weights_after_loading(torch.float32)
    live = vars(attention.impl)["sinks"]
    twins = Twins([blueprint], contextlib.nullcontext)
    values = {"attn.sinks": NEW}
    stages = {"attn.sinks": Stage(NEW.shape, NEW.stride(), NEW.dtype)}

    twins.rehearse(values, stages)
    (carry,) = twins.processed(values, stages)
    carry.apply()

    assert vars(attention.impl)["sinks"] is live
    assert torch.equal(live, NEW)
    assert attention._k_scale is scale
    assert scale == 0.5
