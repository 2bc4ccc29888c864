"""What is not weights: requests, caches, adapters, cache scales and sleep survive a reload."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

import flashquant
from flashquant.errors import SleepingWeights, TornWeights
from flashquant.patches.seams import sleep
from tests.engine.serving import BY_ROW, WEIGHT_VERSIONS, Serving, needs, serve, weight_version
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

PROMPT = list(range(5, 45))
GREEDY = {"temperature": 0, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture
def live(policies: Policies) -> Iterator[Serving]:
    """An engine that serves policy A, and does again afterwards."""
    serving = serve(policies.bf16("a"), BY_ROW)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    yield serving
    serving.session.wake_up()
    flashquant.reload_weights(serving.llm, policies.tensors("a"))


def said(output: Any) -> list[tuple[int, float]]:
    """The tokens of one answer, with their log-probs."""
    return [
        (token, step[token].logprob)
        for token, step in zip(output.token_ids, output.logprobs, strict=True)
    ]


def answer(llm: Any, tokens: list[int], count: int, **options: Any) -> Any:
    """One greedy answer."""
    sampling = SamplingParams(max_tokens=count, **GREEDY)
    prompt = {"prompt_token_ids": tokens}
    return llm.generate([prompt], sampling, use_tqdm=False, **options)[0].outputs[0]


def updated_in_flight(live: Serving, policies: Policies) -> Any:
    """One answer of 16 tokens, the first 6 of which policy A has sampled, the others B."""
    engine = live.llm.llm_engine
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    engine.add_request(
        "in flight", {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=16, **GREEDY)
    )
    for _ in range(6):
        engine.step()
    flashquant.reload_weights(live.llm, policies.tensors("b"))
    finished = []
    while engine.has_unfinished_requests():
        finished += [output for output in engine.step() if output.finished]
    return finished[0].outputs[0]


@pytest.mark.parametrize("caching", [False, True], ids=["no prefix caching", "prefix caching"])
def test_a_request_in_flight_goes_on_as_if_it_had_begun_on_the_new_weights(
    policies: Policies, caching: bool
) -> None:
    """Between two steps; its keys and values are computed anew."""
    live, fresh = (
        serve(policies.bf16(policy), BY_ROW, enable_prefix_caching=caching) for policy in ("a", "b")
    )

    output = updated_in_flight(live, policies)

    expected = answer(fresh.llm, PROMPT + list(output.token_ids[:6]), 10)
    assert said(output)[6:] == said(expected)


@WEIGHT_VERSIONS
def test_each_token_of_an_answer_has_its_version(policies: Policies) -> None:
    """Those of the reports."""
    live = serve(policies.bf16("a"), BY_ROW)
    version = flashquant.status(live.llm).version

    output = updated_in_flight(live, policies)

    spans = [(span.version, span.start, span.end) for span in output.weight_versions]
    assert spans == [(str(version + 1), 0, 6), (str(version + 2), 6, 16)]


def by_flashquant(live: Serving, weights: dict[str, torch.Tensor]) -> None:
    flashquant.reload_weights(live.llm, weights)


def by_vllms_reload(live: Serving, weights: dict[str, torch.Tensor]) -> None:
    live.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})


def by_a_workers_own_method(live: Serving, weights: dict[str, torch.Tensor]) -> None:
    """As the worker extensions of OpenRLHF, verl and others: a tensor a call."""
    for name, tensor in weights.items():
        live.llm.collective_rpc(
            lambda worker, pair: worker.get_model().load_weights([pair]), args=((name, tensor),)
        )


@pytest.mark.parametrize(
    "push",
    [by_flashquant, by_vllms_reload, by_a_workers_own_method],
    ids=lambda push: push.__name__,
)
def test_a_prefix_of_the_old_weights_is_not_used_again(
    policies: Policies, push: Callable[[Serving, dict[str, torch.Tensor]], None]
) -> None:
    """Whatever call brought the new ones; and the engine knows their version."""
    live, fresh = (
        serve(policies.bf16(policy), BY_ROW, enable_prefix_caching=True) for policy in ("a", "b")
    )
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    before = said(answer(live.llm, PROMPT, 4))

    push(live, policies.tensors("b"))

    after = said(answer(live.llm, PROMPT, 4))
    assert before != after == said(answer(fresh.llm, PROMPT, 4))
    version = str(flashquant.status(live.llm).version)
    assert weight_version(live.llm, version) == version


def test_a_push_that_no_scheduler_can_hear_of_is_warned_of_once(
    policies: Policies, caplog: pytest.LogCaptureFixture
) -> None:
    """Straight into the model, as TRL does in its own process; at the next forward pass."""
    live = serve(policies.bf16("a"), "bf16", enable_prefix_caching=True)

    with caplog.at_level(logging.WARNING, "flashquant"):
        flashquant.reload_weights(live.llm, policies.tensors("a"))
        answer(live.llm, PROMPT, 2)
        assert warnings_of(caplog) == []
        for _ in range(2):
            for name, tensor in policies.tensors("a").items():
                live.model.load_weights([(name, tensor)])
            answer(live.llm, PROMPT, 2)

    (warning,) = warnings_of(caplog)
    assert "llm.reset_prefix_cache()" in warning


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What flashquant has warned of."""
    return [
        record.message
        for record in caplog.records
        if record.name.startswith("flashquant") and record.levelno >= logging.WARNING
    ]


