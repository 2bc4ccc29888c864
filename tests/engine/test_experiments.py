"""The experiments T1 to T14 that were run on vLLM's own reload (`shared/peers.md`, section 7).

There: memory that nobody wrote is served, a model is left on meta, an error poisons
every later update. Here: the right weights, or an error with the old ones still served.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import IncompleteUpdate, MisfitTensor, ReloadError, UnknownWeight
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

Weights = dict[str, Tensor]

Q = "model.layers.0.self_attn.q_proj.weight"
V = "model.layers.1.self_attn.v_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture
def b(policies: Policies) -> Weights:
    return policies.tensors("b")


@pytest.fixture(params=["int8", "fp8_vllm", "fp8_channel"])
def live(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    yield serving
    flashquant.reload_weights(serving.llm, policies.tensors("a"))


@pytest.fixture
def fresh(live: Serving, policies: Policies) -> Serving:
    return serve(policies.bf16("b"), live.scheme)


def vllm_reload(live: Serving, weights: Weights | list[tuple[str, Tensor]]) -> None:
    """vLLM's own call."""
    pairs = weights.items() if isinstance(weights, dict) else weights
    live.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(pairs))})


BAD: dict[str, tuple[type[ReloadError], str]] = {
    "T1 only q_proj": (IncompleteUpdate, "qkv_proj"),
    "T2 a wrong shape": (MisfitTensor, "should have"),
    "T4 NaN": (MisfitTensor, "NaN"),
    "T5 all but one v_proj": (IncompleteUpdate, r"layers\.1\.self_attn\.qkv_proj"),
    "T6 twice": (MisfitTensor, "arrived twice"),
    "T8 an unknown name": (UnknownWeight, "no weight 'typo'"),
}


def bad(case: str, b: Weights) -> list[tuple[str, Tensor]]:
    """What the trainer sends in one of these experiments."""
    return list(
        {
            "T1": {Q: b[Q]}.items(),
            "T2": {**b, NORM: torch.zeros(7).bfloat16()}.items(),
            "T4": {**b, V: torch.full_like(b[V], torch.nan)}.items(),
            "T5": [(name, tensor) for name, tensor in b.items() if name != V],
            "T6": [*b.items(), (V, b[V])],
            "T8": {**b, "typo": torch.zeros(1)}.items(),
        }[case.split()[0]]
    )


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_and_the_next_update_goes_through(
    live: Serving, fresh: Serving, b: Weights, case: str
) -> None:
    """T1, T2, T4, T5, T6, T8; and T3: the complete update after each of them."""
    error, says = BAD[case]

    with pytest.raises(error, match=says):
        vllm_reload(live, bad(case, b))
    live.snapshot().assert_same(live.start)
    vllm_reload(live, b)

    live.snapshot().assert_same(fresh.start)


def test_t7_one_staging_buffer_for_every_tensor(live: Serving, fresh: Serving, b: Weights) -> None:
    """The sender overwrites it as soon as it is asked for the next tensor."""
    buffer = torch.empty(max(t.numel() for t in b.values()), dtype=torch.bfloat16)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in b.items():
            buffer.fill_(torch.nan)
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    live.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})

    live.snapshot().assert_same(fresh.start)


def test_t9_chunks_that_end_with_a_module(live: Serving, fresh: Serving, b: Weights) -> None:
    """Each in a call of its own."""
    first = {name: tensor for name, tensor in b.items() if "layers.0" in name}

    vllm_reload(live, first)
    vllm_reload(live, {name: tensor for name, tensor in b.items() if name not in first})

    live.snapshot().assert_same(fresh.start)


def test_t10_chunks_that_end_inside_qkv(live: Serving, b: Weights) -> None:
    """Each in a call of its own that claims to be whole: neither is."""
    first = {Q: b[Q]}

    for chunk in (first, {name: tensor for name, tensor in b.items() if name != Q}):
        with pytest.raises(IncompleteUpdate, match="qkv_proj"):
            vllm_reload(live, chunk)

    live.snapshot().assert_same(live.start)


def test_t11_and_t14_one_tensor_a_call(live: Serving, fresh: Serving, b: Weights) -> None:
    """No bracket at all, as TRL, OpenRLHF and AReaL push."""
    for name, tensor in b.items():
        live.model.load_weights([(name, tensor)])

    live.snapshot().assert_same(fresh.start)


def test_t12_a_bracket_cut_without_an_error(live: Serving, fresh: Serving, b: Weights) -> None:
    """The trainer stops inside qkv, begins anew and sends everything."""
    from vllm.model_executor.model_loader import reload

    reload.initialize_layerwise_reload(live.model)
    live.model.load_weights([(Q, b[Q])])
    reload.initialize_layerwise_reload(live.model)
    live.model.load_weights(b.items())
    reload.finalize_layerwise_reload(live.model, live.llm.llm_engine.model_config)

    live.snapshot().assert_same(fresh.start)


def test_t13_there_is_nothing_to_rescue(live: Serving, b: Weights) -> None:
    """After a failure no tensor is on meta, none has moved, and all are the old ones."""
    before = {name: tensor.data_ptr() for name, tensor in live.tensors().items()}

    with pytest.raises(MisfitTensor):
        vllm_reload(live, bad("T2", b))

    assert {name: tensor.data_ptr() for name, tensor in live.tensors().items()} == before
    assert not any(tensor.is_meta for tensor in live.tensors().values())
    live.snapshot().assert_same(live.start)
