"""None moved, and what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.errors import MovedTensor
from flashquant.schemes import digest, digests, fingerprint
from flashquant.update import footprints
from flashquant.update.integrity import check_unmoved

DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float32, torch.bool]


def codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.25, -3.0]]).to(dtype)


def test_a_tensor_written_in_place_has_not_moved():
    live = torch.zeros(2, 3)
    before = footprints([("w", live)])

    live.fill_(7)

    check_unmoved(before, footprints([("w", live)]))


@pytest.mark.parametrize(
    "move",
    [
        lambda t: t.clone(),
        lambda t: t[:1],
        lambda t: t.as_strided((3, 3), (1, 3)),
        lambda t: t.view(torch.int32),
        lambda t: t[1:],
    ],
    ids=["address", "shape", "stride", "dtype", "offset"],
)
def test_a_moved_tensor_is_named(move):
    live = torch.zeros(3, 3)
    still = torch.zeros(2)
    before = footprints([("still", still), ("w", live)])

    after = footprints([("still", still), ("w", move(live))])

    with pytest.raises(MovedTensor, match=r"1 live tensors moved .* first w: .*restart the engine"):
        check_unmoved(before, after)


def test_of_several_moved_tensors_the_first_is_named_and_all_are_counted():
    live = {name: torch.zeros(2) for name in "abc"}
    before = footprints(live.items())

    live["c"], live["b"] = torch.zeros(2), torch.zeros(2)

    with pytest.raises(MovedTensor, match=r"2 live tensors moved .* first b"):
        check_unmoved(before, footprints(live.items()))


def test_both_footprints_of_the_moved_tensor_are_shown():
    before = footprints([("w", torch.zeros(2, 3))])
    after = footprints([("w", torch.zeros(3, 2, dtype=torch.int8))])

    with pytest.raises(MovedTensor, match=r"\(2, 3\).*float32.*\(3, 2\).*int8"):
        check_unmoved(before, after)


@pytest.mark.parametrize(("before", "after"), [(["w"], []), ([], ["w"])])
def test_a_tensor_that_comes_or_goes_has_moved(before, after):
    live = torch.zeros(2)

    with pytest.raises(MovedTensor, match="first w"):
        check_unmoved(
            footprints((name, live) for name in before), footprints((name, live) for name in after)
        )


def digest_of(contents):
    return digest(digests(contents))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_contents_have_equal_digests(dtype):
    assert digest_of([("w", codes(dtype))]) == digest_of([("w", codes(dtype).clone())])


def test_a_digest_is_128_bits_in_hex():
    assert len(bytes.fromhex(digest_of([("w", codes(torch.int8))]))) == 16


def test_a_digest_depends_on_the_name():
    assert digest_of([("a", torch.zeros(2))]) != digest_of([("b", torch.zeros(2))])


def test_a_digest_depends_on_the_dtype():
    zeros = torch.zeros(2, 3, dtype=torch.int8)

    assert digest_of([("w", zeros)]) != digest_of([("w", zeros.view(torch.float8_e4m3fn))])
    assert digest_of([("w", zeros)]) != digest_of([("w", zeros.view(torch.uint8))])


def test_a_digest_depends_on_the_shape():
    assert digest_of([("w", torch.zeros(2, 3))]) != digest_of([("w", torch.zeros(3, 2))])


def test_a_digest_depends_on_the_order():
    pairs = [("a", torch.zeros(2)), ("b", torch.ones(2))]

    assert digest_of(pairs) != digest_of(pairs[::-1])


@given(position=st.integers(0, 63), bit=st.integers(0, 7), layout=st.sampled_from(["rows", "t"]))
@settings(deadline=None)
def test_a_digest_depends_on_every_bit(position, bit, layout):
    weight = torch.zeros(8, 8, dtype=torch.uint8)
    before = digest_of([("w", weight if layout == "rows" else weight.t())])

    weight.view(-1)[position] = 1 << bit

    assert digest_of([("w", weight if layout == "rows" else weight.t())]) != before


def test_the_sign_of_zero_is_a_bit_like_any_other():
    assert digest_of([("w", torch.tensor([0.0]))]) != digest_of([("w", torch.tensor([-0.0]))])


def test_equal_transposed_views_have_equal_digests():
    weight = codes(torch.int8)

    assert digest_of([("w", weight.t())]) == digest_of([("w", weight.clone().t())])


def test_a_view_with_gaps_is_read_in_logical_order():
    padded = torch.arange(24).view(4, 6)

    assert digest_of([("w", padded[:, :4])]) == digest_of([("w", padded[:, :4].contiguous())])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalars_and_empty_tensors_have_a_digest(shape, dtype):
    tensor = torch.ones(shape).to(dtype)

    assert digest_of([("w", tensor)]) == digest_of([("w", tensor.clone())])


def test_scalars_are_told_apart():
    assert digest_of([("w", torch.tensor(1.0))]) != digest_of([("w", torch.tensor(2.0))])


def test_a_string_stands_for_memory_out_of_reach():
    assert digest_of([("w", "packed from a")]) != digest_of([("w", "packed from b")])


def test_the_fields_of_a_digest_do_not_run_together():
    assert digest_of([("a", "x|b|y")]) != digest_of([("a", "x"), ("b", "y")])


def test_a_parameter_that_wants_gradients_has_the_digest_of_its_values():
    parameter = torch.nn.Parameter(torch.ones(2))

    assert digest_of([("w", parameter)]) == digest_of([("w", torch.ones(2))])


def test_one_element_with_stride_zero_has_a_fingerprint_too() -> None:
    """vLLM keeps some scales as an expanded view of one number."""
    expanded = torch.full((), 2.0).expand(1)

    assert fingerprint(expanded) == fingerprint(torch.full((1,), 2.0))
