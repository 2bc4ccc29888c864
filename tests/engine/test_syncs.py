"""Syncs of trainers that open no bracket, one after the other: never a mixture that nobody names.

What one leaves half done, because a tensor was refused or it died, is nothing to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import IncompleteUpdate, ReloadError
from flashquant.patches.layers import InPlaceLayer
from tests.engine.serving import INT8_EXPERTS, Serving, choosing, serve
from tools.models import tiny_models
from tools.models.policies import FP8, SCHEMES, W8A8, Policies, config_name

pytestmark = pytest.mark.engine

Q, K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
QKV = "model.layers.0.self_attn.qkv_proj"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen3")


@pytest.fixture
def live(scheme: str, policies: Policies) -> Iterator[Serving]:
    """An engine that serves policy A, whole, and has learned nothing of trainers."""
    serving = serve(policies.served("a", scheme), config_name(scheme))
    yield serving
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    serving.session.check_nothing_waits()


def sync(live: Serving, weights: dict[str, Tensor]) -> None:
    """One tensor a call, in the order of the file; a refused one is logged, and it goes on."""
    for name in sorted(weights):
        with suppress(ReloadError):
            live.model.load_weights([(name, weights[name])])


def third(policies: Policies) -> dict[str, Tensor]:
    """A policy that is neither A nor B."""
    return {name: tensor * 1.25 for name, tensor in policies.tensors("b").items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_a_layer_that_a_refused_tensor_left_is_nothing_to_the_next_sync(
    live: Serving, policies: Policies, scheme: str
) -> None:
    """AReaL logs that a tensor was refused, and goes on with the next one."""
    a, b, c = policies.tensors("a"), policies.tensors("b"), third(policies)
    fresh = serve(policies.served("b", scheme), config_name(scheme)).start
    sync(live, {**c, K: c[K] * torch.nan})
    assert K in flashquant.status(live.llm).refused

    sync(live, b)

    live.snapshot().assert_same(fresh)
    sync(live, a)
    sync(live, b)
    live.snapshot().assert_same(fresh)
    assert flashquant.status(live.llm).refused == ()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_a_layer_that_a_dead_trainer_left_is_nothing_to_the_next_sync(
    live: Serving, policies: Policies, scheme: str
) -> None:
    """It sent its tensors in an order of its own, and nothing that the next one begins with."""
    a, b, c = policies.tensors("a"), policies.tensors("b"), third(policies)
    for weights in (b, a, b):
        sync(live, weights)
    flashquant.reload_weights(live.llm, a)
    live.model.load_weights([(Q, c[Q]), (V, c[V])])

    sync(live, b)

    live.snapshot().assert_same(serve(policies.served("b", scheme), config_name(scheme)).start)
    assert flashquant.status(live.llm).pending == {}


@pytest.mark.parametrize("scheme", ["int8", "fp8_channel"])
def test_what_cannot_be_told_apart_is_named(live: Serving, policies: Policies) -> None:
    """Nothing is known of how the trainer begins: its k meets a stranger's q and v."""
    b, c = policies.tensors("b"), third(policies)
    live.model.load_weights([(Q, c[Q]), (V, c[V])])

    sync(live, b)

    assert QKV in flashquant.status(live.llm).pending
    sync(live, b)
    assert flashquant.status(live.llm).pending == {}


CODES = [(W8A8, "native"), (W8A8, "amx"), (W8A8, "portable"), (FP8, "native")]


@pytest.mark.parametrize(("scheme", "kernels"), CODES)
@pytest.mark.parametrize("first", ["codes", "scales"])
def test_codes_and_scales_go_live_together(
    policies: Policies, scheme: str, kernels: str, first: str
) -> None:
    """Whatever a kernel leaves alone: those for AMX read scales as they come."""
    with choosing(kernels):
        live = serve(policies.served("a", scheme), config_name(scheme), kernels)
        a, b = (tiny_models.tensors(policies.served(policy, scheme)) for policy in "ab")
        before = flashquant.reload_weights(live.llm, a).digest
        names = [DOWN, f"{DOWN}_scale"][:: 1 if first == "codes" else -1]

        live.model.load_weights([(names[0], b[names[0]])])

        assert flashquant.status(live.llm).digest == before
        assert flashquant.status(live.llm).pending
        live.model.load_weights([(names[1], b[names[1]])])
        assert flashquant.status(live.llm).pending == {}
        mixed = flashquant.status(live.llm).digest
        report = flashquant.reload_weights(live.llm, {**a, **{name: b[name] for name in names}})
        assert report.digest == mixed != before


