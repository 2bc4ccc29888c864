"""Mixtures of experts: quantized as they come, expert by expert or stacked, and exact.

One engine is pushed to, another was started where it should arrive. The schemes are those
that vLLM's CPU kernels have for experts; the others are refused by the layer's name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

import flashquant
from flashquant.errors import IncompleteUpdate, MisfitTensor, UnsupportedEngine
from flashquant.sender import Sender
from tests.engine import faults
from tests.engine.serving import Serving, choosing, needs, serve
from tests.engine.test_faults import Target, reload_failing
from tests.engine.test_reload_equals_restart import WAYS, Push
from tests.support.gpu import HAS_GPU
from tools.models.policies import W8A8, Policies, config_name

pytestmark = pytest.mark.engine

# What each family calls its experts, and what those of a layer are called when they are stacked.
STACKED = {
    "gate_up_proj": (r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj)\.weight", "gate_proj"),
    "down_proj": (r"(.*\.experts)\.(\d+)\.(down_proj)\.weight", "down_proj"),
    "w13": (r"(.*\.experts)\.(\d+)\.(w1|w3)\.weight", "w1"),
    "w2": (r"(.*\.experts)\.(\d+)\.(w2)\.weight", "w2"),
}


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as transformers 5 trains them: `[E, N, K]`, gate above up."""
    loose: dict[str, list[list[Tensor]]] = defaultdict(list)
    for name, tensor in sorted(weights.items(), key=lambda item: _numbers(item[0])):
        for together, (pattern, first) in STACKED.items():
            if found := re.fullmatch(pattern, name):
                experts = loose[f"{found[1]}.{together}"]
                experts += [[]] if found[3] == first else []
                experts[-1].append(tensor)
                break
        else:
            loose[name] = [[tensor]]
    return {
        name: torch.stack([torch.cat(parts) for parts in experts])
        if ".experts." in name and len(experts) > 1
        else experts[0][0]
        for name, experts in loose.items()
    }


def _numbers(name: str) -> list[tuple[int, str]]:
    """Sort experts by number, and the gate of each before its up projection."""
    return [(int(part) if part.isdecimal() else -1, part) for part in name.split(".")]


LOADS_STACKED_SCALES = Version(vllm.__version__) >= Version("0.28")


def stacked_experts(model: nn.Module, weights: dict[str, Tensor]) -> None:
    together = stacked(weights)
    assert sum(tensor.dim() == 3 for tensor in together.values()) == 4
    for pair in together.items():
        model.load_weights([pair])


CASES = [
    ("qwen3-moe", "bf16", "portable"),
    ("qwen3-moe", "int8", "amx"),
    ("qwen3-moe", W8A8, "amx"),
    ("qwen3-moe", "fp8_block", "amx"),
    ("qwen3-moe-narrow", "fp8_block", "amx"),  # padded to whole blocks, which nobody sends
    ("qwen2-moe", "int8", "amx"),
    ("mixtral", "int8", "amx"),
    ("granite-moe", "int8", "amx"),  # its loader knows its experts' names, and not their scales'
    ("gpt-oss", "bf16", "portable"),  # stacked and transposed in the checkpoint already
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Policies]:
    folder = tmp_path_factory.mktemp("policies")
    return lambda kind: Policies(folder, kind)


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(
    request: pytest.FixtureRequest, policies: Callable[[str], Policies]
) -> Iterator[tuple[Serving, Serving, Policies]]:
    """An engine that serves A, one that was started on B, and both policies."""
    kind, scheme, kernels = request.param
    with choosing(kernels):
        live, fresh = (
            serve(policies(kind).served(policy, scheme), config_name(scheme), kernels)
            for policy in "ab"
        )
        yield live, fresh, policies(kind)


def test_experts_take_what_changed(case: tuple[Serving, Serving, Policies]) -> None:
    """As codes where the engine takes those of experts, else as floats."""
    live, _, policies = case
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    flashquant.apply_delta(live.llm, sender.bundle(policies.tensors("a")))

    report = flashquant.apply_delta(live.llm, sender.bundle(policies.tensors("b")))

    assert report.digest == flashquant.reload_weights(live.llm, policies.tensors("b")).digest
    flashquant.reload_weights(live.llm, policies.tensors("a"))


@pytest.fixture
def int8(policies: Callable[[str], Policies]) -> Iterator[tuple[Serving, Serving, Policies]]:
    with choosing("amx"):
        mine = policies("qwen3-moe")
        live, fresh = (serve(mine.bf16(policy), "int8", "amx") for policy in "ab")
        flashquant.reload_weights(live.llm, mine.tensors("a"))
        yield live, fresh, mine


@pytest.mark.parametrize("push", [*WAYS, stacked_experts], ids=lambda way: way.__name__)
def test_pushed_experts_equal_a_start_on_them(
    case: tuple[Serving, Serving, Policies], push: Push
) -> None:
    """A -> B is bit for bit a fresh engine on B; B -> A is bit for bit where it began."""
    live, fresh, policies = case
    if push is stacked_experts and live.scheme == "int8" and not LOADS_STACKED_SCALES:
        pytest.skip("this vLLM has no loader of stacked scales")

    push(live.model, policies.tensors("b"))
    live.snapshot().assert_same(fresh.start)
    push(live.model, policies.tensors("a"))

    assert live.session.proofs.digest() == live.start.digest != fresh.start.digest


