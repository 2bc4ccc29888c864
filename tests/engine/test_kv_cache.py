"""A KV cache in fp8: its scales belong to a policy as its weights do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import flashquant
from flashquant.errors import ConfigError, MisfitTensor, ReloadError, UnknownWeight
from tests.engine.processes import run
from tests.engine.serving import Serving, serve
from tests.engine.test_reload_equals_restart import WAYS, Push
from tools.models import tiny_models
from tools.models.policies import Policies

HERE = "model.layers.{}.self_attn"
SCALES = {HERE.format(block): (0.5 + block, 0.25) for block in (0, 1)}

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not torch.cpu._is_avx512_supported(), reason="vLLM caches in fp8 on AVX-512 or AMX only"
    ),
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def written(policies: Policies, scheme: str) -> str:
    path = policies.folder / f"{scheme}.yaml"
    path.write_text(json.dumps({"configs": [{"fn": scheme, "kv_cache": "fp8"}]}))
    return str(path)


@pytest.fixture(scope="module", params=["bf16", "int8", "fp8_vllm", "int4"])
def live(request: pytest.FixtureRequest, policies: Policies) -> Serving:
    return serve(policies.bf16("a"), written(policies, request.param))


def numbers(live: Serving) -> list[tuple[float, ...]]:
    """What each layer holds, wherever it holds it: tensors, and what kernels are called with."""
    layers = [live.model.get_submodule(f"{HERE.format(block)}.attn") for block in (0, 1)]
    held = [
        [getattr(layer, f"_{side}_scale{where}") for side in "kv" for where in ("", "_float")]
        for layer in layers
    ]
    return [tuple(float(one) for one in scales) for scales in held]


@pytest.mark.parametrize("push", WAYS, ids=lambda way: way.__name__)
def test_a_reload_equals_a_restart(live: Serving, policies: Policies, push: Push) -> None:
    push(live.model, policies.tensors("b"))
    live.snapshot().assert_same(serve(policies.bf16("b"), live.scheme).start)
    push(live.model, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def test_the_cache_is_in_fp8(live: Serving) -> None:
    scheme = json.loads(Path(live.scheme).read_text())["configs"][0]["fn"]
    assert live.start.outputs != serve(live.checkpoint, scheme).start.outputs


@pytest.mark.parametrize("prepare", [False, True], ids=["at once", "prepared"])
def test_scales_go_live_with_weights_and_stay_until_others_come(
    live: Serving, policies: Policies, prepare: bool
) -> None:
    flashquant.reload_weights(live.llm, policies.tensors("b"))
    by_ones = live.snapshot()

    flashquant.reload_weights(live.llm, policies.tensors("b"), kv_scales=SCALES, prepare=prepare)
    scaled = live.snapshot()
    assert numbers(live) == [(0.5, 0.5, 0.25, 0.25), (1.5, 1.5, 0.25, 0.25)]
    assert scaled.outputs != by_ones.outputs
    assert scaled.digest != by_ones.digest

    flashquant.reload_weights(live.llm, policies.tensors("a"))
    flashquant.reload_weights(live.llm, policies.tensors("b"))
    live.snapshot().assert_same(scaled)

    ones = dict.fromkeys(SCALES, (1.0, 1.0))
    flashquant.reload_weights(live.llm, policies.tensors("b"), kv_scales=ones)
    live.snapshot().assert_same(by_ones)
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def test_a_request_in_flight_goes_on_by_the_new_scales(live: Serving, policies: Policies) -> None:
    """What it has cached by the old ones is computed anew, though the weights are the same."""
    from vllm import SamplingParams

    engine, prompt = live.llm.llm_engine, list(range(5, 45))
    greedy = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=0)
    engine.add_request("in flight", {"prompt_token_ids": prompt}, greedy)
    for _ in range(6):
        engine.step()
    flashquant.reload_weights(live.llm, policies.tensors("a"), kv_scales=SCALES)
    finished = []
    while engine.has_unfinished_requests():
        finished += [answer.outputs[0] for answer in engine.step() if answer.finished]
    (output,) = finished

    steps = zip(output.token_ids, output.logprobs, strict=True)
    said = [[token, step[token].logprob] for token, step in steps]
    assert said[6:] == live.continued(prompt + list(output.token_ids[:6]), 10)

    ones = dict.fromkeys(SCALES, (1.0, 1.0))
    flashquant.reload_weights(live.llm, policies.tensors("a"), kv_scales=ones)
    live.snapshot().assert_same(live.start)


BAD: dict[str, tuple[dict[str, Any], type[ReloadError], str]] = {
    "NaN": ({HERE.format(0): (1.0, math.nan)}, MisfitTensor, "two numbers, of keys and of values"),
    "zero": ({HERE.format(0): (0.0, 1.0)}, MisfitTensor, "finite and above 0"),
    "beyond float32": ({HERE.format(0): (1e39, 1.0)}, MisfitTensor, "finite and above 0"),
    "one number": ({HERE.format(0): (1.0,)}, MisfitTensor, "write two numbers"),
    "no such layer": ({HERE.format(7): (1.0, 1.0)}, UnknownWeight, r"did you mean 'model\.layers"),
}


@pytest.mark.parametrize(("scales", "error", "says"), BAD.values(), ids=BAD)
def test_bad_scales_are_refused_before_anything_is_touched(
    live: Serving,
    policies: Policies,
    scales: dict[str, Any],
    error: type[ReloadError],
    says: str,
) -> None:
    for prepare in (False, True):
        with pytest.raises(error, match=rf"kv_scales.*{says}"):
            flashquant.reload_weights(
                live.llm, policies.tensors("b"), kv_scales={**SCALES, **scales}, prepare=prepare
            )
        live.snapshot().assert_same(live.start)


def test_scales_are_undone_with_the_weights(
    live: Serving, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last proof fails, when scales are live already."""

    def fails(*_: object) -> None:
        raise ReloadError("injected")

    monkeypatch.setattr(live.session.proofs, "check_unmoved", fails)
    with pytest.raises(ReloadError, match="injected"):
        flashquant.reload_weights(live.llm, policies.tensors("b"), kv_scales=SCALES)

    assert numbers(live) == [(1.0,) * 4] * 2
    live.snapshot().assert_same(live.start)


