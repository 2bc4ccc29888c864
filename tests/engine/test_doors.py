"""Every call by which a stack pushes weights leaves what a fresh start would.

Each door is a sequence of calls as the stack makes them (`shared/peers.md`, section 4),
on the model or the worker it makes them on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import IncompleteUpdate, MisfitTensor, ReloadError
from tests.engine.serving import Serving, serve
from tools.models import tiny_models
from tools.models.policies import FP8, STORED, W8A8, Policies, config_name

pytestmark = pytest.mark.engine

Weights = dict[str, Tensor]


def one_tensor_a_call(live: Serving, weights: Weights) -> None:
    """TRL colocate, OpenRLHF, AReaL."""
    for name, tensor in weights.items():
        runner = live.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(weights=[(name, tensor)])


def buckets_then_processing(live: Serving, weights: Weights) -> None:
    """verl, NeMo-RL, checkpoint-engine: views of a buffer that is used again, then processing."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    worker = live.llm.llm_engine.model_executor.driver_worker
    buffer = torch.empty(max(t.nbytes for t in weights.values()), dtype=torch.uint8)
    for name, tensor in weights.items():
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        live.model.load_weights([(name, view)])
        buffer.fill_(0xFF)  # NaN, in every float there is
    process_weights_after_loading(live.model, worker.model_runner.model_config, torch.device("cpu"))


def layerwise_bracket(live: Serving, weights: Weights) -> None:
    """SkyRL, prime-rl: begin, chunks, end, with the functions of vLLM's package."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(live.model)
    pairs = list(weights.items())
    for first in range(0, len(pairs), 5):
        live.model.load_weights(weights=iter(pairs[first : first + 5]))
    finalize_layerwise_reload(live.model, live.llm.llm_engine.model_config)


def reload_by_iterator(live: Serving, weights: Weights) -> None:
    """vLLM's own."""
    live.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})


def from_disk_by_its_loader(live: Serving, weights: Weights) -> None:
    """AReaL's update from disk: vLLM's model loader, on the live model."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    config = live.llm.llm_engine.vllm_config
    with set_current_vllm_config(config):  # vLLM's loader asks for it
        get_model_loader(config.load_config).load_weights(
            live.model, model_config=config.model_config
        )


DOORS = [one_tensor_a_call, buckets_then_processing, layerwise_bracket, reload_by_iterator]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=["int8", "fp8_vllm"])
def live(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    yield serving
    flashquant.reload_weights(serving.llm, policies.tensors("a"))


@pytest.mark.parametrize("push", DOORS, ids=lambda door: door.__name__)
def test_what_arrives_by_a_door_equals_a_fresh_start(
    live: Serving, policies: Policies, push: Callable[[Serving, Weights], None]
) -> None:
    """Every tensor, every token and every log-prob, bit for bit; and back again."""
    fresh = serve(policies.bf16("b"), live.scheme)

    push(live, policies.tensors("b"))
    live.snapshot().assert_same(fresh.start)
    push(live, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_shards_may_come_in_inference_mode_and_outside_of_it(
    live: Serving, policies: Policies, first: bool
) -> None:
    """A worker's own method has `torch.inference_mode` around it, and another has not."""
    pairs = list(policies.tensors("b").items())
    for half, inference in (pairs[::2], first), (pairs[1::2], not first):
        with torch.inference_mode(mode=inference):
            for pair in half:
                live.model.load_weights([pair])
    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


@pytest.mark.parametrize("scheme", STORED)
@pytest.mark.parametrize("push", DOORS, ids=lambda door: door.__name__)
def test_codes_and_scales_pass_through_every_door(
    policies: Policies, scheme: str, push: Callable[[Serving, Weights], None]
) -> None:
    """A stack that quantizes by itself (verl, prime-rl, a W8A8 checkpoint): never done twice."""
    live = serve(policies.served("a", scheme), config_name(scheme))
    fresh = serve(policies.served("b", scheme), config_name(scheme))
    a, b = (tiny_models.tensors(policies.served(policy, scheme)) for policy in "ab")

    push(live, b)
    live.snapshot().assert_same(fresh.start)
    push(live, a)
    live.snapshot().assert_same(live.start)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda codes: codes.view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn), "NaN"),
        (lambda codes: codes.view(torch.int8), "is torch.int8, but the engine stores torch.float8"),
        (lambda codes: codes[:-1], "has shape"),
    ],
)
def test_codes_are_checked_like_the_rest(
    policies: Policies, spoil: Callable[[Tensor], Tensor], says: str
) -> None:
    live = serve(policies.served("a", FP8), config_name(FP8))
    name = "model.layers.1.mlp.down_proj.weight"
    codes = tiny_models.tensors(policies.served("b", FP8))
    scales = torch.full_like(codes[f"{name}_scale"], torch.inf)

    with pytest.raises(MisfitTensor, match=says):
        live.model.load_weights([(name, spoil(codes[name].clone()))])
    with pytest.raises(MisfitTensor, match="NaN or infinite"):
        live.model.load_weights([(name, codes[name]), (f"{name}_scale", scales)])

    live.snapshot().assert_same(live.start)


