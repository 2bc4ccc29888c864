"""Memory that is used again by the next update, and never by two copies at once."""

from __future__ import annotations

import pytest
import torch

from flashquant.reserve import Copies, Reserve

LARGE = 1 << 20


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(LARGE, dtype=torch.float32).view(512, -1),
        torch.arange(LARGE, dtype=torch.int16).view(512, -1).t(),
        torch.arange(LARGE, dtype=torch.float32).view(512, -1)[:, 100:1500:3],
        torch.randint(0, 120, (512, 2048), dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.arange(3.0),
        torch.empty(0, 5),
    ],
    ids=["rows", "turned", "a window", "fp8", "few", "none"],
)
def test_a_copy_is_the_tensor_in_memory_of_its_own(tensor):
    copy = Copies(Reserve()).of(tensor)

    assert (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype)
    assert torch.equal(copy.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert copy.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_a_dense_tensor_is_copied_in_the_order_in_which_it_lies():
    tensor = torch.zeros(512, 4096).t()

    assert Copies(Reserve()).of(tensor).stride() == tensor.stride()


def test_copies_do_not_overlap():
    copies = Copies(Reserve())

    made = [copies.of(torch.full((LARGE + odd,), odd, dtype=torch.int8)) for odd in range(100)]

    assert all((copy == odd).all() for odd, copy in enumerate(made))


def test_the_next_update_gets_the_same_memory():
    reserve, tensor = Reserve(), torch.zeros(LARGE)
    first, second = Copies(reserve), Copies(reserve)

    address = first.of(tensor).data_ptr()
    first.free()

    assert second.of(tensor).data_ptr() == address


def test_an_update_beside_another_gets_other_memory():
    reserve, tensor = Reserve(), torch.zeros(LARGE)

    kept = [Copies(reserve) for _ in range(2)]

    assert len({copies.of(tensor).data_ptr() for copies in kept}) == 2


def test_more_than_a_chunk_holds_has_a_chunk_of_its_own():
    tensor = torch.ones((64 << 20) + 12345, dtype=torch.uint8)

    assert torch.equal(Copies(Reserve()).of(tensor), tensor)


def test_what_the_largest_update_took_stays_while_small_ones_come_by():
    reserve, tensors = Reserve(), [torch.zeros(60 << 20, dtype=torch.uint8) for _ in range(3)]
    large = Copies(reserve)
    addresses = [large.of(tensor).data_ptr() for tensor in tensors]
    large.free()

    for _ in range(5):
        small = Copies(reserve)
        small.of(torch.zeros(LARGE))
        small.free()
    again = Copies(reserve)

    assert [again.of(tensor).data_ptr() for tensor in tensors] == addresses


def test_a_small_copy_leaves_the_largest_chunk_to_whoever_needs_it():
    reserve = Reserve()
    copies = Copies(reserve)
    copies.of(torch.zeros(100 << 20, dtype=torch.uint8))
    copies.of(torch.zeros(LARGE))
    copies.free()
    reserved = reserve.nbytes

    again = Copies(reserve)
    again.of(torch.zeros(LARGE))
    again.of(torch.zeros(100 << 20, dtype=torch.uint8))
    again.free()

    assert reserve.nbytes == reserved


def test_nothing_is_reserved_once_it_was_given_back():
    reserve = Reserve()
    copies = Copies(reserve)
    copies.of(torch.zeros(LARGE))
    copies.free()

    reserve.clear()

    assert reserve.nbytes == 0
