"""The sums in C are those of the definition, wherever the bytes lie and however it is compiled."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.schemes import build
from flashquant.schemes.fingerprints import definition, native, quick

COMPILER = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
pytestmark = pytest.mark.skipif(
    COMPILER is None or not native.wanted(), reason="no C compiler on this machine, or not wanted"
)
KERNEL = native.kernel()


def test_the_kernel_of_this_machine_is_believed():
    assert KERNEL is not None


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 20_000), offset=st.integers(0, 9), seed=st.integers(0, 2**16))
def test_sums_are_those_of_the_definition(size, offset, seed):
    dice = torch.Generator().manual_seed(seed)
    data = torch.empty(size + offset, dtype=torch.uint8).random_(generator=dice)[offset:]

    assert list(KERNEL.sums(data)) == definition.sums(data).tolist()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    data = torch.arange(2_000_003, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert list(KERNEL.sums(data)) == definition.sums(data).tolist()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2")], ids=str)
def test_lanes_of_other_cpus_have_the_same_sums(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, *flags))
    try:
        library = build.built(native.SOURCES)
    except build.BuildError as refusal:
        pytest.skip(f"this compiler knows no such flag: {refusal}")

    assert native.difference(native.Kernel(ctypes.CDLL(str(library)))) is None


def test_a_kernel_that_differs_is_named_and_not_believed(monkeypatch, caplog):
    class OffByOne(native.Kernel):
        def sums(self, tensor):
            first, second = super().sums(tensor)
            return first, second + (tensor.numel() > 4096)

    monkeypatch.setattr(native, "Kernel", OffByOne)
    native.kernel.cache_clear()
    try:
        assert native.kernel() is None
    finally:
        native.kernel.cache_clear()
    assert "the sums of 4097 bytes" in caplog.text


@pytest.mark.parametrize("setting", ["0", "1"])
def test_they_can_be_turned_off_and_stay_the_same(setting, monkeypatch):
    monkeypatch.setenv("FLASHQUANT_NATIVE", setting)
    native.kernel.cache_clear()
    try:
        (found,) = quick.sums([torch.arange(9999.0)])
    finally:
        native.kernel.cache_clear()

    assert list(found) == definition.sums(torch.arange(9999.0)).tolist()


def test_it_is_believed_whatever_torchs_defaults_are():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert native.difference(KERNEL) is None
    finally:
        torch.set_default_dtype(before)
