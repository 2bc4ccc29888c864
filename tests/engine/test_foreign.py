"""What somebody wrote past every door stays reported until it was pushed, whatever else is pushed.

And vLLM's own weight checker, which zeroes a model to see whether an update comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import MisfitTensor, TornWeights
from tests.engine.serving import Serving, needs, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

SCHEMES = ("bf16", "int8", "fp8_vllm", "fp8_channel")
NORM, OTHER = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"
RESET = needs(">=0.32", "reset_weights")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=SCHEMES)
def live(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    yield serving
    flashquant.reload_weights(serving.llm, policies.tensors("a"))


def one_tensor(live: Serving, a: dict[str, Tensor]) -> None:
    live.model.load_weights([(OTHER, a[OTHER])])


def one_tensor_in_a_bracket(live: Serving, a: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, {OTHER: a[OTHER]}, strict=False)


def one_that_fails(live: Serving, a: dict[str, Tensor]) -> None:
    with pytest.raises(MisfitTensor, match="NaN"):
        live.model.load_weights([(NORM, a[NORM] * torch.nan)])


def a_bracket_that_fails(live: Serving, a: dict[str, Tensor]) -> None:
    last = dict(reversed(a.items())) | {OTHER: a[OTHER] * torch.nan}
    with pytest.raises(MisfitTensor, match="NaN"):
        flashquant.reload_weights(live.llm, last)


PUSHES = (one_tensor, one_tensor_in_a_bracket, one_that_fails, a_bracket_that_fails)


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("write", ["in place", "data"])
def test_no_push_of_something_else_makes_it_forgotten(
    live: Serving, policies: Policies, push: Callable[..., Any], write: str
) -> None:
    a = policies.tensors("a")
    norm = dict(live.model.named_parameters())[NORM]
    with torch.no_grad():
        (norm if write == "in place" else norm.data).mul_(3)

    push(live, a)

    assert flashquant.status(live.llm).foreign == (NORM,)
    live.model.load_weights([(NORM, a[NORM])])
    assert flashquant.status(live.llm).foreign == ()
    live.snapshot().assert_same(serve(policies.bf16("a"), live.scheme).start)


def test_a_bias_does_not_answer_for_the_weight_beside_it(live: Serving, policies: Policies) -> None:
    """They are one layer, and only one of the two was pushed."""
    a = policies.tensors("a")
    scope = "model.layers.0.self_attn."
    weight = dict(live.model.named_parameters()).get(f"{scope}qkv_proj.weight")
    if weight is None or weight.numel() == 0:
        pytest.skip("this kernel keeps the weight where nobody can write it")
    before = flashquant.status(live.llm)
    weight.data.as_strided((64,), (1,)).view(torch.uint8)[:64] ^= 1  # wherever a kernel has it
    if flashquant.status(live.llm).digest == before.digest:
        pytest.skip("nothing reads this parameter")

    live.model.load_weights([(n, a[n]) for p in "qkv" for n in [f"{scope}{p}_proj.bias"]])

    assert flashquant.status(live.llm).foreign
    flashquant.reload_weights(live.llm, a)
    assert flashquant.status(live.llm).foreign == ()


@pytest.mark.parametrize("write", ["in place", "data"])
def test_a_bracket_that_failed_and_was_never_closed_hides_no_write(
    live: Serving, policies: Policies, write: str
) -> None:
    """Its trainer is gone, or has swallowed the refusal: the old weights are what is live."""
    a = policies.tensors("a")
    live.session.begin()
    with pytest.raises(MisfitTensor, match="NaN"):
        live.session.push([(OTHER, a[OTHER] * torch.nan)])

    norm = dict(live.model.named_parameters())[NORM]
    with torch.no_grad():
        (norm if write == "in place" else norm.data).mul_(3)

    assert flashquant.status(live.llm).foreign == (NORM,)


@RESET
def test_a_reset_model_generates_when_all_of_it_was_pushed(
    live: Serving, policies: Policies
) -> None:
    """Zeros are nobody's policy: not served, and not what a failing push puts back."""
    a = policies.tensors("a")
    live.llm.collective_rpc("reset_weights")
    assert flashquant.status(live.llm).torn
    with pytest.raises(TornWeights, match="reset_weights"):
        live.session.check_servable()

    one_tensor(live, a)
    assert flashquant.status(live.llm).torn
    a_bracket_that_fails(live, a)
    assert flashquant.status(live.llm).torn

    flashquant.reload_weights(live.llm, a)
    assert not flashquant.status(live.llm).torn
    live.snapshot().assert_same(serve(policies.bf16("a"), live.scheme).start)


@RESET
def test_the_weight_checker_finds_what_it_noted(live: Serving, policies: Policies) -> None:
    """Checksum, reset, push, compare: vLLM's own recipe."""
    (noted,) = live.llm.collective_rpc("compute_weight_checksums")
    live.llm.collective_rpc("reset_weights")
    assert live.llm.collective_rpc("compute_weight_checksums") != [noted]

    flashquant.reload_weights(live.llm, policies.tensors("a"))

    assert live.llm.collective_rpc("compute_weight_checksums") == [noted]
