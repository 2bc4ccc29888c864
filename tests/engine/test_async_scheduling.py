"""Updates while a step is on its way: vLLM schedules ahead on a GPU, and so it does here.

On a CPU vLLM switches that off; everything it takes is there all the same. What a step under
the old weights has sampled when an update comes is dropped, and sampled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
from torch import Tensor
from vllm import SamplingParams

import flashquant
from tests.engine.serving import BY_ROW, WEIGHT_VERSIONS, Serving, needs, scheduling_ahead
from tests.engine.test_engine_state import (
    GREEDY,
    PROMPT,
    answer,
    by_a_workers_own_method,
    by_flashquant,
    by_vllms_reload,
    said,
)
from tests.support.gpu import HAS_GPU
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = [pytest.mark.engine, needs(">=0.25", "scheduling ahead that a CPU can run")]

Push = Callable[[Serving, dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(scope="module", params=[False, True], ids=["no prefix caching", "prefix caching"])
def engines(request: pytest.FixtureRequest, policies: Policies) -> tuple[Serving, Serving]:
    """One that schedules ahead, on policy A, and one on B, which a CPU keeps from it."""
    caching = {"enable_prefix_caching": request.param}
    live, fresh = (
        Serving(policies.bf16(policy), BY_ROW, {**caching, "max_num_batched_tokens": 64})
        for policy in ("a", "b")
    )
    with scheduling_ahead():
        assert live.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert fresh.llm.llm_engine.vllm_config.scheduler_config.async_scheduling == HAS_GPU
    return live, fresh


def core_of(live: Serving) -> Any:
    return live.llm.llm_engine.engine_core.engine_core


def cut(live: Serving, lengths: Mapping[str, int], steps: int, push: Callable[[], None]) -> Any:
    """Answers, by request, during which an update came; and how many tokens were out by then."""
    engine, last = live.llm.llm_engine, {}
    for shift, (name, length) in enumerate(lengths.items()):
        prompt = {"prompt_token_ids": PROMPT[shift:]}
        engine.add_request(name, prompt, SamplingParams(max_tokens=length, **GREEDY))

    def step() -> None:
        last.update((output.request_id, output) for output in engine.step())

    for _ in range(steps):
        step()
    out = {name: len(last[name].outputs[0].token_ids) if name in last else 0 for name in lengths}
    assert core_of(live).batch_queue  # a step is on its way
    push()
    while engine.has_unfinished_requests():
        step()
    return {name: output.outputs[0] for name, output in last.items()}, out


def cut_from_a_to_b(live: Serving, policies: Policies, length: int, steps: int) -> tuple[Any, int]:
    """An answer that A begins and B ends, and how many of its tokens were out by then."""
    a, b = (policies.tensors(policy) for policy in "ab")
    flashquant.reload_weights(live.llm, a)
    answers, out = cut(live, {"one": length}, steps, lambda: flashquant.reload_weights(live.llm, b))
    return answers["one"], out["one"]


@pytest.fixture(scope="module")
def speculating(policies: Policies, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """One that schedules ahead, and guesses three tokens at a time, mostly in vain."""
    draft = tiny_models.make("qwen2", 7, tmp_path_factory.mktemp("draft"), layers=1)
    guesses = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    live = Serving(policies.bf16("a"), BY_ROW, {"speculative_config": guesses})
    with scheduling_ahead():
        assert live.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    return live


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("push", [by_flashquant, by_vllms_reload, by_a_workers_own_method])
def test_a_step_on_its_way_is_not_taken_for_one_of_the_new_weights(
    engines: tuple[Serving, Serving], policies: Policies, push: Push, steps: int
) -> None:
    """Each token after the update has the log-prob of a fresh engine, and none is lost."""
    live, fresh = engines
    flashquant.reload_weights(live.llm, policies.tensors("a"))

    answers, out = cut(live, {"one": 16}, steps, lambda: push(live, policies.tensors("b")))

    whole, had = said(answers["one"]), out["one"]
    assert len(whole) == 16
    assert had < steps
    tokens = [token for token, _ in whole]
    assert whole[had:] == said(answer(fresh.llm, PROMPT + tokens[:had], 16 - had))


@pytest.fixture(scope="module")
def in_a_pipeline(policies: Policies) -> Serving:
    """One that has two steps on their way, as with two stages, and does not schedule ahead."""
    from vllm.config import VllmConfig

    if HAS_GPU:
        pytest.skip("on a GPU vLLM schedules ahead, in a pipeline as well")

    live = Serving(policies.bf16("a"), BY_ROW, {})
    with mock.patch.object(VllmConfig, "max_concurrent_batches", property(lambda _: 2)):
        config = live.llm.llm_engine.vllm_config
    assert not config.scheduler_config.async_scheduling
    return live


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_no_token_of_the_old_weights_comes_late_in_a_pipeline(
    in_a_pipeline: Serving, engines: tuple[Serving, Serving], policies: Policies, steps: int
) -> None:
    live, (_, fresh) = in_a_pipeline, engines

    whole_answer, had = cut_from_a_to_b(live, policies, 16, steps)

    whole = said(whole_answer)
    tokens = [token for token, _ in whole]
    assert whole[had:] == said(answer(fresh.llm, PROMPT + tokens[:had], 16 - had))


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_no_token_is_lost_of_one_that_speculates(
    speculating: Serving, engines: tuple[Serving, Serving], policies: Policies, steps: int
) -> None:
    """One step is dropped, whatever it had guessed, and none of the new weights."""
    live, (_, fresh) = speculating, engines

    whole, had = cut_from_a_to_b(live, policies, 32, steps)

    tokens = list(whole.token_ids)
    assert tokens[had:] == list(answer(fresh.llm, PROMPT + tokens[:had], 32 - had).token_ids)


@pytest.mark.parametrize("steps", [1, 2])
def test_logprobs_of_a_prompt_are_not_lost_with_its_step(
    engines: tuple[Serving, Serving], policies: Policies, steps: int
) -> None:
    live, fresh = engines
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    wants = SamplingParams(max_tokens=2, prompt_logprobs=1, **GREEDY)
    engine, outputs = live.llm.llm_engine, list[Any]()
    engine.add_request("one", {"prompt_token_ids": PROMPT}, wants)
    for _ in range(steps):
        outputs += engine.step()
    came = bool(outputs)  # with the first token, of the old weights

    flashquant.reload_weights(live.llm, policies.tensors("b"))
    while engine.has_unfinished_requests():
        outputs += engine.step()

    found = [scores and {t: s.logprob for t, s in scores.items()} for scores in prompt(outputs)]
    assert len(found) == len(PROMPT)
    if not came:
        new = fresh.llm.generate([{"prompt_token_ids": PROMPT}], wants, use_tqdm=False)
        assert found == [s and {t: p.logprob for t, p in s.items()} for s in prompt(new)]


def prompt(outputs: list[Any]) -> list[Any]:
    """What is said of the tokens of the prompt; of the first, nothing."""
    return list(outputs[-1].prompt_logprobs)


def test_no_answer_is_lost_that_was_about_to_end(
    engines: tuple[Serving, Serving], policies: Policies
) -> None:
    """Its last token is on its way, or the one before, or the prompt itself is."""
    live, fresh = engines
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    lengths = {f"of {length}": length for length in (5, 6, 7, 8, 30)}

    answers, out = cut(
        live, lengths, 7, lambda: flashquant.reload_weights(live.llm, policies.tensors("b"))
    )

    assert {name: len(answers[name].token_ids) for name in lengths} == lengths
    assert {answers[name].finish_reason for name in lengths} == {"length"}
    assert any(out[name] == lengths[name] - 1 for name in lengths)
    for shift, (name, length) in enumerate(lengths.items()):
        tokens, had = list(answers[name].token_ids), out[name]
        if had < length:  # the others had ended on the old weights
            (first, *_) = answer(fresh.llm, PROMPT[shift:] + tokens[:had], 1).token_ids
            assert tokens[had] == first


@WEIGHT_VERSIONS
def test_each_token_has_its_version(engines: tuple[Serving, Serving], policies: Policies) -> None:
    live, _ = engines
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    version = flashquant.status(live.llm).version

    answers, out = cut(
        live, {"one": 16}, 7, lambda: flashquant.reload_weights(live.llm, policies.tensors("b"))
    )

    spans = [(span.version, span.start, span.end) for span in answers["one"].weight_versions]
    had = out["one"]
    assert spans == [(str(version), 0, had), (str(version + 1), had, 16)]


@pytest.fixture(scope="module")
def short_of_memory(policies: Policies) -> Serving:
    """One that schedules two steps ahead, as in a pipeline, and has room for about two answers."""
    from vllm.config import VllmConfig

    if HAS_GPU:
        pytest.skip("a pipeline takes two GPUs")
    room = {"block_size": 32, "num_gpu_blocks_override": 11, "max_num_seqs": 4}
    live = Serving(policies.bf16("a"), BY_ROW, room)
    deep = mock.patch.object(VllmConfig, "max_concurrent_batches", property(lambda _: 3))
    with scheduling_ahead(), deep:
        assert live.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    return live


def test_a_step_on_its_way_of_one_that_has_just_been_preempted_is_not_taken_for_the_new_weights(
    short_of_memory: Serving, engines: tuple[Serving, Serving], policies: Policies
) -> None:
    """VLLM delivers what such a step has sampled, for it preempts for want of memory."""
    live, (_, fresh) = short_of_memory, engines
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    engine, core, last = live.llm.llm_engine, core_of(live), {}
    prompts = {str(shift): PROMPT[shift:] for shift in range(4)}
    for name, prompt in prompts.items():
        sampling = SamplingParams(max_tokens=60, **GREEDY)
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    preempted = set[str]()
    while not preempted:
        assert engine.has_unfinished_requests(), "none was preempted with a step on its way"
        last.update((output.request_id, output) for output in engine.step())
        ahead = {name for _, step, *_ in core.batch_queue for name in step.num_scheduled_tokens}
        waiting = {_outside(request.request_id) for request in core.scheduler.waiting}
        preempted = waiting & {_outside(name) for name in ahead}
    out = {name: len(last[name].outputs[0].token_ids) if name in last else 0 for name in prompts}
    flashquant.reload_weights(live.llm, policies.tensors("b"))
    while engine.has_unfinished_requests():
        last.update((output.request_id, output) for output in engine.step())

    for name, prompt in prompts.items():
        whole, had = said(last[name].outputs[0]), out[name]
        assert len(whole) == 60
        if had < 60:
            tokens = [token for token, _ in whole]
            assert whole[had] == said(answer(fresh.llm, prompt + tokens[:had], 1))[0]


def _outside(name: str) -> str:
    """The name of a request as it was given: vLLM adds to it."""
    return name.partition("-")[0]


def test_an_update_that_fails_takes_nothing_from_what_is_on_its_way(
    engines: tuple[Serving, Serving], policies: Policies
) -> None:
    live, _ = engines
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    undisturbed = said(answer(live.llm, PROMPT, 16))

    def fail() -> None:
        with pytest.raises(flashquant.errors.UnknownWeight):
            flashquant.reload_weights(live.llm, policies.tensors("b") | {"typo": Tensor()})

    answers, _ = cut(live, {"one": 16}, 7, fail)

    assert said(answers["one"]) == undisturbed