@INT8_EXPERTS
@pytest.mark.parametrize("first", ["codes", "scales"])
def test_codes_and_scales_of_experts_go_live_together(
    tmp_path_factory: pytest.TempPathFactory, first: str
) -> None:
    moe = Policies(tmp_path_factory.mktemp("moe"), "qwen3-moe")
    with choosing("amx"):
        live = serve(moe.served("a", W8A8), "int8", "amx")
        a, b = (tiny_models.tensors(moe.served(policy, W8A8)) for policy in "ab")
        before = flashquant.reload_weights(live.llm, a).digest
        experts = {name: t for name, t in b.items() if ".layers.0.mlp.experts." in name}
        some = [n for n in experts if n.endswith("_scale") == (first == "scales")]

        for name in some:
            live.model.load_weights([(name, experts.pop(name))])

        assert flashquant.status(live.llm).digest == before
        assert flashquant.status(live.llm).pending
        live.model.load_weights(list(experts.items()))
        assert flashquant.status(live.llm).pending == {}
        assert flashquant.status(live.llm).digest != before


@pytest.mark.parametrize("kernels", ["amx", "portable"])
@pytest.mark.parametrize("kind", [torch.int8, torch.float32], ids=["codes", "scales"])
def test_a_bracket_of_codes_or_scales_alone_is_refused(
    policies: Policies, kernels: str, kind: torch.dtype
) -> None:
    with choosing(kernels):
        live = serve(policies.served("a", W8A8), "int8", kernels)
        a, b = (tiny_models.tensors(policies.served(policy, W8A8)) for policy in "ab")
        before = flashquant.reload_weights(live.llm, a).digest

        some = {name: tensor for name, tensor in b.items() if tensor.dtype == kind}

        with pytest.raises(IncompleteUpdate, match="half arrived"):
            flashquant.reload_weights(live.llm, some, strict=False)

        assert flashquant.status(live.llm).digest == before


@pytest.fixture
def trained(policies: Policies) -> dict[str, Tensor]:
    """Of policy B: q and v of every layer, as a trainer of adapters merges them."""
    return {
        name: tensor
        for name, tensor in policies.tensors("b").items()
        if "q_proj" in name or "v_proj" in name
    }


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("scheme", ["fp8_channel"])
def test_the_rest_of_a_layer_stays_where_its_rows_lie_in_live_memory(
    live: Serving, policies: Policies, trained: dict[str, Tensor], prepare: bool
) -> None:
    report = flashquant.reload_weights(live.llm, trained, strict=False, prepare=prepare)

    whole = flashquant.reload_weights(live.llm, {**policies.tensors("a"), **trained})
    assert report.digest == whole.digest
    assert f"{QKV}.weight" in report.kept
    assert whole.kept == ()


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_vllm"])
def test_the_rest_of_a_layer_that_cannot_be_kept_is_refused_by_name(
    live: Serving, trained: dict[str, Tensor], prepare: bool
) -> None:
    before = flashquant.status(live.llm).digest
    (layer,) = (one for one in live.session._engine.layers if one.name == QKV)
    if isinstance(layer, InPlaceLayer):
        pytest.skip("without AMX or AVX512-BF16, vLLM packs no linear in bf16")

    with pytest.raises(IncompleteUpdate, match=f"{QKV}.*cannot be kept"):
        flashquant.reload_weights(live.llm, trained, strict=False, prepare=prepare)

    assert flashquant.status(live.llm).digest == before


@pytest.mark.parametrize("scheme", ["fp8_channel"])
def test_a_layer_that_always_waits_is_warned_of_with_the_way_out(
    live: Serving, trained: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        sync(live, trained)

    assert caplog.text.count("strict=False") == 1
    assert QKV in flashquant.status(live.llm).pending


@pytest.mark.parametrize("mark", ["_orig_mod.", "module.", "base_model.model."])
@pytest.mark.parametrize("scheme", ["int8", "fp8_channel"])
def test_names_with_the_marks_of_wrappers_equal_a_fresh_start(
    live: Serving, policies: Policies, scheme: str, mark: str
) -> None:
    fresh = serve(policies.bf16("b"), scheme).start

    sync(live, {mark + name: tensor for name, tensor in policies.tensors("b").items()})

    live.snapshot().assert_same(fresh)


@pytest.mark.parametrize("scheme", ["int8"])
def test_a_sync_of_which_some_names_match_is_named(live: Serving, policies: Policies) -> None:
    b = policies.tensors("b")

    sync(live, {f"actor.{name}" if "k_proj" in name else name: t for name, t in b.items()})

    status = flashquant.status(live.llm)
    assert QKV in status.pending
    assert f"actor.{K}" in status.refused
    assert status.refusal is not None
    assert "UnknownWeight" in status.refusal.what
