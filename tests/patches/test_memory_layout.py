"""What became of a parameter's memory, told by watching: every way to be wrong about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashquant.patches.layers import MemoryLayout, memory_layouts
from flashquant.schemes.int8 import int8_channel

Process = Callable[[Any], None]


class Method:
    """Stands for one of vLLM's quantization methods."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._process(layer)


def after(process: Process, **own: Tensor) -> dict[str, MemoryLayout]:
    """How the weight and the scale of a layer are stored once it has been processed so."""
    own = own or {
        "weight": torch.randint(-127, 128, (4, 8), dtype=torch.int8),
        "scale": torch.rand(4, 1),
    }
    twin = nn.Module()
    for name, tensor in own.items():
        setattr(twin, name, as_parameter(tensor.detach()))
    vars(twin)["quant_method"] = Method(process)
    return memory_layouts(twin, own, int8_channel)


def as_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def transpose(layer: Any) -> None:
    layer.weight = as_parameter(layer.weight.t().data)


def test_a_view_of_the_very_memory_takes_rows() -> None:
    assert after(transpose) == {
        "weight": MemoryLayout("rows", ("weight",)),
        "scale": MemoryLayout("rows", ("scale",), copies=("scale",), stays=True),
    }


def test_what_is_moved_about_in_place_does_not_stay() -> None:
    """As Marlin permutes a bias."""

    def process(layer: Any) -> None:
        layer.scale.data = layer.scale.data.flip(0)

    stays = {name: layout.stays for name, layout in after(process).items()}

    assert stays == {"weight": True, "scale": False}


def test_another_view_kept_beside_it_takes_rows_too() -> None:
    def process(layer: Any) -> None:
        transpose(layer)
        layer.flat = layer.weight.t().view(-1)

    assert after(process)["weight"] == MemoryLayout("rows", ("weight", "flat"))


def test_a_view_with_new_strides_in_the_old_object_takes_rows() -> None:
    """vLLM's `update_tensor_inplace` does that where old and new have the same memory."""

    def process(layer: Any) -> None:
        new = layer.weight.t()
        layer.weight.as_strided_(new.shape, new.stride())

    assert after(process)["weight"].kind == "rows"


def test_a_parameter_that_is_copied_onto_itself_takes_rows() -> None:
    """vLLM's `replace_parameter` does that where a layout already is what it should be."""

    def process(layer: Any) -> None:
        layer.weight.data.copy_(layer.weight)

    assert after(process)["weight"].kind == "rows"


def pack(layer: Any) -> None:
    layer.weight = as_parameter(layer.weight.t().contiguous())


def overwrite_in_place(layer: Any) -> None:
    layer.weight.data.copy_(layer.weight.flip(0))


def shift_in_place(layer: Any) -> None:
    flat = layer.weight.view(-1)
    flat[1:].copy_(flat[:-1].clone())


def overwrite_past_torch(layer: Any) -> None:
    array = layer.weight.numpy()
    array[:] = array[::-1].copy()


def keep_a_sum(layer: Any) -> None:
    transpose(layer)
    layer.azp_adj = layer.weight.sum(dim=0, keepdim=True, dtype=torch.int32)


def keep_a_number(layer: Any) -> None:
    layer.largest = layer.weight.max().item()


def fill_past_torch(layer: Any) -> None:
    layer.packed = torch.empty_like(layer.weight)
    layer.packed.numpy()[:] = layer.weight.numpy() + 1


def pack_past_torch(layer: Any) -> None:
    layer.packed = torch.from_numpy(layer.weight.numpy() + 1)


def stack_what_was_filled_past_torch(layer: Any) -> None:
    part = torch.empty_like(layer.weight)
    part.numpy()[:] = layer.weight.numpy() + 1
    layer.packed = torch.stack([part, part])


def show_half(layer: Any) -> None:
    layer.weight = as_parameter(layer.weight[:2])


def show_as_other_dtype(layer: Any) -> None:
    layer.weight = as_parameter(layer.weight.view(torch.uint8))


def repeat_by_strides(layer: Any) -> None:
    layer.weight = as_parameter(layer.weight.as_strided((4, 8), (0, 1)))


