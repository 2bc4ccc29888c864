"""A KV cache in fp8: its scales belong to a policy as its weights do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from vllm import _custom_ops as ops
from vllm.model_executor.models.utils import PPMissingLayer

import flashquant
from flashquant.errors import (
    ConfigError,
    FlashquantError,
    MisfitTensor,
    ReloadError,
    UnknownWeight,
)
from flashquant.patches.cache_scales import CacheScales
from flashquant.patches.seams import sleep
from flashquant.profiles import save_kv_scales
from flashquant.update import UndoLog
from tests.engine.processes import CORES, run
from tests.engine.serving import Serving, serve
from tests.engine.test_reload_equals_restart import WAYS, Push
from tests.support.gpu import HAS_GPU
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


@pytest.mark.skipif(HAS_GPU, reason="of vLLM's kernel for CPUs, which is not in a build for GPUs")
@pytest.mark.parametrize(
    ("dtype", "form"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 0.13])
def test_keys_and_values_are_rounded_to_nearest_as_on_a_gpu(
    dtype: str, form: torch.dtype, scale: float
) -> None:
    """vLLM's kernel for CPUs cuts them off towards zero: the mean of what is cached shrinks by 4 %.

    One token, so that it does not matter how a block of tokens is laid out.
    """
    flashquant.patch()
    sent = torch.logspace(-6, 5, 256).mul(torch.tensor([1.0, -1.0]).repeat(128)).bfloat16()
    cache = torch.zeros(1, 1, 64, 256, dtype=torch.uint8)
    sides = cache.chunk(2, dim=2)
    token, slot = sent.view(1, 1, 256), torch.zeros(1, dtype=torch.int64)
    ops.cpu_attn_reshape_and_cache(token, token, *sides, slot, "vec", scale, scale, dtype)

    largest = torch.finfo(form).max
    wanted = (sent.float() / scale).clamp(-largest, largest).to(form).float()
    for side in sides:
        held = side.contiguous().view(form).float().flatten()
        assert torch.equal(held[held != 0].sort().values, wanted[wanted != 0].sort().values)


def numbers(live: Serving) -> list[tuple[float, ...]]:
    """What each layer holds, wherever it holds it: tensors, and what kernels are called with."""
    layers = [live.model.get_submodule(f"{HERE.format(block)}.attn") for block in (0, 1)]
    held = [
        [getattr(layer, f"_{side}_scale{where}") for side in "kv" for where in ("", "_float")]
        for layer in layers
    ]
    return [tuple(torch.as_tensor(one).item() for one in scales) for scales in held]


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


def test_scales_that_come_alone_are_an_update_like_any_other(policies: Policies) -> None:
    """What was cached by the old ones is dropped: it would be read by the new ones."""
    prompt = list(range(5, 69))
    live = serve(
        policies.bf16("a"), written(policies, "int8"), enable_prefix_caching=True, block_size=32
    )
    old = live.continued(prompt, 8)
    flashquant.reload_weights(live.llm, {}, strict=False, kv_scales=SCALES)
    new = live.continued(prompt, 8)
    assert flashquant.status(live.llm).version == 1

    live.llm.reset_prefix_cache()
    assert old != new == live.continued(prompt, 8)


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
    live.session.restore_cache_scales()  # as after a sleep
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


@pytest.mark.parametrize(("side", "wrong"), [("k_scale", math.nan), ("v_scale", math.inf)])
def test_a_scale_of_the_checkpoint_that_is_no_number_stops_the_start(
    policies: Policies, tmp_path: Path, side: str, wrong: float
) -> None:
    shutil.copytree(with_scales(policies.bf16("a")), tmp_path, dirs_exist_ok=True)
    name = f"{HERE.format(1)}.{side}"
    weights = {**tiny_models.tensors(tmp_path), name: torch.tensor([wrong])}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        FlashquantError, match=rf"layers\.1\.self_attn\S*{side} holds NaN or infinite"
    ):
        _ = Serving(tmp_path, written(policies, "int8")).llm


def starting_with(policies: Policies, scheme: str, scales: dict[str, Any]) -> str:
    file = policies.folder / f"{scheme}-{len(scales)}.json"
    save_kv_scales(scales, file, "a")
    path = policies.folder / f"{scheme}-{len(scales)}-scales.yaml"
    entry = {"fn": scheme, "kv_cache": "fp8", "kv_scales": file.name}
    path.write_text(json.dumps({"configs": [entry]}))
    return str(path)


@pytest.mark.parametrize("scheme", ["bf16", "int8", "fp8_vllm"])
def test_scales_of_a_file_are_there_from_the_start_and_equal_those_that_are_sent(
    policies: Policies, scheme: str
) -> None:
    fresh = serve(policies.bf16("a"), starting_with(policies, scheme, SCALES))
    assert numbers(fresh) == [(0.5, 0.5, 0.25, 0.25), (1.5, 1.5, 0.25, 0.25)]

    sent = serve(policies.bf16("a"), written(policies, scheme))
    flashquant.reload_weights(sent.llm, policies.tensors("a"), kv_scales=SCALES)
    sent.snapshot().assert_same(fresh.start)
    ones = dict.fromkeys(SCALES, (1.0, 1.0))
    flashquant.reload_weights(sent.llm, policies.tensors("a"), kv_scales=ones)
    sent.snapshot().assert_same(sent.start)


def test_a_file_of_another_model_stops_the_start(policies: Policies) -> None:
    config = starting_with(policies, "int8", {**SCALES, HERE.format(7): (1.0, 1.0)})
    with pytest.raises(ConfigError, match=r"layers\.7\.self_attn.*did you mean.*`kv_scales`"):
        _ = Serving(policies.bf16("a"), config).llm


def test_scales_computed_of_the_pushed_policy_are_those_of_a_fresh_start(
    live: Serving, policies: Policies
) -> None:
    """What the trainer's model caches; refreshed with its weights, and undone with them."""
    scheme = json.loads(Path(live.scheme).read_text())["configs"][0]["fn"]
    prompts = [list(range(5, 45))]
    policy = AutoModelForCausalLM.from_pretrained(policies.bf16("b"), dtype=torch.bfloat16)
    scales = flashquant.kv_scales(policy, prompts)

    flashquant.reload_weights(live.llm, policy.state_dict(), kv_scales=scales)

    fresh = serve(policies.bf16("b"), starting_with(policies, scheme, scales))
    live.snapshot().assert_same(fresh.start)
    ones = dict.fromkeys(scales, (1.0, 1.0))
    flashquant.reload_weights(live.llm, policies.tensors("a"), kv_scales=ones)
    live.snapshot().assert_same(live.start)


