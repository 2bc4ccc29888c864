"""The whole table of points on the installed vLLM."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import vllm

import flashquant
from flashquant import patches
from flashquant.errors import ConfigError, PatchError, UnsupportedEngine
from flashquant.patches.point import PatchPoint


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Each test begins unpatched; engines of other test files are patched again for them."""
    was_patched = flashquant.is_patched()
    flashquant.unpatch()
    yield
    flashquant.unpatch()
    if was_patched:
        flashquant.patch()


def _namespaces() -> dict[str, dict[str, Any]]:
    """Everything in every module and class that a point touches."""
    found = {}
    for point in patches.POINTS:  # a submodule is a name in its package once it is imported
        importlib.import_module(point.target.partition(":")[0])
    for point in patches.POINTS:
        module, _, path = point.target.partition(":")
        owner: Any = importlib.import_module(module)
        found[module] = dict(vars(owner))
        for part in path.split(".")[:-1]:
            owner = getattr(owner, part)
            found[f"{module}:{part}"] = dict(vars(owner))
    return found


def test_unpatch_leaves_every_touched_namespace_exactly_as_found() -> None:
    """Same keys, same objects."""
    before = _namespaces()

    flashquant.patch()
    during = _namespaces()
    flashquant.unpatch()

    assert during != before
    assert _namespaces() == before


def test_transfer_engines_are_in_vllms_registries_while_patched() -> None:
    """By name, so that the server's --weight-transfer-config can choose one."""
    from vllm.distributed.weight_transfer import factory

    trainers = getattr(factory, "WeightTransferTrainerFactory", None)  # since 0.26
    expected = {factory.WeightTransferEngineFactory: {"flashquant_file", "flashquant_gloo"}}
    expected |= {trainers: {"flashquant_gloo"}} if trainers else {}
    registries = [made._registry for made in expected]
    before = [dict(registry) for registry in registries]

    flashquant.patch()
    added = [r.keys() - kept.keys() for r, kept in zip(registries, before, strict=True)]
    flashquant.unpatch()

    assert added == list(expected.values())
    assert [dict(registry) for registry in registries] == before


def test_patching_twice_is_patching_once() -> None:
    """The second call finds everything in place, and one unpatch takes all of it out."""
    before = _namespaces()

    flashquant.patch()
    flashquant.patch()
    assert flashquant.is_patched()
    flashquant.unpatch()

    assert not flashquant.is_patched()
    assert _namespaces() == before


def test_an_untested_vllm_is_refused_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names the version found, the versions tested, and the way out."""
    before = _namespaces()
    monkeypatch.setattr(vllm, "__version__", "0.10.2")

    with pytest.raises(UnsupportedEngine, match=r"vllm 0\.10\.2 .* unset FLASHRL_CONFIG"):
        flashquant.patch()

    assert not flashquant.is_patched()
    assert _namespaces() == before


def test_one_point_that_does_not_fit_takes_the_others_back_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All points or none."""
    before = _namespaces()
    odd = PatchPoint("vllm.v1.worker.gpu_worker:Worker.load_model", ("self", "nonsense"), print)
    monkeypatch.setattr(patches, "POINTS", (*patches.POINTS, odd))

    with pytest.raises(PatchError, match="written against"):
        flashquant.patch()

    monkeypatch.undo()
    assert _namespaces() == before


def test_a_seam_of_another_version_that_is_there_stops_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What nobody has looked at in this version would not be wrapped."""
    before = _namespaces()
    newer = PatchPoint(
        "vllm.v1.worker.gpu_worker:Worker.load_model", ("self", ...), print, within=">=99"
    )
    monkeypatch.setattr(patches, "ELSEWHERE", (*patches.ELSEWHERE, newer))

    with pytest.raises(PatchError, match=r"Worker\.load_model is there"):
        flashquant.patch()

    assert not flashquant.is_patched()
    assert _namespaces() == before


def test_every_point_is_of_this_version_or_of_another() -> None:
    """Those of the same function in several places are told apart by their versions."""
    targets = [point.target for point in (*patches.POINTS, *patches.ELSEWHERE)]

    assert len(targets) == len(set(targets))
    assert all(point.is_in(vllm.__version__) for point in patches.POINTS)
    assert not any(point.is_in(vllm.__version__) for point in patches.ELSEWHERE)


def test_a_misspelt_scheme_stops_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the nearest name offered, and nothing patched."""
    monkeypatch.setenv("FLASHRL_CONFIG", "fp8_chanel")

    with pytest.raises(ConfigError, match="fp8_channel"):
        flashquant.patch_from_env()

    assert not flashquant.is_patched()
