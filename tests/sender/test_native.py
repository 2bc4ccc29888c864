"""What changed is found in C as the definition finds it, to the bit."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch

from flashquant.config import env
from flashquant.sender import native
from flashquant.sender.changes import Change, change, write

KERNELS = native._believed()
needs_a_compiler = pytest.mark.skipif(
    KERNELS is None, reason="no C compiler on this machine, or not wanted"
)


@pytest.fixture
def torch_alone(monkeypatch):
    def using():
        monkeypatch.setattr(native, "_believed", lambda: None)

    return using


@pytest.mark.skipif(
    not env.NATIVE.read(os.environ) or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no C compiler on this machine, or not wanted",
)
def test_the_kernels_of_this_machine_are_believed():
    assert KERNELS is not None


@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.03, 0.2, 0.9])
def test_changes_are_those_of_the_definition(dtype, share, torch_alone):
    dice = torch.Generator().manual_seed(7)
    size = 300_007 * dtype.itemsize
    old = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=dice)
    new = torch.where(torch.rand(size, generator=dice) < share / dtype.itemsize, old ^ 1, old)
    in_c = change(old.view(dtype), new.view(dtype))

    torch_alone()
    by_torch = change(old.view(dtype), new.view(dtype))

    assert in_c.form == by_torch.form
    for one, other in zip(in_c[1:], by_torch[1:], strict=True):
        assert one is other is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@needs_a_compiler
def test_a_kernel_that_differs_is_named_and_not_believed(monkeypatch, caplog):
    class OffByOne(native.Kernels):
        def span(self, form, places):
            count, last = super().span(form, places)
            return count, last + (count > 100)

    monkeypatch.setattr(native, "Kernels", OffByOne)
    native._believed.cache_clear()
    try:
        with caplog.at_level(logging.ERROR):
            assert native._believed() is None
    finally:
        native._believed.cache_clear()
    assert "span, built by this machine's C compiler, differs" in caplog.text


@pytest.mark.parametrize("without_c", [False, True])
def test_places_outside_of_a_tensor_are_never_written(without_c, torch_alone):
    """Also where nobody has looked at the bundle before."""
    if without_c:
        torch_alone()
    memory = torch.zeros(1000, dtype=torch.int8)
    found = Change("gaps", torch.tensor([5, 4], dtype=torch.uint8), torch.ones(2, dtype=torch.int8))

    with pytest.raises(ValueError, match="changes element 10 of 10"):
        write(found, memory[:10])

    assert not memory.any()


def test_what_was_written_goes_back_however_often(torch_alone):
    old = torch.arange(100, dtype=torch.int8)
    live, steps = old.clone(), []
    found = change(old, torch.where(torch.arange(100) % 9 == 0, -old - 1, old))

    write(found, live, lambda undo, nbytes: steps.append((undo, nbytes)))
    ((undo, nbytes),) = steps
    undo()
    undo()

    assert torch.equal(live, old)
    assert nbytes == 12


@pytest.mark.parametrize("without_c", [False, True])
def test_an_interrupt_before_the_exchange_leaves_nothing_to_put_back(without_c, torch_alone):
    """The way back is noted first, and holds nothing until then."""
    if without_c:
        torch_alone()
    old = torch.arange(100, dtype=torch.int8)
    live, steps = old.clone(), []
    found = change(old, torch.where(torch.arange(100) % 9 == 0, -old - 1, old))

    def interrupted(undo, nbytes):
        steps.append(undo)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(found, live, interrupted)
    for undo in steps:
        undo()

    assert torch.equal(live, old)


def test_the_way_back_holds_a_copy_of_the_old_elements_and_the_places_of_the_bundle():
    old = torch.arange(1000, dtype=torch.int16)
    live, steps = old.clone(), []
    found = change(old, torch.where(torch.arange(1000) % 3 == 0, -old - 1, old))
    assert found.form == "bitmap"

    write(found, live, lambda undo, nbytes: steps.append((undo, nbytes)))
    ((undo, nbytes),) = steps
    assert not torch.equal(live, old)
    undo()

    assert torch.equal(live, old)
    assert nbytes == 2 * 334