@pytest.mark.parametrize("tags", [[None], [["weights"], ["kv_cache"]]], ids=["all", "by tags"])
def test_scales_survive_sleep_at_level_2(
    live: Serving, policies: Policies, tags: list[list[str] | None]
) -> None:
    """What comes back holds anything; new scales may come before the cache is there again."""
    flashquant.reload_weights(live.llm, policies.tensors("a"), kv_scales=SCALES)
    served = live.snapshot()
    worker = SimpleNamespace(get_model=lambda: live.model, get_draft_model=lambda: None)
    sleep._sleep(lambda worker, level: None, worker, 2)
    for tag in tags:
        sleep._wake_up(lambda worker, tags: reset_scales(live.model), worker, tag)
        if tag != ["kv_cache"]:
            flashquant.reload_weights(live.llm, policies.tensors("a"))

    live.snapshot().assert_same(served)
    ones = dict.fromkeys(SCALES, (1.0, 1.0))
    flashquant.reload_weights(live.llm, policies.tensors("a"), kv_scales=ones)
    live.snapshot().assert_same(live.start)


@torch.no_grad()  # parameters, up to vLLM 0.27
def reset_scales(model: nn.Module) -> None:
    """As some versions of vLLM do when they wake up."""
    for module in model.modules():
        if hasattr(module, "_k_scale_float"):
            module._k_scale.fill_(1.0)
            module._v_scale.fill_(1.0)
            module._k_scale_float = module._v_scale_float = 1.0


def test_layers_of_another_pipeline_stage_are_left_to_it(policies: Policies) -> None:
    live = serve(policies.bf16("a"), written(policies, "int8"))
    stage = nn.Module()
    stage.add_module("model", nn.Module())
    stage.model.layers = nn.ModuleList([live.model.model.layers[0], PPMissingLayer()])
    scales = CacheScales(stage, captured=False)
    scales.open({})

    scales.check(SCALES)
    with pytest.raises(UnknownWeight, match=r"layers\.7"):
        scales.check({HERE.format(7): (1.0, 1.0)})
    scales.set(SCALES, undo := UndoLog())

    assert numbers(live)[0] == (0.5, 0.5, 0.25, 0.25)
    undo.restore()
    live.snapshot().assert_same(live.start)


def test_what_an_attention_has_made_of_old_scales_is_made_anew(policies: Policies) -> None:
    """FlashInfer's keep `bmm1_scale`, a product of the scales that their first pass has met."""
    live = serve(policies.bf16("a"), written(policies, "int8"))
    attention = live.model.get_submodule(f"{HERE.format(0)}.attn")
    attention.impl.bmm1_scale = None
    scales = CacheScales(live.model, captured=False)
    scales.open({})
    attention.impl.bmm1_scale = attention._k_scale_float * attention.impl.scale

    scales.set(SCALES, undo := UndoLog())
    assert attention.impl.bmm1_scale is None
    undo.restore()
    live.snapshot().assert_same(live.start)


def test_a_cache_that_is_not_in_fp8_takes_no_scales(policies: Policies) -> None:
    live = serve(policies.bf16("a"), "int8")

    with pytest.raises(ReloadError, match="Write `kv_cache: fp8`"):
        flashquant.reload_weights(live.llm, policies.tensors("b"), kv_scales=SCALES)

    live.snapshot().assert_same(live.start)


def test_an_argument_that_says_otherwise_is_refused(policies: Policies) -> None:
    options = {"kv_cache_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="kv_cache_dtype='bfloat16'"):
        _ = Serving(policies.bf16("a"), written(policies, "int8"), options).llm


def test_two_ranks_hold_the_same_scales(policies: Policies) -> None:
    """At once, prepared, refused; and those of the file that they start with."""
    there = run(
        "cache_scales",
        policies.bf16("a"),
        policies.bf16("b"),
        json.dumps(SCALES),
        FLASHRL_CONFIG=starting_with(policies, "int8", SCALES),
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to look at the numbers in the workers
        VLLM_CPU_OMP_THREADS_BIND=CORES,
    )

    sent = [[list(pair) for pair in SCALES.values()]] * 2  # of both ranks
    assert there["numbers"] == {"start": sent, "pushed": [[[2.0, 4.0]] * 2] * 2, "end": sent}
    assert there["start"] == there["end"]
    wanted = there["at once"][0]
    assert wanted != there["start"]
    for kind in ("at once", "prepared"):
        assert there[kind] == [wanted, wanted]
        assert there[f"refused {kind}"][0] == "MisfitTensor"
        assert there[f"after {kind}"] == wanted
