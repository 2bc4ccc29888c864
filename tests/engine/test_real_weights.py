"""Promise 1 on the weights of a real model: SmolLM2, in each scheme."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.engine.serving import Serving
from tests.engine.test_reload_equals_restart import WAYS, Push, assert_there_and_back, engines
from tools.models.policies import SCHEMES, Policies

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "smollm2")


@pytest.fixture(params=SCHEMES, scope="module")
def case(
    request: pytest.FixtureRequest, policies: Policies
) -> Iterator[tuple[Serving, Serving, Policies]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Few tokens in fp8: without a kernel for it, they are most of the time.
    tokens = 4 if request.param.startswith("fp8") else 16
    with engines(policies, request.param, "native", tokens) as found:
        yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("push", WAYS, ids=lambda way: way.__name__)
def test_pushing_b_equals_a_start_on_b_and_pushing_a_returns_to_a(
    case: tuple[Serving, Serving, Policies], push: Push
) -> None:
    assert_there_and_back(case, push)