def test_codes_wait_for_their_scales(policies: Policies) -> None:
    """Which of the two comes first does not matter."""
    live = serve(policies.served("a", W8A8), config_name(W8A8))
    name = "model.layers.1.mlp.down_proj.weight"
    weights = tiny_models.tensors(policies.served("b", W8A8))
    sent = [(name, weights.pop(name)), (f"{name}_scale", weights.pop(f"{name}_scale"))]
    flashquant.reload_weights(live.llm, weights, strict=False)

    for first, second in (sent, sent[::-1]):
        before = flashquant.status(live.llm).digest
        live.model.load_weights([first])
        assert flashquant.status(live.llm).digest == before
        live.model.load_weights([second])

    live.snapshot().assert_same(serve(policies.served("b", W8A8), config_name(W8A8)).start)
    flashquant.reload_weights(live.llm, tiny_models.tensors(policies.served("a", W8A8)))


def test_what_a_loader_keeps_for_a_later_tensor_is_refused_by_name(
    live: Serving, policies: Policies
) -> None:
    """As that of DeepSeek-V3.2 keeps codes until their scales come; nothing else is touched."""
    name, kept = "model.layers.1.mlp.down_proj.codes", list[Any]()
    weights = policies.tensors("b")
    codes = weights["model.layers.1.mlp.down_proj.weight"].to(torch.float8_e4m3fn)

    with (
        mock.patch.object(live.model.model, "load_weights", lambda weights: kept.extend(weights)),
        pytest.raises(ReloadError, match=rf"takes '{name}' together with another .* kept it"),
    ):
        flashquant.reload_weights(live.llm, {**weights, name: codes})

    live.snapshot().assert_same(live.start)


def test_an_update_from_disk_by_vllms_loader_equals_a_fresh_start(
    live: Serving, policies: Policies
) -> None:
    """The path is the one the engine was started on: policy A comes back."""
    flashquant.reload_weights(live.llm, policies.tensors("b"))

    from_disk_by_its_loader(live, {})

    live.snapshot().assert_same(live.start)


def test_processing_a_live_model_again_changes_nothing(live: Serving) -> None:
    """However often it is called."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    for _ in range(3):
        process_weights_after_loading(
            live.model, live.llm.llm_engine.model_config, torch.device("cpu")
        )

    live.snapshot().assert_same(live.start)


def test_processing_with_half_a_layer_says_what_is_missing(
    live: Serving, policies: Policies
) -> None:
    """The stack says that all has been sent; the rest of the layer makes it true."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    weights = policies.tensors("b")
    v = "model.layers.1.self_attn.v_proj.weight"
    config = live.llm.llm_engine.model_config
    for name, tensor in weights.items():
        if name != v:
            live.model.load_weights([(name, tensor)])

    with pytest.raises(IncompleteUpdate, match=r"layers\.1\.self_attn\.qkv_proj"):
        process_weights_after_loading(live.model, config, torch.device("cpu"))
    live.model.load_weights([(v, weights[v])])
    process_weights_after_loading(live.model, config, torch.device("cpu"))

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


def test_processing_after_a_refused_bucket_says_what_never_came(
    live: Serving, policies: Policies
) -> None:
    """checkpoint-engine's server does not look at the answer to its last bucket."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    weights = policies.tensors("b")
    last = ["model.layers.1.input_layernorm.weight", "model.norm.weight"]
    bad = [(name, weights[name] * torch.nan) for name in last]
    config = live.llm.llm_engine.model_config
    live.model.load_weights([pair for pair in weights.items() if pair[0] not in last])
    with pytest.raises(MisfitTensor, match="NaN"):
        live.model.load_weights(bad)

    with pytest.raises(IncompleteUpdate, match=r"2 tensors .* model\.norm\.weight"):
        process_weights_after_loading(live.model, config, torch.device("cpu"))
    with pytest.raises(MisfitTensor, match="NaN"):
        live.model.load_weights(bad)
    live.model.load_weights([(name, weights[name]) for name in last])
    process_weights_after_loading(live.model, config, torch.device("cpu"))

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


@pytest.mark.parametrize("push", [layerwise_bracket, reload_by_iterator], ids=lambda d: d.__name__)
def test_a_bracket_of_vllm_that_fails_leaves_the_old_weights(
    live: Serving, policies: Policies, push: Callable[[Serving, Weights], None]
) -> None:
    """And the next one goes through."""
    weights = policies.tensors("b")
    bad = {**weights, "model.norm.weight": torch.full((256,), torch.nan)}

    with pytest.raises(MisfitTensor, match="NaN"):
        push(live, bad)
    live.snapshot().assert_same(live.start)
    push(live, weights)

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


def test_a_bracket_that_was_cut_without_an_error_can_be_begun_again(
    live: Serving, policies: Policies
) -> None:
    """The trainer stops inside qkv, comes back, and sends everything (T12)."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(live.model)
    live.model.load_weights(list(policies.tensors("b").items())[:7])

    layerwise_bracket(live, policies.tensors("b"))

    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


def test_a_load_weights_call_answers_with_the_engines_names(
    live: Serving, policies: Policies
) -> None:
    """As vLLM's does: callers compare them with the parameters they expect."""
    q, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    weights = policies.tensors("a")

    names: Any = live.model.load_weights([(q, weights[q]), (norm, weights[norm])])

    assert norm in names
    assert "model.layers.0.self_attn.qkv_proj.weight" in names


def test_finishing_what_never_began_is_an_error(live: Serving) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with pytest.raises(ReloadError, match="no update is under way"):
        finalize_layerwise_reload(live.model, live.llm.llm_engine.model_config)