def with_scales(checkpoint: Path) -> Path:
    """The same checkpoint, with scales of its own."""
    path = checkpoint.with_name(f"{checkpoint.name}-scales")
    if not path.exists():
        shutil.copytree(checkpoint, path)
        held = {
            f"{name}.{side}_scale": torch.tensor([value])
            for name, pair in SCALES.items()
            for side, value in zip("kv", pair, strict=True)
        }
        weights = {**tiny_models.tensors(checkpoint), **held}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_scales_of_the_checkpoint_are_served_and_equal_those_that_are_sent(
    policies: Policies, scheme: str
) -> None:
    """A push leaves them, also one that brings them under their names: they come as kv_scales."""
    config = written(policies, scheme)
    fresh = serve(with_scales(policies.bf16("a")), config)
    assert numbers(fresh) == [(0.5, 0.5, 0.25, 0.25), (1.5, 1.5, 0.25, 0.25)]

    sent = serve(policies.bf16("a"), config)
    flashquant.reload_weights(sent.llm, policies.tensors("a"), kv_scales=SCALES)
    sent.snapshot().assert_same(fresh.start)
    ones = dict.fromkeys(SCALES, (1.0, 1.0))
    flashquant.reload_weights(sent.llm, policies.tensors("a"), kv_scales=ones)

    for weights in (policies.tensors("b"), tiny_models.tensors(with_scales(policies.bf16("b")))):
        report = flashquant.reload_weights(fresh.llm, weights)
        assert set(report.ignored) == weights.keys() - policies.tensors("b").keys()
    fresh.snapshot().assert_same(serve(with_scales(policies.bf16("b")), config).start)


def test_a_cache_that_is_not_in_fp8_takes_no_scales(policies: Policies) -> None:
    live = serve(policies.bf16("a"), "int8")

    with pytest.raises(ReloadError, match="Write `kv_cache: fp8`"):
        flashquant.reload_weights(live.llm, policies.tensors("b"), kv_scales=SCALES)

    live.snapshot().assert_same(live.start)


def test_an_argument_that_says_otherwise_is_refused(policies: Policies) -> None:
    options = {"kv_cache_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="kv_cache_dtype='bfloat16'"):
        _ = Serving(policies.bf16("a"), written(policies, "int8"), options).llm


def test_workers_in_other_processes_hold_the_same_scales(policies: Policies) -> None:
    config = written(policies, "int8")
    there = run(
        "cache_scales",
        policies.bf16("a"),
        policies.bf16("b"),
        json.dumps(SCALES),
        FLASHRL_CONFIG=config,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )

    here = serve(policies.bf16("a"), config)
    assert there["start"] == there["end"] == here.start.digest
    flashquant.reload_weights(here.llm, policies.tensors("b"), kv_scales=SCALES)
    wanted = flashquant.status(here.llm).digest
    for kind in ("at once", "prepared"):
        assert there[kind] == [wanted, wanted]
        assert there[f"refused {kind}"][0] == "MisfitTensor"
        assert there[f"after {kind}"] == wanted
