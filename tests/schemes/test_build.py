"""The library is built once, for this CPU, where nobody else can put another."""

from __future__ import annotations

import ctypes

import pytest

from flashquant.schemes import build, native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHQUANT_CACHE", str(folder))
    return folder


def test_it_is_built_once(cache):
    first = build.built()
    when = first.stat().st_mtime_ns

    assert build.built() == first
    assert first.stat().st_mtime_ns == when
    assert first.parent == cache
    assert list(cache.iterdir()) == [first], "nothing is left behind"
    assert ctypes.CDLL(str(first)).int8_channel_bf16


def test_the_folder_is_closed_to_others(cache):
    assert build.built().parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_others_can_write_into_is_not_used(cache):
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)

    assert build.built().parent != cache
    assert not any(cache.iterdir())


def test_another_cpu_another_library(cache, monkeypatch):
    first = build.built()
    monkeypatch.setattr(build, "_cpu", lambda: "another one")

    assert build.built() != first


def test_without_a_compiler_it_says_what_to_install(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(build.BuildError, match="install gcc"):
        build.built()


def test_a_compiler_that_fails_leaves_the_work_to_torch(cache, monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    native.kernels.cache_clear()
    try:
        assert native.kernels() is None
    finally:
        native.kernels.cache_clear()
    assert not any(cache.iterdir())


def test_without_avx512_the_bits_are_the_same(cache, monkeypatch):
    """As it is built for other CPUs: one element at a time, vectorized by the compiler."""
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-mno-avx512f"))
    try:
        library = build.built()
    except build.BuildError as refusal:
        pytest.skip(f"this compiler knows no such flag: {refusal}")

    assert native.difference(native.Kernels(ctypes.CDLL(str(library)))) is None
