"""One manifest of an engine, out of those of its workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import flashquant
from flashquant.errors import ReloadError
from flashquant.sender import Manifest, TensorSpec

W, V = (TensorSpec(shape=(4, 4), dtype=dtype) for dtype in ("int8", "bfloat16"))
A, B = "a" * 32, "b" * 32


def engine(*manifests):
    """An LLM whose workers answer so."""
    answers = [{"answer": one.model_dump(mode="json")} for one in manifests]
    return SimpleNamespace(collective_rpc=lambda method: answers, llm_engine=SimpleNamespace())


def manifest(tensors, digest=A, scheme="int8"):
    return Manifest(scheme=scheme, version=3, digest=digest, tensors=tensors)


@pytest.mark.parametrize(("digests", "whole"), [((A,), A), ((A, A), A), ((A, B), None)])
def test_workers_that_want_the_same_are_one_and_so_is_their_policy(digests, whole):
    found = flashquant.manifest(engine(*(manifest({"w": W}, digest) for digest in digests)))

    assert found == manifest({"w": W}, whole)


def test_the_stages_of_a_pipeline_want_their_own():
    found = flashquant.manifest(engine(manifest({"w": W}), manifest({"v": V})))

    assert found.tensors == {"w": W, "v": V}


@pytest.mark.parametrize(
    "other", [manifest({"w": V}), manifest({"w": W}, scheme="bf16"), manifest({"v": V, "w": V})]
)
def test_replicas_that_want_different_tensors_are_refused(other):
    with pytest.raises(ReloadError, match="replicas of this engine want different tensors"):
        flashquant.manifest(engine(manifest({"w": W}), other))


def test_what_a_worker_refuses_is_said():
    failing = SimpleNamespace(
        collective_rpc=lambda method: [{"error": "ReloadError", "says": "no names yet"}],
        llm_engine=SimpleNamespace(),
    )

    with pytest.raises(ReloadError, match="no names yet"):
        flashquant.manifest(failing)
