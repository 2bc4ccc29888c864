"""The undo log in the KV cache: it takes no memory, and nothing of it reaches a request.

Every answer that goes on after an update, or after one that was refused, is what a fresh engine
says after the same tokens: requests in flight, steps scheduled ahead, prefix caching on and off.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import ReloadError, TornWeights
from tests.engine.serving import BY_ROW, FP8_CHANNEL, Serving, needs, scheduling_ahead, serve
from tests.engine.test_async_scheduling import core_of, cut
from tests.engine.test_engine_state import PROMPT, answer, said
from tests.support.gpu import HAS_GPU
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

# How an update reaches the engine: one that brings these weights, or is refused at the last.
Push = Callable[[Serving, dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module", autouse=True)
def in_the_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHQUANT_UNDO", "cache")
        yield


@pytest.fixture(scope="module")
def live(policies: Policies) -> Serving:
    return serve(policies.bf16("a"), BY_ROW)


def cache_of(live: Serving) -> Tensor:
    """All bytes of the KV cache."""
    runner = core_of(live).model_executor.driver_worker.worker.model_runner
    storages = {cache.untyped_storage().data_ptr(): cache for cache in runner.kv_caches}
    whole = (
        torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
        for cache in storages.values()
    )
    return torch.cat(list(whole))


def clear_cache(live: Serving) -> None:
    for cache in core_of(live).model_executor.driver_worker.worker.model_runner.kv_caches:
        cache.zero_()


@pytest.mark.parametrize("scheme", ["bf16", "int8", BY_ROW])
@pytest.mark.parametrize("refused", [False, True], ids=["committed", "refused"])
def test_the_log_takes_no_memory_and_the_cache_is_as_it_was_made(
    policies: Policies, scheme: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve(policies.bf16("a"), scheme)
    report = flashquant.reload_weights(live.llm, policies.tensors("a"))
    clear_cache(live)
    seen = watching(live, monkeypatch)

    if refused:
        with pytest.raises(flashquant.errors.UnknownWeight):
            flashquant.reload_weights(live.llm, policies.tensors("b") | {"typo": Tensor()})
    else:
        flashquant.reload_weights(live.llm, policies.tensors("b"))

    assert report.undo_cache_bytes == report.undo_bytes == seen[-1] > 0
    assert live.session.transactions.reserve.nbytes == 0
    assert not cache_of(live).any()
    expected = serve(policies.bf16("a" if refused else "b"), scheme)
    live.snapshot().assert_same(expected.start)


def watching(live: Serving, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of each update's log lay in the cache when its end began."""
    seen: list[int] = []
    transactions = live.session.transactions
    settle = transactions._settle

    def look(update: Any, committed: bool) -> None:
        seen.append(update.undo.cache_bytes)
        settle(update, committed)

    monkeypatch.setattr(transactions, "_settle", look)
    return seen


def by_flashquant(live: Serving, weights: dict[str, Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights)


def by_vllms_reload(live: Serving, weights: dict[str, Tensor]) -> None:
    live.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})


def in_a_bracket(live: Serving, weights: dict[str, Tensor]) -> None:
    """Of a call a tensor, as SkyRL and prime-rl push."""
    begin(live)
    try:
        for pair in weights.items():
            load(live, pair)
    except ReloadError:
        live.llm.collective_rpc(lambda worker: live.session.abandon())
        raise
    live.llm.collective_rpc(lambda worker: live.session.finish())


def begin(live: Serving) -> None:
    live.llm.collective_rpc(lambda worker: live.session.begin())


def load(live: Serving, *pairs: tuple[str, Tensor]) -> None:
    live.llm.collective_rpc(lambda worker: worker.get_model().load_weights(list(pairs)))


@pytest.fixture(scope="module", params=[False, True], ids=["no prefix caching", "prefix caching"])
def engines(request: pytest.FixtureRequest, policies: Policies) -> dict[str, Serving]:
    """One that schedules ahead, on policy A; and a fresh one of each policy that does not."""
    caching = {"enable_prefix_caching": request.param}
    fresh = {policy: serve(policies.bf16(policy), BY_ROW, **caching) for policy in "ab"}
    live = Serving(policies.bf16("a"), BY_ROW, {**caching, "max_num_batched_tokens": 64})
    with scheduling_ahead():
        assert live.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    return {"live": live, **fresh}


