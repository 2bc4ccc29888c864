"""What changed between two tensors comes back exactly, in the smallest of the forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.sender import eager, native
from flashquant.sender.changes import Change, apply, change, check

DTYPES = [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32]


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def random(shape, dtype, seed=0):
    size = torch.Size(shape).numel() * dtype.itemsize
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=dice).view(dtype).view(shape)


def changed_at(old, here):
    """The same with other bits at these places."""
    new = old.clone()
    as_integers = new.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[old.element_size()])
    flat = as_integers.view(-1)
    flat[here] ^= 1
    return new


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    numel=st.sampled_from([1, 7, 8, 9, 300, 70_000]),
    share=st.sampled_from([0.0, 1e-4, 0.003, 0.05, 0.4, 1.0]),
    seed=st.integers(0, 1 << 16),
)
def test_any_change_comes_back_to_the_bit(dtype, numel, share, seed):
    """NaN and zeros with a sign included."""
    old = random((numel,), dtype, seed)
    dice = torch.Generator().manual_seed(seed)
    new = changed_at(old, (torch.rand(numel, generator=dice) < share).nonzero().flatten())

    found = change(old, new)

    if found is None:
        assert torch.equal(bits(old), bits(new))
    else:
        assert torch.equal(bits(apply(found, old.clone())), bits(new))
        size = found.values.nbytes + (0 if found.places is None else found.places.nbytes)
        assert size <= new.nbytes


@pytest.mark.parametrize("kernels", [eager, native._believed() or eager])
def test_an_element_alone_may_come_from_anywhere(kernels, monkeypatch):
    """What torch calls contiguous: the stride of a single element says nothing."""
    monkeypatch.setattr(native, "_believed", lambda: kernels)
    memory = torch.arange(8, dtype=torch.bfloat16)

    found = change(memory[::8], memory[3:][::8])

    assert found is not None
    assert found.values.item() == 3
    assert change(memory[::8], memory.clone()[::8]) is None


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 510, 511, 65534, 65535, 65536, 131071])
def test_gaps_around_every_limit_come_back(gap):
    old = torch.zeros(gap + 300_000, dtype=torch.int8)
    here = torch.tensor([gap, gap + 1, 2 * gap + 2])
    new = changed_at(old, here)

    found = change(old, new)

    assert found is not None
    check(found, len(new))
    assert torch.equal(apply(found, old.clone()), new)


@pytest.mark.parametrize(
    ("every", "form"), [(1, "whole"), (3, "bitmap"), (100, "gaps"), (100_000, "gaps")]
)
def test_the_smallest_form_is_chosen(every, form):
    old = torch.zeros(400_000, dtype=torch.int8)
    found = change(old, changed_at(old, torch.arange(0, 400_000, every)))

    assert found is not None
    assert found.form == form


def test_a_sparse_change_costs_about_two_bytes_a_place():
    """0.2 % of the codes, as a step of AdamW changes them."""
    old = torch.zeros(1_000_000, dtype=torch.int8)
    dice = torch.Generator().manual_seed(0)
    here = (torch.rand(1_000_000, generator=dice) < 0.002).nonzero().flatten()

    found = change(old, changed_at(old, here))

    assert found is not None
    assert found.places is not None
    assert found.places.nbytes + found.values.nbytes <= 3.1 * len(here)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (torch.tensor([9, 0], dtype=torch.uint8), "changes element 10 of 10"),
        (torch.tensor([255, 255], dtype=torch.uint8), "0 places and 2 values"),
        (torch.tensor([1], dtype=torch.uint8), "1 places and 2 values"),
        (torch.tensor([0, -1], dtype=torch.int64), "its gaps are torch.int64"),
        (torch.full((11,), 2**32 - 1, dtype=torch.uint32), "11 places of 10 elements"),
        (torch.tensor([[0, 1]], dtype=torch.uint8), "no places"),
        (torch.tensor([2**32 - 2, 0], dtype=torch.uint32), "of 10"),
    ],
)
def test_places_that_cannot_be_are_refused(stored, says):
    with pytest.raises(ValueError, match=says):
        check(Change("gaps", stored, torch.zeros(2, dtype=torch.int8)), 10)


@pytest.mark.parametrize("stored", [[3, 4], [3, 4, 0], [3]])
def test_a_bitmap_that_cannot_be_is_refused(stored):
    """Bits behind the last element; a byte too many; one too few."""
    bitmap = torch.tensor(stored, dtype=torch.uint8)

    with pytest.raises(ValueError, match=r"element 10 of 10|its bitmap is"):
        check(Change("bitmap", bitmap, torch.zeros(3, dtype=torch.int8)), 10)
