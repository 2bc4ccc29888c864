"""A model with tied embeddings, and trainers that name the shared weight twice.

`state_dict()` holds `lm_head.weight` beside the embeddings: taken where it is the same, refused
where it is not, in whatever order, call and scheme.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashquant
from flashquant.errors import IncompleteUpdate, MisfitTensor
from tests.engine.serving import Serving, choosing, serve
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "tied")


def with_head(source: Path, path: Path) -> Path:
    """The same checkpoint with a head of its own that equals the embeddings."""
    if not path.exists():
        shutil.copytree(source, path)
        save_file(
            {name: t.clone() for name, t in state_dict(tiny_models.tensors(source)).items()},
            path / "model.safetensors",
            metadata={"format": "pt"},
        )
    return path


@pytest.fixture(params=("tied", "a head that is equal"))
def start(request: pytest.FixtureRequest, policies: Policies) -> Path:
    """What the engine starts on: no head, or one that vLLM ties when it has loaded it."""
    a = policies.bf16("a")
    return a if request.param == "tied" else with_head(a, a.parent / "headed-a")


def state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch makes it: the embeddings first, the head last, in the same memory."""
    return {EMBEDDINGS: weights[EMBEDDINGS], **weights, HEAD: weights[EMBEDDINGS]}


def backwards(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(reversed(weights.items()))


def headless(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


def at_once(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights)


def prepared(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights, prepare=True)


def one_by_one(live: Serving, weights: dict[str, Tensor]) -> None:
    for pair in weights.items():
        live.model.load_weights([pair])
    live.session.check_nothing_waits()


DOORS = (at_once, prepared, one_by_one)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", [state_dict, lambda w: backwards(state_dict(w)), headless])
@pytest.mark.parametrize("push", DOORS)
def test_a_state_dict_is_what_its_checkpoint_is(
    policies: Policies, start: Path, scheme: str, order: Callable[[Any], Any], push: Any
) -> None:
    """Twice, there and back: what came before must not stand in the way."""
    live = serve(start, scheme)

    for policy in ("b", "a", "b"):
        push(live, order(policies.tensors(policy)))

        live.snapshot().assert_same(serve(policies.bf16(policy), scheme).start)
    assert not flashquant.status(live.llm).pending


@pytest.mark.parametrize("kernels", ["amx", "portable"])
def test_kernels_that_pack_the_head_away_compare_it_too(policies: Policies, kernels: str) -> None:
    """Where no tensor shows the embeddings, their fingerprint does."""
    with choosing(kernels):
        live = serve(policies.bf16("a"), "int8", kernels)
        b = state_dict(policies.tensors("b"))
        for push in DOORS:
            push(live, state_dict(policies.tensors("a")))
            with pytest.raises(MisfitTensor, match="arrived with different values"):
                push(live, {**b, HEAD: b[HEAD] * 2})
            push(live, b)
            live.snapshot().assert_same(serve(policies.bf16("b"), "int8", kernels).start)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", [dict, backwards])
@pytest.mark.parametrize("push", [at_once, prepared])
def test_another_head_is_refused_and_the_old_weights_are_served(
    policies: Policies, start: Path, scheme: str, order: Callable[[Any], Any], push: Any
) -> None:
    """vLLM would untie them at a start; a live engine holds them once, and says so."""
    live = serve(start, scheme)
    at_once(live, policies.tensors("a"))
    b = state_dict(policies.tensors("b"))

    with pytest.raises(MisfitTensor, match="tie_word_embeddings=false"):
        push(live, order({**b, HEAD: policies.tensors("a")[EMBEDDINGS]}))

    live.snapshot().assert_same(serve(policies.bf16("a"), scheme).start)


@pytest.mark.parametrize("order", [dict, backwards])
def test_another_head_is_refused_where_the_embeddings_came_in_another_call(
    policies: Policies, start: Path, order: Callable[[Any], Any]
) -> None:
    """And the next policy goes through."""
    live = serve(start, "int8")
    at_once(live, policies.tensors("a"))
    b = state_dict(policies.tensors("b"))

    with pytest.raises(MisfitTensor, match="arrived with different values"):
        one_by_one(live, order({**b, HEAD: b[HEAD] * 2}))

    one_by_one(live, order(b))
    live.snapshot().assert_same(serve(policies.bf16("b"), "int8").start)


def test_a_head_alone_is_no_update(policies: Policies) -> None:
    """Whoever leaves the embeddings out would lose it."""
    live = serve(policies.bf16("a"), "int8")
    at_once(live, policies.tensors("a"))
    head = {HEAD: policies.tensors("b")[EMBEDDINGS]}

    with pytest.raises(IncompleteUpdate, match=f"{HEAD} arrived, but {EMBEDDINGS}"):
        flashquant.reload_weights(live.llm, head, strict=False)

    live.model.load_weights(head.items())
    assert flashquant.status(live.llm).pending == {"model.embed_tokens": (HEAD, EMBEDDINGS)}
    live.snapshot().assert_same(serve(policies.bf16("a"), "int8").start)


def test_a_push_that_fails_forgets_the_head_that_it_brought(policies: Policies) -> None:
    """It has not come, so that the embeddings of another policy need not equal it."""
    live = serve(policies.bf16("a"), "int8")
    a, b = policies.tensors("a"), policies.tensors("b")
    at_once(live, a)

    with pytest.raises(MisfitTensor, match="NaN"):
        live.model.load_weights(
            [(HEAD, b[EMBEDDINGS]), ("model.norm.weight", torch.full((256,), torch.nan))]
        )
    one_by_one(live, state_dict(a))

    live.snapshot().assert_same(serve(policies.bf16("a"), "int8").start)


def test_a_head_that_is_not_sent_is_not_missed(
    policies: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that started on a checkpoint with one: strict is content, and the log as well."""
    a = policies.bf16("a")
    live = serve(with_head(a, a.parent / "headed-a"), "int8")

    with caplog.at_level(logging.WARNING, "flashquant"):
        flashquant.reload_weights(live.llm, policies.tensors("b"), strict=True)
        one_by_one(live, policies.tensors("a"))

    assert caplog.messages == []


def test_what_a_loader_leaves_out_may_hold_anything(policies: Policies) -> None:
    """A state_dict has buffers, too: the frequencies of a rotary embedding, with no end to them."""
    live = serve(policies.bf16("a"), "int8")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((32,), torch.inf)}

    report = flashquant.reload_weights(live.llm, policies.tensors("b") | buffer)

    assert report.ignored == tuple(buffer)
    live.snapshot().assert_same(serve(policies.bf16("b"), "int8").start)


def test_a_checkpoint_with_a_head_of_its_own_starts_an_engine_that_takes_one(
    policies: Policies, tmp_path: Path
) -> None:
    """What the refusal of another head advises."""
    for policy in ("a", "b"):
        shutil.copytree(policies.bf16(policy), tmp_path / policy)
        weights = state_dict(policies.tensors(policy))
        save_file(
            {**weights, HEAD: weights[HEAD] * 2},
            tmp_path / policy / "model.safetensors",
            metadata={"format": "pt"},
        )
        config = tmp_path / policy / "config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False})
        )
    live = serve(tmp_path / "a", "int8")

    b = state_dict(policies.tensors("b"))
    flashquant.reload_weights(live.llm, {**b, HEAD: b[HEAD] * 2})

    live.snapshot().assert_same(serve(tmp_path / "b", "int8").start)