@needs(">=0.25", "scheduling ahead that a CPU can run")
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("push", [by_flashquant, by_vllms_reload, in_a_bracket])
@pytest.mark.parametrize("refused", [False, True], ids=["committed", "refused"])
def test_requests_in_flight_go_on_as_a_fresh_engine_would(
    engines: dict[str, Serving],
    policies: Policies,
    push: Push,
    refused: bool,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of theirs is on its way when the cache is taken."""
    live, lengths = engines["live"], {"long": 16, "short": 9}
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    seen = watching(live, monkeypatch)

    def update() -> None:
        if not refused:
            push(live, policies.tensors("b"))
            return
        with pytest.raises(flashquant.errors.UnknownWeight):
            push(live, policies.tensors("b") | {"typo": Tensor()})

    answers, out = cut(live, lengths, steps, update)

    assert seen[-1] > 0
    fresh = engines["a" if refused else "b"]
    for shift, (name, length) in enumerate(lengths.items()):
        whole, had = said(answers[name]), out[name]
        assert len(whole) == length
        tokens = [token for token, _ in whole]
        assert whole[had:] == said(answer(fresh.llm, PROMPT[shift:] + tokens[:had], length - had))
    assert live.continued(PROMPT, 8) == fresh.continued(PROMPT, 8)


def reset_high_water_mark() -> int:
    """Let the kernel count anew; the bytes that are resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def high_water_mark() -> int:
    """The most bytes that were resident since then."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def in_flight(live: Serving, steps: int) -> tuple[Any, int]:
    """A request that has begun: what brings it to its end, and how many of its tokens are out."""
    from vllm import SamplingParams

    engine = live.llm.llm_engine
    sampling = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=0)
    engine.add_request("in flight", {"prompt_token_ids": PROMPT}, sampling)
    out = [len(output.outputs[0].token_ids) for _ in range(steps) for output in engine.step()]

    def end() -> list[tuple[int, float]]:
        last: Any = None
        while engine.has_unfinished_requests():
            last = [*engine.step(), last][0]
        return said(last.outputs[0])

    return end, max(out, default=0)


def test_in_the_callers_own_process_a_step_takes_back_what_lies_unused(
    live: Serving, policies: Policies
) -> None:
    """Between begin and the first tensor one may run, and its keys and values are kept."""
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    undisturbed = said(answer(live.llm, PROMPT, 16))
    begin(live)
    assert live.session.transactions.reserve.lent

    end, _ = in_flight(live, 3)
    load(live, *policies.tensors("b").items())
    update = live.session.transactions.current

    assert update is not None
    assert update.undo.cache_bytes == 0 < update.undo.bytes
    live.llm.collective_rpc(lambda worker: live.session.abandon())
    assert end() == undisturbed


def test_in_the_callers_own_process_a_step_in_the_middle_is_refused_and_nothing_is_lost(
    live: Serving, policies: Policies
) -> None:
    """Nothing of it was scheduled, which would count as computed after the roll-back."""
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    fresh = serve(policies.bf16("a"), BY_ROW, seed=7)
    end, had = in_flight(live, 4)
    begin(live)
    load(live, *list(policies.tensors("b").items())[:14])

    with pytest.raises(TornWeights):
        live.llm.llm_engine.step()

    live.llm.collective_rpc(lambda worker: live.session.abandon())
    whole = end()
    tokens = [token for token, _ in whole]
    assert whole[had:] == said(answer(fresh.llm, PROMPT + tokens[:had], 16 - had))


def test_weights_that_generate_before_they_come_are_refused_and_nothing_is_lost(
    live: Serving, policies: Policies
) -> None:
    """An iterator may do anything; the answer in flight is that of the weights from before."""
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    undisturbed = said(answer(live.llm, PROMPT, 16))
    ends: list[Callable[[], Any]] = []

    def late() -> Iterator[tuple[str, Tensor]]:
        yield from list(policies.tensors("b").items())[:14]
        ends.append(in_flight(live, 3)[0])
        yield from list(policies.tensors("b").items())[14:]

    with pytest.raises(ReloadError, match="rolled back before"):
        flashquant.reload_weights(live.llm, late())

    assert ends[0]() == undisturbed


def test_a_prepared_update_keeps_its_log_on_the_host(live: Serving, policies: Policies) -> None:
    """Steps run while it is made."""
    report = flashquant.reload_weights(live.llm, policies.tensors("a"), prepare=True)

    assert report.undo_cache_bytes == 0 < report.undo_bytes


def test_a_push_outside_of_a_bracket_keeps_its_log_on_the_host(
    live: Serving, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine core cannot know that it comes."""
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    seen = watching(live, monkeypatch)

    load(live, *policies.tensors("b").items())

    assert seen == [0]
    live.snapshot().assert_same(serve(policies.bf16("b"), BY_ROW).start)


def test_what_a_small_cache_has_no_room_for_lies_on_the_host(policies: Policies) -> None:
    """Tensors are cut where a layer's cache has room for some rows only, so it is filled."""
    live = serve(policies.bf16("a"), BY_ROW, kv_cache_memory_bytes=1 << 20)

    report = flashquant.reload_weights(live.llm, policies.tensors("b"))

    room = cache_of(live).nbytes
    assert 0.95 * room < report.undo_cache_bytes <= room < report.undo_bytes
    live.snapshot().assert_same(serve(policies.bf16("b"), BY_ROW).start)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A model whose undo log is far larger than what else a reload needs, and weights for it."""
    path = tmp_path_factory.mktemp("large") / "qwen2"
    tiny_models.make("qwen2", 0, path, hidden=1024, layers=4, intermediate=3072)
    return path, tiny_models.tensors(path)


@FP8_CHANNEL
def test_the_peak_of_host_memory_is_that_of_a_reload_without_an_undo_log(
    large: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: how far resident memory rises. The log on the host is what it rises by there."""
    path, weights = large
    risen, logs = dict[tuple[str, bool], float](), dict[tuple[str, bool], int]()
    for place in ("host", "cache"):
        monkeypatch.setenv("FLASHQUANT_UNDO", place)
        live = serve(path, BY_ROW, kv_cache_memory_bytes=128 << 20, seed=place == "cache")
        for atomic in (True, False):
            each = []
            for _ in range(5):  # the first learns the plan; where memory is short, some may swap
                live.session.transactions.free()
                before = reset_high_water_mark()
                report = flashquant.reload_weights(live.llm, weights, atomic=atomic)
                each.append(high_water_mark() - before)
            risen[place, atomic] = statistics.median(each)
            logs[place, atomic] = report.undo_bytes

    log, none = logs["cache", True], risen["host", False]
    pinned = {"host": logs["host", True]} if HAS_GPU else {}  # in chunks
    assert logs == {(place, atomic): atomic * pinned.get(place, log) for place, atomic in logs}
    assert pinned.get("host", log) >= log
    assert log > 40 << 20
    assert risen["host", True] > none + 0.9 * log
    assert risen["cache", True] < none + 0.1 * log
