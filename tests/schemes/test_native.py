"""The kernels in C return the bits of the definitions, wherever they read and write."""

from __future__ import annotations

import math
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.schemes import absmax, fp8, int8, native, quick, smoothed

COMPILER = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
# Kernels that differ from their definitions are None, too: that is for the tests to find.
pytestmark = pytest.mark.skipif(
    COMPILER is None or not native.wanted(), reason="no C compiler on this machine, or not wanted"
)
KERNELS = native.kernels()

DTYPES = (torch.bfloat16, torch.float32)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def rows(n, k, seed, dtype=torch.bfloat16):
    """Of very different sizes; one of zeros, one of ties."""
    dice = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=dice) * torch.logspace(-12, 8, n)[:, None]
    weight[n // 2] = 0
    weight[n // 3] = torch.arange(k) - k / 2 + 0.5
    return weight.to(dtype)


def every_bf16():
    """All finite ones."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(numbers.isfinite(), numbers, 0)


def both(name, weight, *factors):
    """What the kernel returns, and what its definition does."""
    defined = next(m for m in (int8, fp8, smoothed, absmax) if hasattr(m, name))
    return getattr(KERNELS, name)(weight, *factors), getattr(defined, name)(weight, *factors)


def test_the_kernels_of_this_machine_are_believed():
    assert KERNELS is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8_channel", "fp8_channel", "fp8_tensor"])
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 700), seed=st.integers(0, 2**16))
def test_codes_and_scales_are_those_of_the_definition(name, dtype, n, k, seed):
    ours, defined = both(name, rows(n, k, seed, dtype))

    for one, other in zip(ours, defined, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_smoothed_codes_are_those_of_the_definition(dtype, n, k, seed):
    weight = rows(n, k, seed, dtype)
    dice = torch.Generator().manual_seed(seed)
    by_column = torch.rand(k, generator=dice) + 0.5
    by_row = 400 * torch.rand(n, generator=dice) / absmax.row_absmax(weight).flatten()
    by_row = torch.where(by_row.isfinite(), by_row, 1.0)

    frozen, frozen_defined = both("int8_frozen", weight, by_column, by_row)
    fresh, fresh_defined = both("int8_refreshed", weight, by_column, by_row, by_row[:, None])

    assert torch.equal(frozen.codes, frozen_defined.codes)
    assert frozen.clipped == frozen_defined.clipped
    assert frozen.peak == frozen_defined.peak
    assert torch.equal(fresh[0], fresh_defined[0])
    assert torch.equal(bits(fresh[1]), bits(fresh_defined[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8_channel", "fp8_channel", "fp8_tensor", "int8_refreshed"])
@pytest.mark.parametrize("columns", [1, 33, 300])
def test_numbers_without_a_reciprocal_become_the_same(name, dtype, columns):
    """Subnormal ones, and the first normal ones; each row as a tensor of its own, too."""
    dice = torch.Generator().manual_seed(columns)
    sizes = torch.logspace(-22.5, -17.5, 60)[:, None] ** 2
    weight = (torch.randn(60, columns, generator=dice) * sizes).to(dtype)
    factors = (torch.ones(columns), torch.ones(60), torch.ones(60, 1))

    for rows_ in (slice(60), *(slice(i, i + 1) for i in range(60))):
        few = [factors[0], *(factor[rows_] for factor in factors[1:])]
        for one, other in zip(
            *both(name, weight[rows_], *few * (name == "int8_refreshed")), strict=True
        ):
            assert torch.equal(bits(one), bits(other))


def test_every_bf16_number_becomes_the_e4m3_that_torch_makes_of_it():
    numbers = every_bf16().view(256, 256)

    for scale in (1.0, 0.37, 2.0**-7, 3e4, 1e-30, 1e30, 2.0**-126, 2.0**-130, 2.0**127, 0.0):
        ours = KERNELS.fp8_static(numbers, torch.tensor([scale]))

        assert torch.equal(bits(ours), bits(fp8.fp8_static(numbers, torch.tensor([scale]))))


@settings(max_examples=40, deadline=None)
@given(mantissa=st.integers(128, 255), exponent=st.integers(-60, 100))
def test_every_bf16_number_in_a_row_of_any_size(mantissa, exponent):
    """A row whose largest number is a given one, and that holds all smaller ones."""
    peak = torch.tensor(math.ldexp(mantissa, exponent)).bfloat16()
    numbers = every_bf16()
    row = torch.where(numbers.abs() <= peak, numbers, peak)[None]

    for one, other in zip(*both("fp8_channel", row), strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("name", ["int8_channel", "fp8_channel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_tells_of_a_weight_that_is_not_finite(name, bad):
    weight = rows(5, 33, 0)
    weight[3, 32] = bad

    _, scales = getattr(KERNELS, name)(weight)

    assert scales.isfinite().flatten().tolist() == [True, True, True, False, True]


def test_rows_are_read_and_written_at_any_distance_from_each_other():
    wide, home = rows(64, 96, 1), torch.zeros(64, 80, dtype=torch.int8)

    KERNELS.int8_channel(wide[:, 16:61], home[:, 3:48])

    assert torch.equal(home[:, 3:48], int8.int8_channel(wide[:, 16:61].contiguous())[0])
    assert not home[:, :3].any()
    assert not home[:, 48:].any()


def test_columns_that_do_not_lie_side_by_side_are_not_taken():
    assert not KERNELS.take(rows(8, 8, 0).t())
    with pytest.raises(ValueError, match="side by side"):
        KERNELS.int8_channel(rows(8, 8, 0), torch.zeros(8, 8, dtype=torch.int8).t())


def test_many_rows_are_shared_among_threads_and_are_the_same():
    weight = rows(2048, 512, 3)

    ours, defined = both("int8_channel", weight)

    assert torch.equal(ours[0], defined[0])


def test_a_kernel_that_differs_is_named(monkeypatch):
    class OffByOne(native.Kernels):
        def int8_channel(self, weight, codes=None):
            codes, scales = super().int8_channel(weight, codes)
            codes[0, 0] += 1
            return codes, scales

    assert native.difference(KERNELS) is None
    found = native.difference(OffByOne(KERNELS._library))
    assert found == "int8_channel of torch.float32"


def test_kernels_for_float32_are_compared_while_a_model_loads():
    """vLLM makes bf16 the default dtype then, and they may be wanted there for the first time."""

    class OffByOneInFloat32(native.Kernels):
        def fp8_channel(self, weight, codes=None):
            codes, scales = super().fp8_channel(weight, codes)
            return codes, scales * (1 + (weight.dtype == torch.float32))

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert native.difference(KERNELS) is None
        found = native.difference(OffByOneInFloat32(KERNELS._library))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)

    assert found == "fp8_channel of torch.float32"


@pytest.mark.parametrize("made_by", [KERNELS, fp8], ids=["C", "definition"])
def test_a_scale_is_float32_whatever_the_default_dtype_is(made_by):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = [made_by.fp8_tensor(torch.ones(n, 4, dtype=torch.bfloat16))[1] for n in (0, 2)]
    finally:
        torch.set_default_dtype(before)

    assert [scale.dtype for scale in made] == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["copied", "int8_channel", "fp8_channel"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 83), (1024, 512)], ids=str)
def test_rows_are_stored_where_they_belong_and_their_peak_is_told(name, dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    defined = (weight,) if name == "copied" else both(name, weight)[1]
    homes = [torch.zeros_like(tensor) for tensor in defined]

    peak = KERNELS.storing(name, dtype, *homes)(weight)

    assert peak == weight.abs().max().item()
    for home, expected in zip(homes, defined, strict=True):
        assert torch.equal(bits(home), bits(expected))


@pytest.mark.parametrize("name", ["copied", "int8_channel", "fp8_channel"])
@pytest.mark.parametrize("rows_", [5, 5000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_peak_tells_of_a_weight_that_is_not_finite(name, rows_, bad):
    weight = torch.ones(rows_, 33, dtype=torch.bfloat16)
    weight[3, 32] = bad
    homes = [weight.clone()] if name == "copied" else list(getattr(KERNELS, name)(weight))

    assert not math.isfinite(KERNELS.storing(name, weight.dtype, *homes)(weight))


def test_a_kernel_that_stores_something_else_is_named():
    class Louder(native.Kernels):
        def storing(self, *args):
            store = super().storing(*args)
            return lambda weight: 2 * store(weight)

    found = native.difference(Louder(KERNELS._library))
    assert found == "copied of torch.float32, in place"


def test_they_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("FLASHQUANT_NATIVE", "0")
    native.kernels.cache_clear()
    try:
        assert native.kernels() is None
        assert torch.equal(
            quick.int8_channel(rows(8, 8, 0))[0], int8.int8_channel(rows(8, 8, 0))[0]
        )
    finally:
        native.kernels.cache_clear()


def test_kernels_are_believed_on_the_host_whatever_torchs_defaults_are():
    """vLLM makes a GPU the default device while it creates a model, and bf16 the dtype while it
    loads one; either is when kernels are asked for first.
    """
    with torch.device("meta"):
        assert {weight.device.type for weight in native.hard_rows()} == {"cpu"}
        assert native.difference(KERNELS) is None
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [weight.dtype for weight in native.hard_rows()] == [
            torch.float32,
            torch.bfloat16,
        ] * 2
        assert native.difference(KERNELS) is None
    finally:
        torch.set_default_dtype(torch.float32)