def adapter(folder: Path) -> LoRARequest:
    """A random adapter of rank 8 on the attention of both layers."""
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    dice, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for module, rows in (("q_proj", 256), ("v_proj", 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for half, shape in (("lora_A", (8, 256)), ("lora_B", (rows, 8))):
                values = torch.randn(shape, generator=dice) * 0.2
                tensors[f"{prefix}.{half}.weight"] = values.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    return LoRARequest("adapter", 1, str(folder))


@needs(">=0.25", "loader that knows the layers under an adapter")
@pytest.mark.parametrize("scheme", ["bf16", BY_ROW])
def test_an_adapter_stays_on_top_of_the_new_weights(
    policies: Policies, scheme: str, tmp_path: Path
) -> None:
    """Answers with and without it equal those of a fresh engine with the same adapter."""
    options = {"enable_lora": True, "max_lora_rank": 8}
    live, fresh = (serve(policies.bf16(policy), scheme, **options) for policy in ("a", "b"))
    lora = {"lora_request": adapter(tmp_path)}
    before = said(answer(live.llm, PROMPT, 8, **lora))

    flashquant.reload_weights(live.llm, policies.tensors("b"))

    adapted = said(answer(live.llm, PROMPT, 8, **lora))
    assert adapted == said(answer(fresh.llm, PROMPT, 8, **lora)) != before
    assert adapted != said(answer(live.llm, PROMPT, 8)) == said(answer(fresh.llm, PROMPT, 8))


def test_the_scales_of_the_kv_cache_survive(live: Serving, policies: Policies) -> None:
    """They belong to the cache: neither a value nor an address changes."""
    scales = {
        name: tensor for name, tensor in live.tensors().items() if name.endswith("attn._k_scale")
    }
    assert scales
    for scale in scales.values():
        scale.data.fill_(0.25)
    addresses = {name: scale.data_ptr() for name, scale in scales.items()}

    flashquant.reload_weights(live.llm, policies.tensors("b"))

    now = {name: live.tensors()[name] for name in scales}
    assert {name: scale.data_ptr() for name, scale in now.items()} == addresses
    assert all(scale.item() == 0.25 for scale in now.values())
    for scale in now.values():
        scale.data.fill_(1.0)


def asleep(live: Serving, level: int) -> None:
    """As vLLM's worker puts its weights away, where it can: not on a CPU."""
    worker = SimpleNamespace(get_model=lambda: live.model, get_draft_model=lambda: None)
    sleep._sleep(lambda worker, level: None, worker, level)


def awake(live: Serving, tags: list[str] | None) -> None:
    worker = SimpleNamespace(get_model=lambda: live.model, get_draft_model=lambda: None)
    sleep._wake_up(lambda worker, tags: None, worker, tags)


def test_sleeping_weights_refuse_an_update_and_come_back_as_they_were(
    live: Serving, policies: Policies
) -> None:
    """Level 1 keeps them."""
    asleep(live, 1)

    with pytest.raises(SleepingWeights, match="wake_up"):
        flashquant.reload_weights(live.llm, policies.tensors("b"))
    awake(live, ["kv_cache"])
    assert flashquant.status(live.llm).asleep
    awake(live, ["weights"])

    live.snapshot().assert_same(live.start)


def test_discarded_weights_must_arrive_again_before_anything_is_generated(
    live: Serving, policies: Policies
) -> None:
    """Level 2 gives them up; what is there afterwards is nobody's policy, and no writer's."""
    flashquant.status(live.llm)
    asleep(live, 2)
    for parameter in live.model.parameters():
        parameter.data.zero_()
    awake(live, None)

    assert flashquant.status(live.llm).foreign == ()
    with pytest.raises(TornWeights, match="Push one complete update"):
        live.session.check_servable()
    flashquant.reload_weights(live.llm, policies.tensors("a"))

    live.snapshot().assert_same(live.start)


def test_requests_after_a_wake_up_from_level_2_are_refused_and_the_engine_lives(
    live: Serving, policies: Policies
) -> None:
    """The engine core hears of it when it wakes up, not in the middle of a step."""
    asleep(live, 2)
    awake(live, None)
    live.llm.wake_up()

    with pytest.raises(TornWeights, match="slept at level 2"):
        live.llm.generate([{"prompt_token_ids": PROMPT}], use_tqdm=False)
    flashquant.reload_weights(live.llm, policies.tensors("a"))

    live.snapshot().assert_same(live.start)


def test_memory_that_is_discarded_by_tag_counts_as_level_2(live: Serving) -> None:
    worker = SimpleNamespace(get_model=lambda: live.model, get_draft_model=lambda: None)

    sleep._discard(lambda worker, tags: None, worker, ("kv_cache",))
    assert not live.session.transactions.serving.torn
    sleep._discard(lambda worker, tags: None, worker, ("weights",))

    assert live.session.transactions.serving.torn


@pytest.mark.parametrize(("variable", "seed"), [("FLASHQUANT_DIGEST", 1), ("FLASHQUANT_LEDGER", 2)])
def test_a_proof_can_be_turned_off_from_outside(
    policies: Policies, variable: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is read when the engine is created, and travels with its config."""
    monkeypatch.setenv(variable, "0")
    live = serve(policies.bf16("a"), "bf16", seed=seed)  # an engine of its own
    monkeypatch.delenv(variable)

    report = flashquant.reload_weights(live.llm, policies.tensors("b"))

    assert (report.digest is None) == (variable == "FLASHQUANT_DIGEST")
    live.session.begin()
    kept = bool(live.session.transactions.current.before)
    live.session.abandon()
    assert kept == (variable != "FLASHQUANT_LEDGER")


def test_digests_of_parameters_name_what_differs(live: Serving, policies: Policies) -> None:
    """One norm is pushed; exactly its fingerprint changes, and the whole."""
    before = flashquant.status(live.llm)
    name = "model.norm.weight"

    flashquant.reload_weights(live.llm, {name: policies.tensors("b")[name]}, strict=False)

    after = flashquant.status(live.llm)
    changed = [n for n in after.parameters if after.parameters[n] != before.parameters[n]]
    assert changed == [name]
    assert after.digest != before.digest
    assert after.ranks == (after.digest,)