def drop(layer: Any) -> None:
    layer.weight = None


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (pack, "weight is made of it"),
        (overwrite_in_place, r"aten.copy_.default writes into it"),
        (shift_in_place, r"aten.copy_.default writes into it"),
        (overwrite_past_torch, "its bytes change"),
        (keep_a_sum, "azp_adj is made of it"),
        (keep_a_number, "aten._local_scalar_dense.default takes it out"),
        (fill_past_torch, "packed is made of it"),
        (pack_past_torch, "packed is made of it"),
        (stack_what_was_filled_past_torch, "packed is made of it"),
        (show_half, "shows other bytes"),
        (show_as_other_dtype, "shows other bytes"),
        (repeat_by_strides, "shows other bytes"),
        (drop, "nothing that the kernels read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_anything_else_is_packed_and_says_why(process: Process, reason: str) -> None:
    stored = after(process)["weight"]

    assert stored.kind == "packed"
    assert reason in stored.reason


def test_one_parameter_may_take_rows_where_another_does_not() -> None:
    kinds = {name: stored.kind for name, stored in after(pack).items()}

    assert kinds == {"weight": "packed", "scale": "rows"}


def test_a_scale_that_is_folded_into_a_weight_is_not_rows() -> None:
    def process(layer: Any) -> None:
        layer.folded = layer.weight * layer.scale

    stored = after(process)

    assert {stored["weight"].kind, stored["scale"].kind} == {"packed"}
    assert stored["scale"].leaves == ("scale", "folded")


class Holder:
    """A class of which flashquant knows nothing, as vLLM's MoE quant configs are."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_what_is_kept_out_of_sight_is_hidden() -> None:
    def process(layer: Any) -> None:
        vars(layer)["config"] = Holder(layer.scale.reciprocal())

    stored = after(process)["scale"]

    assert stored.kind == "hidden"
    assert "aten.reciprocal.default made of it" in stored.reason


def test_what_shares_memory_with_a_leaf_is_not_hidden() -> None:
    def process(layer: Any) -> None:
        vars(layer)["config"] = Holder(layer.scale.view(-1))

    assert after(process)["scale"] == MemoryLayout("rows", ("scale",), stays=True)


def test_what_is_only_computed_on_the_way_counts_for_nothing() -> None:
    def process(layer: Any) -> None:
        _ = layer.weight.float() * layer.scale
        transpose(layer)

    assert after(process)["weight"].kind == "rows"


FLOATS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_constant_is_made_of_nothing() -> None:
    def process(layer: Any) -> None:
        layer.scale = as_parameter(layer.scale / torch.tensor(448.0))

    stored = after(process)

    assert stored["weight"].kind == "rows"
    assert stored["scale"].leaves == ("scale",)


def quantize(layer: Any, weight: Tensor | None = None) -> None:
    codes, scales = int8_channel(layer.weight if weight is None else weight)
    layer.weight, layer.weight_scale = as_parameter(codes.t()), as_parameter(scales)


def test_the_codes_that_we_would_write_take_rows_of_codes() -> None:
    assert after(quantize, weight=FLOATS)["weight"] == MemoryLayout(
        "codes", ("weight", "weight_scale"), "weight, weight_scale is made of it"
    )


def other_scales(layer: Any) -> None:
    quantize(layer)
    layer.weight_scale = as_parameter(layer.weight_scale * 2)


def other_order(layer: Any) -> None:
    quantize(layer)
    layer.weight = as_parameter(layer.weight.contiguous())


def another_leaf(layer: Any) -> None:
    quantize(layer)
    layer.azp_adj = layer.weight.sum(dim=0)


def smoothed_by_the_bias(layer: Any) -> None:
    quantize(layer, layer.weight * layer.bias)


@pytest.mark.parametrize("process", [other_scales, other_order, another_leaf, smoothed_by_the_bias])
def test_anything_else_that_is_made_of_floats_is_packed(process: Process) -> None:
    assert after(process, weight=FLOATS, bias=torch.ones(8))["weight"].kind == "packed"


def test_stacked_experts_take_rows_of_codes_each() -> None:
    def process(layer: Any) -> None:
        codes, scales = zip(*map(int8_channel, layer.weight), strict=True)
        layer.weight = as_parameter(torch.stack(codes))
        layer.weight_scale = as_parameter(torch.stack(scales))

    assert after(process, weight=FLOATS.view(2, 2, 8))["weight"].kind == "codes"


def test_memory_that_is_filled_by_what_can_be_watched_is_nobody_elses() -> None:
    """As vLLM's quantization of experts does: allocated empty, then filled one by one."""

    def process(layer: Any) -> None:
        weight = torch.empty_like(layer.weight)
        for expert in range(len(weight)):
            weight[expert] = layer.weight[expert] + 1
        layer.weight = as_parameter(weight)

    stored = after(process)

    assert stored["weight"].kind == "packed"
    assert stored["scale"].kind == "rows"
