"""Where the engine core lends its KV cache, and where it is known or feared to be unsafe."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import RequestStatus

from flashquant.config.checks import Checks
from flashquant.patches.channels import CACHE_AWAY, STALE
from flashquant.patches.seams import ahead, lending


class Scheduler:
    """One whose prefix cache can be reset, or is held by somebody."""

    def __init__(self, *specs: type[Any]) -> None:
        self.kv_cache_config = SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=object.__new__(spec)) for spec in specs]
        )
        self.connector: object = None
        self.requests: dict[str, Any] = {}

    def get_kv_connector(self) -> object:
        return self.connector


class Core:
    """As much of an engine core as `lend` asks, and in which order it asked."""

    def __init__(self, *specs: type[Any]) -> None:
        self.scheduler = Scheduler(*(specs or (FullAttentionSpec, SlidingWindowSpec)))
        self.batch_queue: deque[Any] | None = None
        self.model_executor = object.__new__(UniProcExecutor)
        self.model_executor.collective_rpc = lambda method: self.did.append(method)
        self.vllm_config = SimpleNamespace(
            additional_config={"flashquant": {"checks": {"undo": "cache"}}},
            kv_transfer_config=None,
            parallel_config=SimpleNamespace(data_parallel_size=1),
        )
        self.did: list[str] = []
        self.resets: Any = lambda: True

    def reset_prefix_cache(self, *, reset_running_requests: bool, reset_connector: bool) -> bool:
        assert not reset_connector
        self.did.append(f"reset, preempting {reset_running_requests}")
        return self.resets()


def test_what_is_lent_nobody_counts_on_any_more() -> None:
    """Whatever becomes of the update: requests are preempted before, not after."""
    core = Core()

    assert lending.lend(core)
    assert core.did == ["reset, preempting True", "flashquant_lend"]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_unless_asked_otherwise_a_gpu_lends_its_cache_and_a_cpu_does_not(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    core = Core()
    core.vllm_config.additional_config["flashquant"]["checks"] = Checks().model_dump()
    monkeypatch.setattr(lending.current_platform, "is_cpu", lambda: on_cpu)

    assert lending.lend(core) == (not on_cpu)


def not_asked_for(core: Any) -> None:
    core.vllm_config.additional_config["flashquant"]["checks"]["undo"] = "host"


def a_connector(core: Any) -> None:
    core.vllm_config.kv_transfer_config = object()


def a_schedulers_connector(core: Any) -> None:
    core.scheduler.connector = object()


def data_parallel_ranks(core: Any) -> None:
    core.vllm_config.parallel_config.data_parallel_size = 2


def an_executor_of_someones_own(core: Any) -> None:
    core.model_executor = SimpleNamespace(collective_rpc=core.did.append)


@pytest.mark.parametrize(
    "change",
    [
        not_asked_for,
        a_connector,
        a_schedulers_connector,
        data_parallel_ranks,
        an_executor_of_someones_own,
    ],
)
def test_nothing_is_lent_and_nobody_is_preempted_with(change: Any) -> None:
    core = Core()
    change(core)

    assert not lending.lend(core)
    assert core.did == []


@pytest.mark.parametrize("spec", [MambaSpec, CrossAttentionSpec, SinkFullAttentionSpec])
def test_a_cache_of_more_than_keys_and_values_of_tokens_is_not_lent(spec: type[Any]) -> None:
    core = Core(FullAttentionSpec, spec)

    assert not lending.lend(core)
    assert core.did == []


def test_what_a_step_on_its_way_has_sampled_is_dropped_before_the_loan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By flashquant, where vLLM (up to 0.26) drops tokens by their number."""
    monkeypatch.setattr(ahead, "_COUNTS_TOKENS", True)
    core, step = Core(), SimpleNamespace(num_scheduled_tokens={"running": 1, "ended": 1})
    core.batch_queue = deque([(None, step, None)])
    core.scheduler.requests = {
        name: SimpleNamespace(request_id=name, status=status, async_tokens_to_discard=1)
        for name, status in (
            ("running", RequestStatus.RUNNING),
            ("ended", RequestStatus.FINISHED_ABORTED),
        )
    }

    assert lending.lend(core)

    assert STALE.get(step) == {"running"}
    assert core.scheduler.requests["running"].async_tokens_to_discard == 0


def cannot() -> bool:
    raise RuntimeError("requests wait for remote keys")


@pytest.mark.parametrize("resets", [cannot, lambda: False], ids=["raises", "says no"])
def test_blocks_that_cannot_be_taken_from_a_request_are_not_lent(resets: Any) -> None:
    core = Core()
    core.resets = resets

    assert not lending.lend(core)
    assert core.did == ["reset, preempting True"]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three layers in two allocations; one of them sees a part of its own."""
    one, two = (torch.zeros(1000, dtype=torch.int8) for _ in range(2))
    caches = [one.view(10, 100), one[500:], two.view(torch.bfloat16)]
    reserve = SimpleNamespace(lent=())
    session = SimpleNamespace(transactions=SimpleNamespace(reserve=reserve))
    monkeypatch.setattr(lending, "find_session", lambda model: session)
    return SimpleNamespace(
        reserve=reserve, get_model=lambda: None, model_runner=SimpleNamespace(kv_caches=caches)
    )


def test_all_bytes_of_the_cache_are_lent_each_once(worker: Any) -> None:
    lending.lend_here(worker)

    assert [(chunk.dtype, chunk.nbytes) for chunk in worker.reserve.lent] == [
        (torch.uint8, 1000),
        (torch.uint8, 1000),
    ]
    for chunk in worker.reserve.lent:
        chunk.fill_(7)
    assert all((cache.view(torch.uint8) == 7).all() for cache in worker.model_runner.kv_caches)
    lending.end_loan(worker)
    assert worker.reserve.lent == ()


def test_a_cache_that_is_put_away_is_not_touched(worker: Any) -> None:
    CACHE_AWAY.put(worker, True)

    lending.lend_here(worker)

    assert worker.reserve.lent == ()
