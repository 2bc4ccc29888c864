"""Promise 1 on the real engine: a reload leaves exactly what a fresh start would.

Every tensor the kernels read, packed memory included, and 16 greedy tokens with
their log-probs, for each model, scheme and way of pushing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashquant.patches.guard import vllm_is
from tests.engine.serving import Serving, choosing, serve
from tools.models.policies import SCHEMES, TINY, Policies, config_name

pytestmark = pytest.mark.engine

Push = Callable[[nn.Module, dict[str, Tensor]], None]


def one_tensor_a_call(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        model.load_weights([(name, tensor)])


def buckets_cut_inside_qkv(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """As verl: views of one buffer that is overwritten as soon as the call returns."""
    names = sorted(weights)  # k, o, q, v: any cut by two falls inside a fused layer
    buffer = torch.empty(
        sum(sorted(t.numel() for t in weights.values())[-2:]), dtype=torch.bfloat16
    )
    for first in range(0, len(names), 2):
        bucket, start = [], 0
        for name in names[first : first + 2]:
            view = buffer[start : start + weights[name].numel()].view(weights[name].shape)
            bucket.append((name, view.copy_(weights[name])))
            start += view.numel()
        model.load_weights(weights=bucket)
        buffer.fill_(float("nan"))


def one_iterator(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_weights((name, tensor) for name, tensor in weights.items())


def shuffled(model: nn.Module, weights: dict[str, Tensor]) -> None:
    names = sorted(weights)
    random.Random(7).shuffle(names)
    one_tensor_a_call(model, {name: weights[name] for name in names})


WAYS = (one_tensor_a_call, buckets_cut_inside_qkv, one_iterator, shuffled)
# Both kinds of CPU kernels are tested on any machine: see `kernels.choosing`.
KERNELS = ("amx", "portable")
EMULATED = ("mxfp8", "nvfp4")
CASES = [(kind, scheme, kernels) for kind in TINY for scheme in SCHEMES for kernels in KERNELS]
# Computed by vLLM's emulation, which is the same on any machine.
CASES += [(kind, scheme, "native") for kind in TINY for scheme in EMULATED]
# Served by transformers' own code, which calls layers on a batch of sequences, not on rows.
CASES += [(kind, "int8", kernels) for kind in ("olmo2", "gpt-neox") for kernels in KERNELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@contextmanager
def engines(
    policies: Policies, scheme: str, kernels: str, tokens: int = 16
) -> Iterator[tuple[Serving, Serving, Policies]]:
    """An engine that serves A, one that was started on B, and both policies."""
    # First: vLLM decorates transformers' own models in place, and they cannot be made any more.
    paths = [policies.served(policy, scheme) for policy in "ab"]
    with choosing(kernels):
        live, fresh = (serve(path, config_name(scheme), kernels, tokens) for path in paths)
        yield live, fresh, policies


def assert_there_and_back(case: tuple[Serving, Serving, Policies], push: Push) -> None:
    """A -> B is bit for bit a fresh engine on B; B -> A is bit for bit where it began."""
    live, fresh, policies = case

    push(live.model, policies.tensors("b"))
    live.snapshot().assert_same(fresh.start)
    push(live.model, policies.tensors("a"))

    assert live.session.proofs.digest() == live.start.digest


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(
    request: pytest.FixtureRequest, folder: Path
) -> Iterator[tuple[Serving, Serving, Policies]]:
    kind, scheme, kernels = request.param
    if kind == "gpt-neox" and not vllm_is(">=0.32"):  # its own loader computes: refused in int8
        pytest.skip("this vLLM has no GPT-NeoX by transformers' own code")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with engines(Policies(folder, kind), scheme, kernels) as found:
        yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("push", WAYS, ids=lambda way: way.__name__)
def test_pushing_b_equals_a_start_on_b_and_pushing_a_returns_to_a(
    case: tuple[Serving, Serving, Policies], push: Push
) -> None:
    assert_there_and_back(case, push)
