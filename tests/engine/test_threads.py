"""Threads that reach one engine in their own process: what one does is not undone by another.

A metrics thread asks how the weights stand, a threaded actor generates or is pushed to while it is
being updated. Each call either waits its turn outside of flashquant, or is refused and told so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

import flashquant
from flashquant.errors import ReloadError, TornWeights
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=["int8", "fp8_vllm"])
def live(request: pytest.FixtureRequest, policies: Policies) -> Serving:
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    return serving


def status(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.status(live.llm)


def manifest(live: Serving, weights: dict[str, Tensor]) -> None:
    assert flashquant.manifest(live.llm).digest is None


def generate(live: Serving, weights: dict[str, Tensor]) -> None:
    live.continued(list(range(5, 45)), 4)


def reload(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights)


def push(live: Serving, weights: dict[str, Tensor]) -> None:
    live.model.load_weights([(NORM, weights[NORM])])


def sleep(live: Serving, weights: dict[str, Tensor]) -> None:
    live.session.sleep(keeps_weights=True)


def look_at_its_time(live: Serving, weights: dict[str, Tensor]) -> None:
    """As the engine core does, when nothing has come for too long by the clock."""
    live.session.transactions._timeout = 1e-9
    try:
        live.session.transactions.take_back_what_was_left()
    finally:
        live.session.transactions._timeout = 0


MEANWHILE: dict[Callable[[Serving, dict[str, Tensor]], None], type[Exception] | None] = {
    status: None,
    manifest: None,
    look_at_its_time: None,
    generate: TornWeights,
    reload: ReloadError,
    push: ReloadError,
    sleep: ReloadError,
}


@pytest.mark.parametrize("prepare", [False, True], ids=["at once", "prepared"])
@pytest.mark.parametrize("call", MEANWHILE, ids=lambda call: call.__name__)
def test_an_update_goes_on_whatever_another_thread_does(
    live: Serving,
    policies: Policies,
    call: Callable[[Serving, dict[str, Tensor]], None],
    prepare: bool,
) -> None:
    a, b = (policies.tensors(policy) for policy in "ab")
    refused: list[BaseException] = []

    def another() -> None:
        try:
            call(live, a)
        except BaseException as failure:
            refused.append(failure)

    def sent() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(b.items()):
            if number in (3, 20):
                thread = threading.Thread(target=another)
                thread.start()
                thread.join()
            yield pair

    flashquant.reload_weights(live.llm, sent(), prepare=prepare)

    wanted = MEANWHILE[call]
    assert [type(failure) for failure in refused] == [wanted] * 2 * (wanted is not None)
    assert all("another thread" in str(failure) for failure in refused)
    _end_requests(live.llm)
    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)


def _end_requests(llm: Any) -> None:
    """Of a call that was refused: the caller of vLLM's own engine does as much."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    llm.llm_engine.abort_request(list(scheduler.requests), internal=True)