@pytest.mark.parametrize("kind", ["qwen3-moe", "qwen2-moe", "mixtral"])
def test_int8_experts_are_those_of_a_checkpoint_that_was_quantized_before(
    policies: Callable[[str], Policies], kind: str
) -> None:
    """Written by other code: a scale an output channel of each expert, routers in bf16."""
    mine = policies(kind)

    with choosing("amx"):
        made = serve(mine.bf16("a"), "int8", "amx")
        stored = serve(mine.served("a", W8A8), "int8", "amx")

    made.start.assert_same(stored.start)


def test_routers_stay_in_bf16_and_experts_do_not(
    case: tuple[Serving, Serving, Policies],
) -> None:
    live, _, _ = case
    modules = list(live.model.modules())
    routers = [module for module in modules if isinstance(module, ReplicatedLinear)]
    experts = [module for module in modules if isinstance(module, RoutedExperts)]

    in_codes = [not isinstance(e.quant_method, UnquantizedFusedMoEMethod) for e in experts]

    assert len(routers) >= len(experts) == 2
    assert all(isinstance(router.quant_method, UnquantizedLinearMethod) for router in routers)
    assert in_codes == [live.scheme != "bf16"] * 2


def test_one_layer_is_staged_at_a_time(int8: tuple[Serving, Serving, Policies]) -> None:
    """In the order of the checkpoint, a layer's experts go before the next one's come."""
    live, _, policies = int8
    layers = live.session._engine.layers
    most = 0

    for pair in policies.tensors("b").items():
        live.model.load_weights([pair])
        staged = [sum(layer.stage(t).nbytes for t in layer.targets) for layer in layers]
        most = max(most, sum(size > 0 for size in staged))

    assert most == 1


def _bad(policies: Policies, name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    weights = policies.tensors("b")
    weights[name] = change(weights[name].clone())
    return weights


def _with_nan(tensor: Tensor) -> Tensor:
    tensor[3, 5] = float("nan")
    return tensor


EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (_with_nan, MisfitTensor, f"{EXPERT}.* NaN"),
        (lambda tensor: tensor[:-1], MisfitTensor, f"{EXPERT} has shape"),
        (lambda tensor: tensor.T.contiguous(), MisfitTensor, f"{EXPERT} has shape"),
    ],
)
def test_one_bad_expert_changes_nothing(
    int8: tuple[Serving, Serving, Policies],
    change: Callable[[Tensor], Tensor],
    error: type[Exception],
    said: str,
) -> None:
    live, fresh, policies = int8

    with pytest.raises(error, match=said):
        flashquant.reload_weights(live.llm, _bad(policies, EXPERT, change))
    live.snapshot().assert_same(live.start)
    flashquant.reload_weights(live.llm, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)


def test_a_missing_expert_is_named_and_changes_nothing(
    int8: tuple[Serving, Serving, Policies],
) -> None:
    live, fresh, policies = int8
    weights = policies.tensors("b")
    del weights[EXPERT]

    with pytest.raises(IncompleteUpdate, match=rf"layers\.1\.mlp\.experts.* lacks {EXPERT}\."):
        flashquant.reload_weights(live.llm, weights)
    live.snapshot().assert_same(live.start)
    flashquant.reload_weights(live.llm, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)


@pytest.mark.parametrize("scheme", ["int8", "bf16"])
def test_faults_leave_all_of_the_old_experts_or_all_of_the_new(
    policies: Callable[[str], Policies], scheme: str
) -> None:
    kernels = "amx" if scheme == "int8" else "portable"
    with choosing(kernels):
        target = Target(scheme, kernels, policies("qwen3-moe"))
        for kind, stream in faults.STREAMS.items():
            for index in (1, len(target.pushed["a"]) // 2):
                weights = stream(target.pushed[target.other], index)
                target.inject(f"{kind} at {index}", lambda w=weights: target.reload(w))
        for point in faults.CALLS:
            with faults.counted(point) as calls:
                target.reload()
            for call in {0, calls() // 2} if calls() else ():
                target.inject(
                    f"{point}, call {call}",
                    lambda at=(point, call): reload_failing(target, *at),
                )

    assert target.violations == []


@pytest.mark.skipif(HAS_GPU, reason="which experts have no kernel was asked of a CPU")
@pytest.mark.parametrize(
    ("scheme", "kernels"), [("fp8_vllm", "amx"), ("fp8_channel", "amx"), ("int8", "portable")]
)
def test_experts_without_a_kernel_are_refused_by_name(
    policies: Callable[[str], Policies], scheme: str, kernels: str
) -> None:
    where = r"model\.layers\.0\.mlp\.experts \(RoutedExperts\): vLLM has no kernel"

    with choosing(kernels), pytest.raises(UnsupportedEngine, match=where):
        serve(policies("qwen3-moe").bf16("a"), scheme, kernels)


@pytest.mark.parametrize(
    "push",
    [
        pytest.param(WAYS[0], id="one_by_one"),
        pytest.param(
            stacked_experts, id="stacked", marks=needs(">=0.28", "loader of stacked scales")
        ),
    ],
)
def test_a_push_of_known_names_runs_no_loader(
    int8: tuple[Serving, Serving, Policies], push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's loaders of experts walk lists of all experts; that is done once, not a push."""
    live, fresh, policies = int8
    push(live.model, policies.tensors("a"))
    engine: Any = live.session._engine

    monkeypatch.setattr(engine, "load", None)
    push(live.model, policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
